"""How a run was made, from environment.json."""

from triderm_dist.environment import hardware_of, version_of
from triderm_dist.report.provenance import Provenance, duration, fitted_parts

MADE = {"triderm-dist": "0.1.0", "commit": "0123456789abcdef" * 2 + "-dirty", "cpu": "AMD EPYC", "cores": 2, "gpus": []}


def start(program: str, day: int, environment: int, seconds: float) -> dict:
    return {
        "program": program, "started": f"2026-11-{day:02}T10:00:00+00:00", "seconds": seconds,
        "environment": environment,
    }  # fmt: skip


def test_starts_of_a_stage_are_added_up():
    on_gpus = {**MADE, "commit": None, "gpus": ["NVIDIA H100"] * 2, "ranks": 2, "packages": {"torch": "2.14.1"}}
    record = {
        "data": {"train": {"fingerprint": "ab"}},
        "environments": [MADE, on_gpus],
        "starts": [start("crossval", 25, 0, 50), start("crossval", 26, 1, 70), start("report", 28, 0, 9)],
    }
    found = Provenance.of(record)
    assert [(each.program, each.seconds, each.started) for each in found.stages] == [
        ("crossval", 120, ("2026-11-25", "2026-11-26"))
    ]
    assert found.date == "2026-11-26" and found.seconds == 120  # writing the report again changes neither
    assert found.hardware == "2 x NVIDIA H100, 2 ranks" and found.version == "0.1.0"
    assert found.data == {"fingerprint": "ab"} and found.packages == {"torch": "2.14.1"}


def test_a_run_without_a_record_has_no_date():
    found = Provenance.of({"data": {}, "environments": [], "starts": []})
    assert (found.date, found.seconds, found.version, found.hardware) == (None,) * 4


def test_version_hardware_and_duration_are_formatted():
    assert version_of(MADE) == "0.1.0 (0123456789ab, changed)" and hardware_of(MADE) == "2 cores of AMD EPYC"
    assert [duration(seconds) for seconds in (4, 61, 3599, 12_000)] == ["4 s", "1 min", "1 h 0 min", "3 h 20 min"]


def test_what_was_fitted_where():
    two = [*fitted_parts(["a"], 2, stacker=True, thresholds=True, tested=False)]
    assert [each.fitted_on for each in two] == [
        "training lesions of the other fold", "held-out predictions of the other fold",
    ]  # fmt: skip
    five = [*fitted_parts(["a", "b"], 5, stacker=False, thresholds=False, tested=True, extra_sets=["x (9 lesions)"])]
    assert five[0].fitted_on == "training lesions of the other 4 folds, and x (9 lesions)"
    assert [each.part for each in five[1:]] == [
        "temperatures and weights, nested", "temperatures and weights, final",
    ]  # fmt: skip
