"""Run functions in processes of this machine, several at a time, and print what they print, line by line.

On Linux the processes are forks of a server that has imported what they need (`start_server`), elsewhere new ones.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.plugins import explain_plugin_error
from triderm_dist.runtime.signals import SIGNALS, end_with_parent, handle_signals, raise_stopped
from triderm_dist.runtime.usage import add_child_peak, own_peak_mb
from triderm_dist.schema import Busy, InputError

METHOD = "forkserver" if sys.platform == "linux" else "spawn"
READ_BYTES = 1 << 16
Work = tuple[Callable[..., Any], Sequence[Any]]
"""A function of a module, and its arguments."""


@dataclass(frozen=True)
class Failure:
    """Why a process failed, in one line.

    is_final: it would fail again.  was_killed: by a signal; the system does so where memory runs out.
    """

    reason: str
    is_final: bool = False
    was_killed: bool = False


@dataclass
class _Running:
    """A process, what it prints (an incomplete line is kept), and what it answers.

    end: kind of the answer, `Failure` or result, and peak memory in MiB; None before it has answered.
    """

    process: Any
    output: Connection
    answer: Connection
    line: bytes = b""
    end: tuple[str, Any, float] | None = None


@contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Context in which processes that are started get these environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start_server(modules: Sequence[str]) -> None:
    """Start to import `modules` for processes to come. Returns at once; does nothing but on Linux.

    Their idle OpenMP threads sleep, and each has one such thread until it sets its own number: a fork of a process with
    several would wait for threads that it does not have.
    """
    if METHOD != "forkserver":
        return
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(list(modules))
    with environment_variables(
        {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    ):
        forkserver.ensure_running()


@dataclass
class ChildProcesses:
    """Processes that work on tasks, at most `at_once` at a time, in the order in which they were started."""

    tasks: Mapping[str, Work]
    at_once: int
    results: dict[str, Any] = field(default_factory=dict)
    """What the functions returned, by task."""

    def __post_init__(self) -> None:
        self._context: Any = get_context(METHOD)
        self._waiting: deque[str] = deque()
        self._running: dict[str, _Running] = {}

    def start(self, name: str) -> None:
        """Start a task, once others have ended if there are too many."""
        self._waiting.append(name)
        self._fill()

    def ended(self) -> list[tuple[str, Failure | None]]:
        """Print what the processes print for up to a second, or until some end; return these, and how they failed.

        Raises KeyboardInterrupt if one was stopped by a signal that this process did not pass on.
        """
        found = self._wait()
        if any(failure is _STOPPED for _, failure in found):
            raise KeyboardInterrupt
        if any(failure and failure.was_killed for _, failure in found):
            self.at_once = max(1, self.at_once - 1)
        self._fill()
        return found

    def stop(self) -> None:
        """Ask all processes to stop, and wait until they have saved their work."""
        self._waiting.clear()
        with handle_signals(lambda number, frame: None, (*SIGNALS, signal.SIGINT)):  # SIGTERM has reached the children
            for running in self._running.values():
                with suppress(ProcessLookupError):
                    os.kill(running.process.pid, signal.SIGTERM)
            while self._running:
                self._wait()

    def kill(self) -> None:
        """End all processes at once."""
        for running in list(self._running.values()):
            running.process.kill()

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.at_once:
            name = self._waiting.popleft()
            function, arguments = self.tasks[name]
            output, output_end = self._context.Pipe(duplex=False)
            answer, answer_end = self._context.Pipe(duplex=False)
            process = self._context.Process(
                target=_work, args=(output_end, answer_end, function, arguments), name=name, daemon=True
            )
            process.start()
            output_end.close()
            answer_end.close()
            os.set_blocking(output.fileno(), False)
            self._running[name] = _Running(process, output, answer)

    def _wait(self) -> list[tuple[str, Failure | None]]:
        ready = set(wait(self._handles(), timeout=1.0))
        found = []
        for name, running in list(self._running.items()):
            has_ended = running.process.sentinel in ready
            if not running.answer.closed and (has_ended or running.answer in ready):
                _receive(running)
            if has_ended or running.output in ready:
                _print_output(running, has_ended)
            if has_ended:
                del self._running[name]
                found.append((name, self._failure(name, running)))
        return found

    def _handles(self) -> list[Any]:
        running = self._running.values()
        pipes = [pipe for each in running for pipe in (each.output, each.answer) if not pipe.closed]
        return [each.process.sentinel for each in running] + pipes

    def _failure(self, name: str, running: _Running) -> Failure | None:
        """Return how an ended process failed; None if it did not, and its result is kept."""
        running.process.join()
        code = running.process.exitcode
        running.process.close()
        if running.end is None:
            by = f" (killed by {signal.Signals(-code).name})" if code and code < 0 else ""
            return Failure(f"its process died{by}, possibly out of memory", was_killed=True)
        kind, value, peak_mb = running.end
        add_child_peak(peak_mb)
        if kind == "result":
            self.results[name] = value
            return None
        return value if kind == "failure" else _STOPPED


_STOPPED = Failure("it was stopped")


def _receive(running: _Running) -> None:
    """Take the answer of a process that has sent one, or is sending it: it ends only when a large one was taken."""
    with suppress(EOFError, OSError):
        if running.answer.poll():
            running.end = running.answer.recv()
    running.answer.close()


def _print_output(running: _Running, to_end: bool) -> None:
    """Print the complete lines that a process has printed, and after its end also an incomplete one."""
    data = running.line
    while not running.output.closed:
        try:
            part = os.read(running.output.fileno(), READ_BYTES)
        except BlockingIOError:
            break
        if not part:
            running.output.close()
        data += part
    lines, newline, running.line = data.rpartition(b"\n")
    if to_end:
        lines, newline, running.line = data, b"", b""
        running.output.close()
    if text := (lines + newline).decode(errors="replace").rstrip("\n"):
        print(text, flush=True)


# --- in the processes ------------------------------------------------------------------------------------------------


def _work(output: Connection, answer: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Call a function in its process, and answer with its result or failure, and the peak memory in MiB.

    SIGTERM and the like stop it; Ctrl-C, which a terminal sends to all processes, is left to the one that waits.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    sys.stdout, sys.stderr = (
        open(number, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )
    try:
        with handle_signals(raise_stopped, SIGNALS):
            end: tuple[str, Any] = "result", function(*arguments)
    except KeyboardInterrupt:
        end = "stopped", None
    except Exception as error:
        end = "failure", _explained(error)
    answer.send((*end, own_peak_mb()))


def _explained(error: Exception) -> Failure:
    """Return the failure of an exception; one that is not of the input or the system is printed whole."""
    if isinstance(error, InputError | Busy):
        return Failure(one_line(error), is_final=True)
    if line := explain_plugin_error(error):
        return Failure(line, is_final=True)
    if not isinstance(error, OSError | MemoryError):
        traceback.print_exc()
    return Failure(one_line(error, with_type=True))
