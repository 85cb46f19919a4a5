"""Last output line and exit status of triderm doctor."""

from tests.doctor.conftest import FROZEN, run_doctor


def test_missing_data_is_the_last_line_and_exits_with_2(tmp_path):
    done = run_doctor(*FROZEN, f"output={tmp_path}", f"data.source={tmp_path / 'nowhere'}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: a run cannot start: training (")
    assert "nowhere" in done.stderr and "nowhere" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_valid_run_exits_with_0(make_challenge, tmp_path):
    done = run_doctor(*FROZEN, "ranks=1", f"output={tmp_path / 'run'}", f"data.source={make_challenge().folder}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "a run can start"
    assert "22 lesions" in done.stdout and "96 = " in done.stdout
