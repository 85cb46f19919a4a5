"""Signals that stop a program: SIGTERM, SIGUSR1 and SIGHUP of schedulers and terminals, and Ctrl-C.

The first asks it to stop: training saves first (`distributed.stop.Stop`), other programs end at once. A Ctrl-C
after that ends the process at once, also where its main thread is inside a library. A signal that is ignored when a
program starts, as SIGHUP under nohup, stays ignored. Imports nothing heavy: handlers are needed first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

BAD_INPUT = 2
"""Exit code of a program that refuses its input."""
INTERRUPTED = 3
"""Exit code of a program that was stopped, and resumes when the same command is run again."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
"""The signals by which schedulers and closed terminals stop a program; Windows has fewer."""
SAME_SECONDS = 1.0
"""A Ctrl-C within this time of another request is the same one: a terminal sends it to each process of a group, and a
launcher forwards it to its processes.
"""
STUCK_SECONDS = 5.0
"""Time for the main thread to notice a Ctrl-C, where it has nothing to save; inside a library it does not."""


class Stopped(KeyboardInterrupt):
    """Raised by `raise_stopped`, the handler of programs that have nothing to save.

    A subclass, because after a plain KeyboardInterrupt that passed through exec() (dataclasses use it) Python ends by
    SIGINT whatever exit code it is given.
    """


def raise_stopped(number: int, frame: FrameType | None) -> None:
    """Raise `Stopped`; a signal handler."""
    raise Stopped


def end_at_once() -> NoReturn:
    """End this process with 3, without cleaning up: all files are written whole or not at all."""
    with suppress(OSError):
        os.write(2, b"interrupted: ended at once; rerun the same command to resume\n")
    os._exit(INTERRUPTED)


@contextmanager
def handle_signals(handler: Callable[..., object], numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Install `handler` for these signals inside the block, except for ignored ones.

    Only in the main thread: Python allows it only there.
    """
    main = threading.current_thread() is threading.main_thread()
    known = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN] if main else []
    before = {number: signal.signal(number, handler) for number in known}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class _Watch:
    """Watches for a second request to stop from a thread, since the main thread may be inside a library."""

    def __init__(self) -> None:
        self.requested: float | None = None
        """Time of the first request, by time.monotonic."""
        self.on_second_request: Callable[[], object] = end_at_once

    def receive(self, number: int) -> None:
        """Take a signal that arrived."""
        if number not in (*SIGNALS, signal.SIGINT):
            return
        now = time.monotonic()
        if self.requested is None:
            self.requested = now
            if number == signal.SIGINT:
                threading.Thread(target=self._end_if_stuck, daemon=True).start()
        elif number == signal.SIGINT and now - self.requested > SAME_SECONDS:
            self.on_second_request()

    def _end_if_stuck(self) -> None:
        for _ in range(int(STUCK_SECONDS * 10)):
            time.sleep(0.1)
            if signal.getsignal(signal.SIGINT) is not raise_stopped or _cleaning.is_set():
                return
        end_at_once()


_cleaning = threading.Event()
_watch: _Watch | None = None


def cleaning_up() -> None:
    """Note that the main thread has received a Ctrl-C and saves something: it may take as long as it needs."""
    _cleaning.set()


@contextmanager
def exit_on_second_request() -> Iterator[None]:
    """In the block, a Ctrl-C after another request to stop ends the process at once, or calls `on_second_request`.

    A first Ctrl-C ends it too, where `raise_stopped` handles it but the main thread does not return to Python within
    `STUCK_SECONDS`. Does nothing outside of the main thread.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread() or os.name == "nt":
        yield
        return
    _cleaning.clear()
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    watch = _watch = _Watch()

    def read() -> None:
        while arrived := os.read(receiver, 64):
            for number in arrived:
                watch.receive(number)
        os.close(receiver)

    threading.Thread(target=read, name="second Ctrl-C", daemon=True).start()
    before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(sender)
        _watch = None


@contextmanager
def on_second_request(action: Callable[[], object]) -> Iterator[None]:
    """Context in which a second request calls `action`, from another thread, instead of ending this process."""
    watch = _watch
    if watch is None:
        yield
        return
    before, watch.on_second_request = watch.on_second_request, action
    try:
        yield
    finally:
        watch.on_second_request = before


def end_with_parent() -> None:
    """On Linux, make the kernel send SIGTERM to this process when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_with_launcher() -> None:
    """Call `end_with_parent` in a rank, and in the one process of `accelerate launch`, which forwards no signal: a
    killed launcher cannot stop what it started.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher == str(os.getppid()) or "TORCHELASTIC_RUN_ID" in os.environ or _is_accelerate(os.getppid()):
        end_with_parent()


_ACCELERATE = (b"accelerate", b"accelerate-launch", b"accelerate.commands.launch")


def _is_accelerate(pid: int) -> bool:
    """Return whether a process is `accelerate launch`, by its command line (Linux)."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).split(b"\0")[:4]
    except OSError:
        return False
    return any(os.path.basename(word) in _ACCELERATE for word in words)


LAUNCHER = "TRIDERM_LAUNCHER"
"""Environment variable with the PID of `triderm ranks`."""
