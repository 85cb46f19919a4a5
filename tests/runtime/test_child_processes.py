"""Tasks in processes: what they print and return, how they fail, and how they are stopped."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from triderm_dist.engine.parallel_folds import run_tasks
from triderm_dist.runtime.child_processes import ChildProcesses, start_server
from triderm_dist.schema import ConfigError, InputError


def add(folder: Path, name: str) -> int:
    """Add a character to a file; return how many it has."""
    with (folder / name).open("a") as file:
        file.write(".")
    return (folder / name).stat().st_size


def returns(folder: Path) -> dict[str, str | None]:
    print("first line\nsecond", end="")
    os.write(2, b"\n")
    print("incomplete", end="", flush=True)
    return {"threads": os.environ.get("OMP_NUM_THREADS")}


def returns_much(folder: Path) -> bytes:
    return bytes(1_000_000)


def dies_once(folder: Path) -> None:
    if add(folder, "dies_once") == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def raises(folder: Path) -> None:
    add(folder, "raises")
    raise OSError("no space\nleft")


def refuses(folder: Path) -> None:
    add(folder, "refuses")
    raise ConfigError("train.optim.lr: too high")


def breaks(folder: Path) -> None:
    add(folder, "breaks")
    raise ZeroDivisionError


def waits(folder: Path) -> None:
    add(folder, "waits")
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        (folder / f"saved-{os.getpid()}").touch()
        raise


def processes(folder: Path, at_once: int, **functions) -> ChildProcesses:
    start_server([__name__])
    return ChildProcesses({name: (function, (folder,)) for name, function in functions.items()}, at_once)


def test_output_result_and_failures(tmp_path, capfd):
    pool = processes(tmp_path, 2, r=returns, m=returns_much, d=dies_once, e=raises, c=refuses, b=breaks)
    with pytest.raises(InputError) as error:
        run_tasks(pool, list(pool.tasks), retries=2)
    text = str(error.value)
    assert "e: OSError: no space left" in text and "c: train.optim.lr: too high" in text and "\n" not in text
    assert "b: ZeroDivisionError" in text and "3 of 6 finished" in text
    times = {name: len((tmp_path / name).read_text()) for name in ("dies_once", "raises", "refuses", "breaks")}
    assert times == {"dies_once": 2, "raises": 3, "refuses": 1, "breaks": 3}
    assert pool.results == {"r": {"threads": "1"}, "m": bytes(1_000_000), "d": None}
    assert pool.at_once == 1  # one was killed, maybe for its memory
    printed = capfd.readouterr().out
    lines = [line for line in printed.splitlines() if line in ("first line", "second", "incomplete")]
    assert lines == ["first line", "second", "incomplete"]  # others' lines may be printed between them
    assert "d failed, restarting it from its last checkpoint: its process died (killed by SIGKILL)" in printed
    assert printed.count("in breaks") == 3 and "in raises" not in printed  # tracebacks of errors of the program


def test_same_reason_is_named_once(tmp_path):
    pool = processes(tmp_path, 1, one=refuses, two=refuses)
    with pytest.raises(InputError, match=r"^one, two: train.optim.lr: too high \(0 of 2 finished; rerun"):
        run_tasks(pool, ["one", "two"], retries=2)


@pytest.mark.parametrize("sender", ["self", "child"])
def test_stop_waits_until_all_have_saved(tmp_path, monkeypatch, sender):
    pool = processes(tmp_path, 2, one=waits, two=waits, three=waits)
    ended = pool.ended

    def ended_after_stop():
        if (tmp_path / "waits").exists() and (tmp_path / "waits").stat().st_size == 2:
            (tmp_path / "waits").unlink()
            if sender == "self":
                raise KeyboardInterrupt
            os.kill(pool._running["one"].process.pid, signal.SIGTERM)
        return ended()

    monkeypatch.setattr(pool, "ended", ended_after_stop)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(pool, list(pool.tasks), retries=2)
    assert len(list(tmp_path.glob("saved-*"))) == 2 and not pool._running


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux the processes are forks of a server")
def test_server_starts_with_one_thread_and_leaves_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    start_server([__name__])
    assert os.environ["OMP_NUM_THREADS"] == "7" and "OMP_WAIT_POLICY" not in os.environ
