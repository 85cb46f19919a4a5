"""Requests to stop: the first, a second Ctrl-C, ignored signals, and a main thread that is inside a library."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests import processes
from tests.processes import HANG_SECONDS, wait_for
from triderm_dist.cli import Interrupted
from triderm_dist.commands import ranks
from triderm_dist.distributed.stop import Stop
from triderm_dist.runtime import signals

PROGRAM = """
import ctypes, os, sys, time
from triderm_dist import cli
from triderm_dist.runtime import signals
signals.SAME_SECONDS = signals.STUCK_SECONDS = 0.2

def ready():
    open(sys.argv[2], "w").close()

def inside_a_library():
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ready()
    ctypes.CDLL(None).pthread_mutex_lock(mutex)  # for ever, whatever signal arrives

def saving():
    from triderm_dist.distributed.stop import Stop
    with Stop() as stop, stop.save_on_stop(lambda: (ready(), inside_a_library())):
        stop.check()
        ready()
        while True:
            time.sleep(0.01)
            stop.check()

def reading():
    from triderm_dist.data.threads import map_in_order
    ready()
    list(map_in_order(time.sleep, [900], 1))

cli.run_with_exit_codes(globals()[sys.argv[1]])
"""


def start(work: str, folder: Path) -> tuple[subprocess.Popen, Path]:
    program, ready = folder / "program.py", folder / "ready"
    program.write_text(PROGRAM)
    process = processes.start(str(program), work, str(ready))
    wait_for(ready.exists, process)
    ready.unlink()
    return process, ready


def end(process: subprocess.Popen) -> tuple[int, str]:
    errors = process.communicate(timeout=HANG_SECONDS)[1]
    return process.returncode, errors


@pytest.mark.parametrize("work", ["inside_a_library", "reading"])
def test_ctrl_c_ends_a_program_whatever_its_threads_do(work, tmp_path):
    process, _ = start(work, tmp_path)
    process.send_signal(signal.SIGINT)
    status, errors = end(process)
    assert status == 3 and errors.startswith("interrupted: ") and errors.count("\n") == 1, errors


def test_second_ctrl_c_ends_a_training_that_saves(tmp_path):
    process, ready = start("saving", tmp_path)
    process.send_signal(signal.SIGTERM)
    wait_for(ready.exists, process)
    while process.poll() is None:  # those within SAME_SECONDS are the same request
        process.send_signal(signal.SIGINT)
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    assert end(process) == (3, "interrupted: ended at once; rerun the same command to resume\n")


def test_ignored_signals_stay_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handle_signals(signals.raise_stopped), Stop():
            os.kill(os.getpid(), signal.SIGHUP)
        assert "SIGHUP" not in ranks.handled({}, ranks.is_ignored)
        assert ranks.handled({"PET_SIGNALS_TO_HANDLE": "SIGTERM, SIGHUP"}, ranks.is_ignored) == ["SIGTERM"]
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "SIGHUP" in ranks.handled({}, ranks.is_ignored)


@pytest.mark.parametrize("number", [*signals.SIGNALS, signal.SIGINT])
def test_training_with_nothing_to_save_stops_at_once(number):
    with pytest.raises(signals.Stopped), Stop():
        os.kill(os.getpid(), number)
    saved = []
    stop = Stop()
    with pytest.raises(Interrupted, match="after saving"), stop, stop.save_on_stop(lambda: saved.append(1)):
        stop.check()
        os.kill(os.getpid(), number)
        stop.check()
    assert saved == [1]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_that_arrives_twice_is_one(first, monkeypatch):
    """Half a second apart, from terminal and launcher, they are the same request; a later one is the second."""
    now, ended = 0.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch = signals._Watch()
    watch.on_second_request = lambda: ended.append(now)
    with Stop() as stop, stop.save_on_stop(lambda: None), pytest.raises(signals.Stopped):
        stop.check()
        for seconds, number in ((100.0, first), (100.5, signal.SIGINT), (105.0, signal.SIGINT)):
            now = seconds
            watch.receive(number)
            os.kill(os.getpid(), number)
    assert now == 105.0 and ended == [105.0]


def test_rank_ends_with_its_launcher_only(monkeypatch):
    calls = []
    monkeypatch.setattr(signals, "end_with_parent", lambda: calls.append(1))
    for environment, ends in (
        ({}, 0),
        ({signals.LAUNCHER: str(os.getppid())}, 1),
        ({signals.LAUNCHER: "1"}, 1),  # of another process, as in a shell that a rank started
        ({"TORCHELASTIC_RUN_ID": "none"}, 2),
    ):
        with monkeypatch.context() as patch:
            for name in (signals.LAUNCHER, "TORCHELASTIC_RUN_ID"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            signals.end_with_launcher()
        assert len(calls) == ends


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_process_of_accelerate_ends_with_it(tmp_path):
    """`accelerate launch` of one process forwards no signal: the training would run on, and hold its folder."""
    program, launcher = tmp_path / "wait.py", tmp_path / "accelerate"
    program.write_text(
        "import os, time\nfrom triderm_dist.runtime.signals import end_with_launcher\nend_with_launcher()\n"
        "print(os.getpid(), flush=True)\ntime.sleep(3600)\n"
    )
    launcher.write_text(f"import subprocess, sys\nsubprocess.Popen([sys.executable, {str(program)!r}]).wait()\n")
    environment = {**os.environ, "PYTHONPATH": str(processes.ROOT)}
    with subprocess.Popen([sys.executable, launcher], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        try:
            process.communicate(timeout=HANG_SECONDS)  # returns when the program, too, has closed its output
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
