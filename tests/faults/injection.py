"""Inject a fault into this process when files of a folder have been changed k times.

tests.fork_server imports this module at the start of every process of a faulted command (FORK_IMPORTS). The plan is in
the environment variable INJECTED_FAULT, see `Plan`. Changes are counted over all processes of the command, by Python's
audit events: a file opened for writing, renamed, truncated or removed, a folder made or removed. So the moment depends
on no clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.fork_server import limit_capabilities

VARIABLE = "INJECTED_FAULT"
MODULE = "tests.faults.injection"
CHANGES = {"os.rename": 2, "os.remove": 1, "os.truncate": 1, "os.mkdir": 1, "os.rmdir": 1, "shutil.rmtree": 1}
"""Audit events that change a file, and how many of their first arguments are paths."""
LOCKS = ("lock", ".lock")


@dataclass(frozen=True)
class Plan:
    """folder: whose files are watched.  scratch: folder of the counter and of one file per process.

    at: the change at which the fault happens, from 1; 0 injects none.  fault: SIGKILL and the like, or `full` for a
    full disk: no file of the process can grow any more.  target: the processes that receive the signal, `self` or
    the beginning of names such as `pipeline 0` and `crossval 1`, that of rank 1.  unprivileged: root may not
    write what is read-only.
    """

    folder: str
    scratch: str
    at: int = 0
    fault: str = "SIGKILL"
    target: str = "self"
    unprivileged: bool = False

    def environment(self) -> dict[str, str]:
        """Return the environment variables of a command for which this is planned."""
        return {VARIABLE: json.dumps(asdict(self)), "FORK_IMPORTS": MODULE}


class Injector:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.folder = plan, os.path.abspath(plan.folder)
        self.lock, self.injected = threading.Lock(), False
        scratch = Path(plan.scratch)
        # Both descriptors are closed only when the process ends, and its forks'.
        self.counter = os.open(scratch / "changes", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.alive = os.open(scratch / "alive", os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.alive, fcntl.LOCK_SH)
        self.name = process_name()
        (scratch / f"{os.getpid()}.process {self.name}").touch()  # the disk may be full

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            paths = [path] if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
        else:
            paths = list(arguments[: CHANGES.get(event, 0)])
        named = [os.path.abspath(os.fsdecode(path)) for path in paths if isinstance(path, str | bytes | os.PathLike)]
        if any(self.counts(path) for path in named):
            self.changed(event, named)

    def counts(self, path: str) -> bool:
        return path.startswith(f"{self.folder}/") and not path.endswith(LOCKS)

    def changed(self, event: str, paths: list[str]) -> None:
        with self.lock:
            fcntl.flock(self.counter, fcntl.LOCK_EX)
            try:
                size = os.fstat(self.counter).st_size
                number = os.pread(self.counter, size, 0).count(b"\n") + 1
                with contextlib.suppress(OSError):  # after `full` this file cannot grow either
                    os.write(self.counter, f"{self.name}\t{event} {' '.join(paths)}\n".encode())
            finally:
                fcntl.flock(self.counter, fcntl.LOCK_UN)
        if number == self.plan.at and not self.injected:
            self.injected = True  # what follows may be a change itself
            self.inject(event, paths)

    def inject(self, event: str, paths: list[str]) -> None:
        if self.plan.fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        number = getattr(signal, self.plan.fault)
        if self.plan.target == "self":
            if number == signal.SIGKILL and event == "os.rename" and os.path.isfile(paths[0]):
                os.truncate(paths[0], os.path.getsize(paths[0]) // 2)  # as if killed while it is written
            os.kill(os.getpid(), number)
            return
        for file in Path(self.plan.scratch).glob(f"*.process {self.plan.target}*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.name.partition(".")[0]), number)


def process_name() -> str:
    """Return the program of this process and its rank: `crossval 1`."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words else Path(words[1]).stem
    name = "launcher" if module.endswith(".ranks") else module.rpartition(".")[2]
    return f"{name} {os.environ.get('RANK', '0')}"


def start(plan: Plan) -> None:
    """Watch the changes of this process."""
    if plan.unprivileged:
        limit_capabilities(~0b110)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    sys.addaudithook(Injector(plan).hook)


if VARIABLE in os.environ:
    start(Plan(**json.loads(os.environ[VARIABLE])))
