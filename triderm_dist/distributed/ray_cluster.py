"""Ray for parallel folds and searches: start it locally or connect to a cluster, and count what fits."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from triderm_dist.schema import InputError, one_line
from triderm_dist.signals import handle_signals, raise_stopped

Needs = dict[str, float]
"""Resources of one process: {"CPU", "GPU"}."""
CONNECT_SECONDS = 10.0
"""Time for a cluster to answer; by default Ray waits for minutes."""


@contextmanager
def running_ray(
    address: str | None, cpus: int, *, setting: str, variables: Mapping[str, str] | None = None, forward: bool = False
) -> Iterator[None]:
    """Context with Ray, started on this machine or connected to the cluster at `address`; its processes get `cpus`
    threads each. SIGTERM and SIGUSR1 act like Ctrl-C inside of it.

    setting: key of the settings that gave the address, for messages.  variables: environment of Ray and its processes.
    forward: print the output of the processes in this one. Raises InputError if Ray does not start.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0", **(variables or {})}
    if forward:  # every line, without prefixes
        environment |= {"RAY_DEDUP_LOGS": "0", "RAY_DISABLE_WORKER_LOG_PREFIX": "1"}
    os.environ.update(environment)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address and "RAY_AUTH_TOKEN" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # otherwise Ray does not send the token
    import ray  # it reads the environment once, when imported

    library = str(Path(__file__).resolve().parents[2])
    paths = dict.fromkeys([library, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(cpus), "OMP_WAIT_POLICY": "PASSIVE"}
    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": "error", "log_to_driver": forward}
    # "local", since without an address Ray connects to the cluster that was last started on this machine.
    # Nothing large passes through the object store, whose default is a third of the memory.
    local: dict[str, Any] = {} if address else {"object_store_memory": 100 * 2**20}
    with handle_signals(_as_ctrl_c):
        try:
            _check_reachable(address)
            ray.init(address or "local", runtime_env={"env_vars": environment}, **quiet, **local)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{setting}={address}: Ray did not start ({one_line(error)}); "
                "check the address, and RAY_AUTH_TOKEN if the cluster requires a token"
            ) from None
        except SystemExit:  # raised by Ray's own handler of SIGTERM
            raise KeyboardInterrupt from None
        signal.signal(signal.SIGTERM, _as_ctrl_c)  # replaces Ray's
        try:
            yield
        finally:
            ray.shutdown()


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Handle a signal as SIGINT: by Ray Tune's handler if there is one, else by KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler) and handler not in (signal.default_int_handler, raise_stopped):
        handler(signal.SIGINT, frame)
    else:
        raise_stopped(number, frame)


def _check_reachable(address: str | None) -> None:
    """Raise OSError if an address HOST:PORT does not answer."""
    host, colon, port = (address or "").rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def capacity(needs: Needs) -> tuple[int, str]:
    """Return how many processes with these needs fit on the nodes of the running Ray at once, and the largest node's
    resources as text.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = sum(min(int(node.get(name, 0.0) / amount) for name, amount in needs.items() if amount) for node in nodes)
    largest = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")}
    return fitting, f"{largest['CPU']:g} CPU, {largest['GPU']:g} GPU"
