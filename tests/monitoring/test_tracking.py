"""The log of a run: printed lines, metrics.jsonl, TensorBoard, other trackers."""

import json
import math
import re
import time

import pytest
from accelerate.tracking import GeneralTracker, get_available_trackers, register_tracker_class

from triderm_dist.config import TrainConfig
from triderm_dist.files import write_text
from triderm_dist.monitoring import tracking
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.monitoring.tracking import Tracker, check_trackers, log_scores, tracker_arguments
from triderm_dist.monitoring.train_lines import TrainLines
from triderm_dist.runtime.extras import install_command
from triderm_dist.schema import ConfigError

TRAIN = {
    "loss": 1.5, "focal": 1.0, "soft_f1": 0.9, "aux": 0.4, "lr": 1e-4, "grad_norm": 2.0, "lesions_per_s": 96.0,
    "data_wait": 0.01, "memory_gib": 2.5, "seconds_left": 3725.0,
}  # fmt: skip


def tracker_in(folder, trackers=("tensorboard",), **more):
    lines = TrainLines(40, 2, ("focal", "soft_f1", "aux"), mfu=True)
    config = TrainConfig(trackers=trackers, optim={"lr": 0.1})
    return Tracker("tri fold 0", folder, lines=lines, config=config, **more)


def scalars_of(folder) -> dict[str, dict[int, float]]:
    """Return the scalars of TensorBoard: {name: {step: value}}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: {each.step: each.value for each in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_numbers_that_are_not_finite_are_null_in_json_and_nan_when_read(tmp_path):
    for step in (0, 10):  # the second one rewrites the lines of the first
        with tracker_in(tmp_path, step=step) as tracker:
            tracker.log("train", 0.5, step + 10, {**TRAIN, "grad_norm": float("inf"), "aux": float("nan")})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["grad_norm"] for line in lines] == [None, None]
    assert all(math.isnan(record["grad_norm"]) for record in read_metrics(tmp_path / "metrics.jsonl"))


def test_record_is_printed_and_written_as_json_and_scalars(tmp_path, capsys):
    with tracker_in(tmp_path) as tracker:
        tracker.log("train", 0.5, 10, {**TRAIN, "mfu": 0.456})
        tracker.log("validation", 1, 20, {"macro_f1": 0.25, "official": 0.5})
    header, train, validation = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "step loss focal soft_f1 aux lr grad les/s wait MFU GiB left"
    assert " ".join(train.split()) == "10/40 1.5000 1.000 0.900 0.400 1.0e-04 2.00 96.0 1% 46% 2.5 1:02:05"
    assert validation == "epoch 1/2  macro F1 0.250 (argmax)  0.500 (p > 0.5)"
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert 0 <= records[0].pop("seconds") <= records[1].pop("seconds")
    assert records[0] == {"kind": "train", "epoch": 0.5, "step": 10, **TRAIN, "mfu": 0.456}
    scalars = scalars_of(tmp_path)
    for name, value in TRAIN.items():
        assert scalars[f"train/{name}"] == {10: pytest.approx(value)}
    assert scalars["validation/macro_f1"] == {20: 0.25}


def test_time_left_includes_later_trainings_and_time_before_a_resume(tmp_path, capsys):
    write_text(
        tmp_path / "metrics.jsonl", '{"kind": "train", "epoch": 0.5, "step": 10, "loss": 1.0, "seconds": 400.0}\n'
    )
    with tracker_in(tmp_path, step=10, trackers=[], later_seconds=lambda seconds: 2 * seconds) as tracker:
        tracker.log("train", 1, 20, {**TRAIN, "seconds_left": 200.0, "mfu": 0.5})
    assert capsys.readouterr().out.splitlines()[1].endswith(" 0:23:20")  # 200 + 2 x (400 + 200) seconds
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["seconds"] == pytest.approx(400, abs=5)


def test_resumed_run_replaces_later_records(tmp_path, monkeypatch):
    with tracker_in(tmp_path) as tracker:
        for step in (10, 20, 30):
            tracker.log("train", 0, step, {**TRAIN, "loss": 1.0})
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 1)  # TensorBoard sorts event files by start time in seconds
    with tracker_in(tmp_path, step=20) as tracker:
        tracker.log("train", 0, 30, {**TRAIN, "loss": 2.0})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert scalars_of(tmp_path)["train/loss"][30] == 2.0


def test_settings_of_an_unknown_tracker_are_refused():
    check_trackers(TrainConfig(tracker_settings={"wandb": {"project": "skin"}}))  # of one that is not used
    with pytest.raises(ConfigError, match=r"train\.tracker_settings\.wandbb: no tracker; did you mean 'wandb'\?"):
        check_trackers(TrainConfig(tracker_settings={"wandbb": {"project": "skin"}}))


def test_unknown_and_missing_trackers_are_refused_on_every_rank(tmp_path):
    with pytest.raises(ConfigError, match=r"'weights_and_biases' is not a tracker; known: aim, .*wandb"):
        tracker_in(tmp_path, ["weights_and_biases"])
    available = [str(kind) for kind in get_available_trackers()]
    missing = next(name for name in ("aim", "clearml", "dvclive", "swanlab") if name not in available)
    with pytest.raises(
        ConfigError, match=f"{missing} is not installed; {re.escape(install_command(missing))}, or remove it"
    ):
        tracker_in(tmp_path, [missing])
    assert not list(tmp_path.iterdir())


def test_without_tensorboard_a_line_is_printed_and_the_run_is_logged(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "is_installed", lambda name: False)
    with tracker_in(tmp_path) as tracker:
        tracker.log("train", 0.5, 10, TRAIN)
    assert capsys.readouterr().out.startswith(
        "tri fold 0: no TensorBoard files: pip install 'triderm-dist[track]'\n step   loss"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_names_of_wandb_and_mlflow_come_from_the_run_and_the_environment(tmp_path, monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    about = "tri fold 0", "demo", tmp_path
    found = tracker_arguments("wandb", *about)
    assert {key: found[key] for key in ("project", "group", "name", "dir", "resume")} == {
        "project": "triderm-dist", "group": "demo", "name": "demo tri fold 0", "dir": str(tmp_path), "resume": "allow",
    }  # fmt: skip
    for name, value in (("PROJECT", "skin"), ("RUN_GROUP", "night"), ("NAME", "first"), ("DIR", "/elsewhere")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    changed = tracker_arguments("wandb", *about)
    assert (changed["project"], changed["group"], changed["name"]) == ("skin", "night", "first tri fold 0")
    assert "dir" not in changed and changed["id"] == found["id"]  # wandb reads WANDB_DIR itself
    mlflow = {"experiment_name": "triderm-dist", "run_name": "demo tri fold 0", "tags": {"group": "demo"}}
    assert tracker_arguments("mlflow", *about) == mlflow


class _Kept(GeneralTracker):
    """A tracker that keeps what it gets."""

    name, requires_logging_directory, tracker = "kept", True, None
    seen: list = []  # noqa: RUF012

    def __init__(self, **arguments):
        super().__init__()
        self.seen.append(arguments)

    def start(self):
        pass

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.seen.append(values)


def test_final_scores_are_logged_with_the_settings_of_the_tracker(tmp_path, capsys):
    register_tracker_class(_Kept)
    own = {"kept": {"run_name": "own", "tags": [1]}}
    config = TrainConfig(trackers=("tensorboard", "kept"), tracker_settings=own)
    log_scores(tmp_path, {"held out/macro F1": 0.5}, config)
    assert _Kept.seen == [{"run_name": "own", "tags": [1], "logging_dir": str(tmp_path)}, {"held out/macro F1": 0.5}]
    log_scores(tmp_path, {}, TrainConfig(trackers=("none",)))
    assert capsys.readouterr().out.startswith("scores are not logged to none: train.trackers: 'none' is not a tracker")
    assert not list(tmp_path.iterdir())


class _Flaky(GeneralTracker):
    """A tracker that fails after its first record."""

    name, requires_logging_directory = "flaky", False
    seen: list[dict] = []  # noqa: RUF012

    def __init__(self, run_name, **kwargs):
        super().__init__()

    tracker = None

    def start(self):
        if self.seen:
            raise ConnectionError("no route\nto host")

    def store_init_configuration(self, values):
        self.seen.append(values)

    def log(self, values, step, **kwargs):
        if step > 1:
            raise ConnectionError("gone")
        self.seen.append(values)


def test_failing_tracker_is_dropped(tmp_path, capsys):
    register_tracker_class(_Flaky)
    with tracker_in(tmp_path, trackers=["flaky"]) as tracker:
        for step in (1, 2, 3):
            tracker.log("train", 0, step, TRAIN)
    assert [seen.get("train/loss", seen.get("optim.lr")) for seen in _Flaky.seen] == [0.1, 1.5]
    out = capsys.readouterr().out
    assert out.count("flaky failed and is no longer used (ConnectionError: gone)") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    with pytest.raises(ConfigError, match=r"flaky did not start \(ConnectionError: no route to host\)"):
        tracker_in(tmp_path, trackers=["flaky"]).__enter__()


@pytest.mark.slow  # creating its database takes half a minute
def test_mlflow_gets_settings_and_metrics(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with tracker_in(tmp_path, trackers=["mlflow"], group="demo") as tracker:
        tracker.log("train", 0, 10, TRAIN)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.run_name == "demo tri fold 0" and run.data.tags["group"] == "demo"
    assert run.data.params["optim.lr"] == "0.1"
    assert run.data.metrics["train/loss"] == 1.5


def test_wandb_continues_the_same_run_on_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 10):
        with tracker_in(tmp_path, trackers=["wandb"], step=step) as tracker:
            tracker.log("train", 0, step + 10, TRAIN)
    runs = {path.stem.removeprefix("run-") for path in tmp_path.glob("wandb/*/run-*.wandb")}
    assert len(runs) == 1


def test_wandb_has_a_run_for_each_training_in_a_folder(tmp_path, monkeypatch):
    kind = type("Wandb", (_Kept,), {"name": "wandb", "requires_logging_directory": False, "seen": []})
    monkeypatch.setattr(tracking, "tracker_class", lambda name: kind)
    for step in (0, 10, 0):  # a training, its resume, and another training
        with tracker_in(tmp_path, trackers=["wandb"], step=step):
            pass
    first, resumed, other = (each["id"] for each in kind.seen)
    assert first == resumed != other
    (tmp_path / tracking.WANDB_FILE).unlink()
    with tracker_in(tmp_path, trackers=["wandb"], step=10):  # of an earlier version
        pass
    assert kind.seen[-1]["id"] == tracker_arguments("wandb", "tri fold 0", "", tmp_path)["id"]


def test_settings_saved_without_their_secret_are_refused_by_name(tmp_path):
    own = {"wandb": {"project": "skin", "api_key": "***"}}
    cls = type("Tracker", (), {"name": "wandb", "requires_logging_directory": False})
    with pytest.raises(ConfigError, match=r"train.tracker_settings.wandb: saved settings hold no passwords and tokens"):
        tracking._started(cls, {"project": "x"}, own["wandb"], {})
