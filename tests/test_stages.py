"""Stages run once for the same content, again when it changes, and one run works in a folder at a time."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from triderm_dist.schema import InputError
from triderm_dist.stages import Stage, run_stages


def stage(folder: Path, settings: object = 0, name: str = "copy") -> Stage:
    code = f"open(r'{folder}/out', 'a').write(open(r'{folder}/in').read())"
    return Stage(name, ["python", "-c", code], settings, [folder / "in"], [folder / "out"])


def test_content_decides_not_time(tmp_path):
    (tmp_path / "in").write_text("a")
    run_stages([stage(tmp_path)], tmp_path)
    (tmp_path / "in").write_text("a")
    run_stages([stage(tmp_path)], tmp_path)
    assert (tmp_path / "out").read_text() == "a"
    (tmp_path / "in").write_text("b")
    run_stages([stage(tmp_path)], tmp_path)
    assert (tmp_path / "out").read_text() == "ab"
    run_stages([stage(tmp_path, settings=1)], tmp_path)
    assert (tmp_path / "out").read_text() == "abb"
    (tmp_path / "out").unlink()
    run_stages([stage(tmp_path, settings=1)], tmp_path)
    assert (tmp_path / "out").read_text() == "b"


def test_a_folder_counts_by_names_sizes_and_tables(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "photo.jpg").write_bytes(b"123")
    (source / "table.csv").write_text("a,b\n")
    count = tmp_path / "count"
    one = Stage("n", ["python", "-c", f"open(r'{count}', 'a').write('x')"], None, [source], [count])

    def runs() -> int:
        run_stages([one], tmp_path / "run")
        return len(count.read_text())

    assert (runs(), runs()) == (1, 1)
    (source / "table.csv").write_text("a,c\n")
    assert (runs(), runs()) == (2, 2)
    (source / "photo2.jpg").write_bytes(b"123")
    assert (runs(), runs()) == (3, 3)


def test_a_failed_stage_ends_the_run_with_its_status(tmp_path):
    (tmp_path / "in").write_text("a")
    failing = Stage("fail", ["python", "-c", "raise SystemExit(2)"], 0, [], [])
    with pytest.raises(SystemExit) as stop:
        run_stages([failing, stage(tmp_path)], tmp_path)
    assert stop.value.code == 2
    assert not (tmp_path / "out").exists()
    run_stages([stage(tmp_path)], tmp_path)
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_waits_for_its_stage_to_save(tmp_path, number):
    stage = (
        "import signal, sys, time; from pathlib import Path\n"
        f"def save(*_): time.sleep(1); Path(r'{tmp_path}/saved').touch(); sys.exit(3)\n"
        f"signal.signal(signal.SIGTERM, save); Path(r'{tmp_path}/begun').touch(); time.sleep(60)"
    )
    code = (
        "from pathlib import Path; from triderm_dist import cli; from triderm_dist.config import Experiment\n"
        "from triderm_dist.stages import Stage, run_stages\n"
        f"stages = [Stage('wait', ['python', '-c', {stage!r}], 0, [], [])]\n"
        f"cli.run(Experiment, lambda settings: run_stages(stages, Path(r'{tmp_path}')), None, [])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=30) == 3 and (tmp_path / "saved").exists()


def test_one_run_at_a_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from triderm_dist.stages import Stage, run_stages; "
        f"run_stages([Stage('wait', ['python', '-c', 'import time; time.sleep(60)'], 0, [], [])], Path(r'{tmp_path}'))"
    )
    first = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                run_stages([], tmp_path)
            except InputError as error:
                assert "another run is working here" in str(error)
                break
            time.sleep(0.1)
        else:
            pytest.fail("the lock was never taken")
    finally:
        first.kill()
        first.wait()
    deadline = time.monotonic() + 10  # the stage ends with its pipeline, and the folder is free
    while True:
        try:
            run_stages([], tmp_path)
            break
        except InputError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
