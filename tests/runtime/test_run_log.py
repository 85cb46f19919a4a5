"""log.txt of a run: what the terminal showed, after a header for each program."""

import re
import subprocess
import sys
from contextlib import suppress

import pytest

from triderm_dist import __version__, cli
from triderm_dist.config import Experiment
from triderm_dist.runtime.run_log import RunLog
from triderm_dist.schema import InputError

HEADER = r"\n=== \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC  "


def test_lines_of_both_streams_are_kept_without_colors_and_overwritten_text(tmp_path, capsys):
    with RunLog(tmp_path, "triderm one"):
        print("\x1b[1mbold\x1b[0m", "text")
        print("10%\r\x1b[2K50%\r\x1b[2K100%\r")
        print("a problem", file=sys.stderr)
        print("no end of line", end="")
    print("not logged")
    assert capsys.readouterr().out.startswith("\x1b[1mbold\x1b[0m text\n10%\r")
    text = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(HEADER + "triderm one\nbold text\n100%\na problem\nno end of line\n", text)
    with RunLog(tmp_path, "triderm two"):
        print("more")
    assert re.fullmatch(re.escape(text) + HEADER + "triderm two\nmore\n", (tmp_path / "log.txt").read_text())


def test_progress_bar_is_kept_in_its_last_state_only(tmp_path):
    states = [f"\x1b[2K{number}%" for number in range(1000)]
    for bar in ("".join(f"\r{state}" for state in states), "".join(f"{state}\r" for state in states)):
        with RunLog(tmp_path, "triderm one") as log:
            for character in bar:
                log.add("stdout", character)
                assert len(log._partial["stdout"]) < 20
            log.add("stdout", "\x1b[2K\n")
        assert (tmp_path / "log.txt").read_text().endswith("UTC  triderm one\n999%\n")
        (tmp_path / "log.txt").unlink()


def test_nothing_is_written_before_the_run_exists(tmp_path):
    folder = tmp_path / "run"
    with RunLog(folder, "triderm one"):
        print("first")
        assert not folder.exists()
        folder.mkdir()
        print("second")
        assert (folder / "log.txt").read_text().endswith("\nfirst\nsecond\n")
    with RunLog(folder / "other", "triderm two"):
        print("refused")
    with RunLog(folder, "triderm three"):
        pass
    assert [path.name for path in folder.iterdir()] == ["log.txt"]
    assert "three" not in (folder / "log.txt").read_text()


def test_program_goes_on_where_the_log_cannot_be_written(tmp_path, capsys):
    (tmp_path / "log.txt").mkdir()
    with RunLog(tmp_path, "triderm one"):
        print("shown")
    assert capsys.readouterr().out == "shown\n"


class Logged(Experiment):
    @property
    def is_stage(self) -> bool:
        return True


@pytest.mark.parametrize("rank", ["0", "1"])
def test_program_logs_its_output_and_its_error_on_rank_0(tmp_path, monkeypatch, rank):
    def main(config: Logged) -> None:
        print("working")
        raise InputError("age: not a number")

    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        cli.run(Logged, main, None, [f"output={tmp_path}", "seed=3"])
    if rank == "1":
        assert not list(tmp_path.iterdir())
        return
    text = (tmp_path / "log.txt").read_text()
    title = re.escape(f"triderm test_run_log output={tmp_path} seed=3 ({__version__})")
    assert re.fullmatch(HEADER + title + "\nworking\nerror: age: not a number\n", text)


def test_exported_run_in_which_a_program_fails_stays_as_it_is(tmp_path):
    """It holds the settings, but no log."""

    def work(error: Exception | None) -> list[str]:
        def main(config: Logged) -> None:
            print("working")
            assert not (run / "log.txt").exists()
            if error:
                raise error

        with suppress(SystemExit, ZeroDivisionError):
            cli.run(Logged, main, None, [f"run={run}"])
        return sorted(path.name for path in run.iterdir())

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("models: {a: {}}\n")
    assert work(InputError("no training set")) == ["config.yaml"]
    assert work(None) == [".environment.lock", "config.yaml", "environment.json", "log.txt"]
    assert (run / "log.txt").read_text().endswith("\nworking\n")
    (run / "log.txt").unlink()
    assert "log.txt" in work(ZeroDivisionError())  # a fault of the program is kept
    assert "ZeroDivisionError" in (run / "log.txt").read_text()


def test_traceback_of_an_unexpected_error_is_logged(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, "x"):
        print(1 / 0)
    assert (tmp_path / "log.txt").read_text().endswith("ZeroDivisionError: division by zero\n")


def test_output_of_the_processes_of_a_program_is_kept_whole(tmp_path):
    child = (
        "from triderm_dist.runtime.run_log import RunLog\nfrom pathlib import Path\n"
        f"with RunLog(Path({str(tmp_path)!r}), 'c'):\n    for number in range(200): print('x' * 100)"
    )
    started = [subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert {line for line in lines if line and not line.startswith("===")} == {"x" * 100}
