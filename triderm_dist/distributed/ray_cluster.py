"""Ray for parallel folds and searches: start it locally or connect to a cluster, and compute its capacity."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from triderm_dist.cli import print_error
from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.signals import INTERRUPTED, cleaning_up, handle_signals, raise_stopped
from triderm_dist.schema import InputError

Needs = dict[str, float]
"""Resources of one process: {"CPU", "GPU"}."""
CONNECT_SECONDS = 10.0
"""Time for a cluster to answer; by default Ray waits for minutes."""
WATCH_SECONDS = 3.0
"""Seconds between two questions whether Ray's head still answers."""
ANSWER_SECONDS, LOCAL_ANSWER_SECONDS = 45.0, 10.0
"""Time without an answer of Ray's head after which this process ends: the head of a cluster may be restarted."""
MAX_FOLDER = 107 - len("/session_2026-11-26_11-52-30_590328_4194304/sockets/plasma_store")
"""Longest path of Ray's folder in bytes, since the path of a socket has at most 107."""
RESUME = "rerun the same command to resume; a search with resume=true"


@contextmanager
def running_ray(
    address: str | None, cpus: int, *, setting: str, variables: Mapping[str, str] | None = None, forward: bool = False
) -> Iterator[None]:
    """Run Ray in the block, on this machine or connected to the cluster at `address`, with `cpus` threads per process.

    SIGTERM and SIGUSR1 act like Ctrl-C in the block.

    setting: key of the settings that gave the address, for messages.  variables: environment of Ray and its processes.
    forward: print the output of the processes in this one. Raises InputError if Ray does not start.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0", **(variables or {})}
    if forward:  # all lines, without prefixes
        environment |= {"RAY_DEDUP_LOGS": "0", "RAY_DISABLE_WORKER_LOG_PREFIX": "1"}
    os.environ.update(environment)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address and "RAY_AUTH_TOKEN" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # otherwise Ray does not send the token
    import ray  # reads the environment when imported

    library = str(Path(__file__).resolve().parents[2])
    paths = dict.fromkeys([library, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(cpus), "OMP_WAIT_POLICY": "PASSIVE"}
    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": "error", "log_to_driver": forward}
    # "local", since without an address Ray connects to the cluster that was last started on this machine.
    # Nothing large passes through the object store, whose default is a third of the memory.
    local: dict[str, Any] = {} if address else {"object_store_memory": 100 * 2**20, **_temporary_folder()}
    with handle_signals(_interrupt, [signal.SIGINT]), handle_signals(_as_ctrl_c):
        try:
            _check_reachable(address)
            ray.init(address or "local", runtime_env={"env_vars": environment}, **quiet, **local)
        except (OSError, ValueError, RuntimeError) as error:
            if address is None:
                raise InputError(f"Ray did not start on this machine: {one_line(error)}") from None
            raise InputError(
                f"{setting}={address}: Ray did not start ({one_line(error)}); "
                "check the address, and RAY_AUTH_TOKEN if the cluster requires a token"
            ) from None
        except SystemExit:  # raised by Ray's own handler of SIGTERM
            raise KeyboardInterrupt from None
        signal.signal(signal.SIGTERM, _as_ctrl_c)  # replaces Ray's
        with _watched(ray.get_runtime_context().gcs_address, ANSWER_SECONDS if address else LOCAL_ANSWER_SECONDS):
            try:
                yield
            finally:
                ray.shutdown()


def _temporary_folder() -> dict[str, str]:
    """Return Ray's setting for a short folder if TMPDIR is too long for the paths of its sockets.

    Raises InputError if there is none.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray")
    if len(os.fsencode(folder)) <= MAX_FOLDER:
        return {}
    for short in ("/tmp", "/var/tmp", "/dev/shm"):
        if os.path.isdir(short) and os.access(short, os.W_OK | os.X_OK):
            return {"_temp_dir": os.path.join(short, f"ray-{os.getuid()}")}
    raise InputError(
        f"{folder}: too long a name for the sockets of Ray, at most {MAX_FOLDER} bytes; set RAY_TMPDIR to a shorter one"
    )


@contextmanager
def _watched(address: str, seconds: float) -> Iterator[None]:
    """End this process with exit code 3 during the block if Ray's head does not answer for `seconds`.

    Ray itself ends the process with exit code 1 after a minute, without advice.
    """
    host, _, port = address.rpartition(":")
    ended = threading.Event()

    def watch() -> None:
        answered = time.monotonic()
        while not ended.wait(WATCH_SECONDS):
            with suppress(OSError):
                socket.create_connection((host.strip("[]"), int(port)), WATCH_SECONDS).close()
                answered = time.monotonic()
            if time.monotonic() - answered > seconds and not ended.is_set():
                print_error(f"interrupted: Ray at {address} has not answered for {seconds:g} s; {RESUME}")
                os._exit(INTERRUPTED)

    threading.Thread(target=watch, name="watch Ray", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT. Ray Tune restores this handler after its own, and its processes may take long to save."""
    cleaning_up()
    raise_stopped(number, frame)


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Handle a signal as SIGINT: by Ray Tune's handler if there is one, else by KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler) and handler not in (signal.default_int_handler, _interrupt):
        handler(signal.SIGINT, frame)
    else:
        raise_stopped(number, frame)


def _check_reachable(address: str | None) -> None:
    """Raise OSError if an address HOST:PORT does not answer."""
    host, colon, port = (address or "").rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def cluster_capacity(needs: Needs) -> tuple[int, str]:
    """Return the number of processes with these needs that the running Ray's nodes can run at once, and the largest
    node's resources as text.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = sum(min(int(node.get(name, 0.0) / amount) for name, amount in needs.items() if amount) for node in nodes)
    largest = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")}
    return fitting, f"{largest['CPU']:g} CPU, {largest['GPU']:g} GPU"
