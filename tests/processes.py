"""Start programs in subprocesses and wait for conditions."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.fork_server import fork_python
from triderm_dist.files import LOCK_SECONDS, lock_part

ROOT = Path(__file__).parents[1]
WORKERS = ROOT / "tests" / "distributed" / "workers"
HANG_SECONDS = 900.0
"""The only timeout of the tests; it guards against hanging. A test must not depend on the load of the machine, so
order and speed are tested by counts or events.
"""


def wait_for(
    condition: Callable[[], object],
    process: subprocess.Popen | None = None,
    output: Callable[[], str] = lambda: "",
    pause: float = 0.02,
) -> None:
    """Poll until `condition()` is true; fail if `process` ends first or HANG_SECONDS pass, and show `output()`."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert process is None or process.poll() is None or condition(), f"{process.args} ended\n{output()}"
        assert time.monotonic() < deadline, f"waited {HANG_SECONDS:g} s\n{output()}"
        time.sleep(pause)


def is_free(folder: Path) -> bool:
    """Return whether the lock of an output folder is free; the stage of a killed pipeline holds it until it ends."""
    with (folder / ".lock").open() as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def written_meanwhile(output: Path, write: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Hold OUTPUT.part until the block waits for it, then write the output and remove that folder, as another process
    does.
    """
    part, held, ended = Path(f"{output}.part"), threading.Event(), threading.Event()

    def other() -> None:
        with lock_part(part, ""):
            held.set()
            wait_for(lambda: ended.is_set() or "; waiting at most" in capsys.readouterr().out)
            write()
            shutil.rmtree(part)

    thread = threading.Thread(target=other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LOCK_SECONDS, str(HANG_SECONDS))
        thread.start()
        held.wait()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def start(
    module_or_file: str,
    *arguments: str,
    ranks: int = 1,
    config: str | None = None,
    fork: bool = True,
    environment: dict[str, str] | None = None,
    folder: Path = ROOT,
    output: int | IO[str] = subprocess.PIPE,
    errors: int | IO[str] = subprocess.PIPE,
) -> subprocess.Popen:
    """Start a program as `ranks` processes, under torchrun or, with `config`, under `accelerate launch`.

    With `fork` the processes are forks of one that has imported PyTorch.
    """
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(environment or {})}
    target = [module_or_file] if module_or_file.endswith(".py") else ["-m", module_or_file]
    if config:
        launcher = ["-m", "launch.ranks", "--config_file", config, "--num_processes", str(ranks)]
    elif ranks > 1:
        # Without an address the launcher takes the host's name, which not every machine can resolve.
        address = ["--standalone", "--local-addr", "127.0.0.1"]
        launcher = ["-m", "torch.distributed.run", *address, "--nproc_per_node", str(ranks)]
    else:
        launcher = []
    return subprocess.Popen(
        [fork_python() if fork else sys.executable, *launcher, *target, *arguments],
        cwd=folder,
        env=environment,
        stdout=output,
        stderr=errors,
        text=True,
        process_group=0,
    )


def interrupt_read(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process that reads from a pipe, until it has ended: one that arrives just before the read
    blocks is noticed after it only.
    """
    for _ in range(int(HANG_SECONDS) // 10):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for a process started by `start`; return its output and exit status."""
    try:
        output, errors = process.communicate(timeout=HANG_SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def launch(module_or_file: str, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess:
    """Run a program to its end; `options` are those of `start`."""
    done = finish(start(module_or_file, *arguments, **options))
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def drop_root() -> None:
    """Take from root the right to write everywhere; for a child process, before its program starts."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP


def without_root(*words: str, folder: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run triderm in a folder as a user who may not write files that are read-only."""
    return subprocess.run(
        [fork_python(), "-m", "triderm_dist", *words], cwd=folder, preexec_fn=drop_root, timeout=HANG_SECONDS,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True, text=True,
    )  # fmt: skip
