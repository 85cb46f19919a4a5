"""Ray, for what runs side by side: started on this machine or joined as a cluster, and how much of it there is room
for.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from triderm_dist.cli import handle_signals, raise_stopped
from triderm_dist.schema import InputError, one_line

Needs = dict[str, float]
"""What one process takes of a machine: {"CPU", "GPU"}."""
REACH_SECONDS = 10.0
"""Time for a cluster to answer; left to itself Ray waits for minutes."""


@contextmanager
def running_ray(
    address: str | None, cpus: int, *, setting: str, variables: Mapping[str, str] | None = None, forward: bool = False
) -> Iterator[None]:
    """Ray inside the block: started here, or the cluster of `address` joined; its processes get `cpus` threads each.
    SIGTERM and SIGUSR1 stop what runs in the block as Ctrl-C does.

    setting: the key that the address was given by. variables: of the environment, for Ray here and for its processes.
    forward: print here what they print. Raises InputError where Ray does not start.
    """
    own = {"RAY_USAGE_STATS_ENABLED": "0", **(variables or {})}
    if forward:  # every line as it is
        own |= {"RAY_DEDUP_LOGS": "0", "RAY_DISABLE_WORKER_LOG_PREFIX": "1"}
    os.environ.update(own)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address and "RAY_AUTH_TOKEN" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # without which Ray does not send it
    import ray  # which reads much of the above now, and once

    library = str(Path(__file__).resolve().parents[2])
    paths = dict.fromkeys([library, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    own |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(cpus), "OMP_WAIT_POLICY": "PASSIVE"}
    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": "error", "log_to_driver": forward}
    # "local", since without an address Ray joins whatever cluster was last started on this machine.
    # Nothing large goes through the object store; its default is a third of the memory.
    local: dict[str, Any] = {} if address else {"object_store_memory": 100 * 2**20}
    with handle_signals(_as_ctrl_c):
        try:
            _reach(address)
            ray.init(address or "local", runtime_env={"env_vars": own}, **quiet, **local)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{setting}={address}: Ray does not start ({one_line(error)}); "
                "check the address, and RAY_AUTH_TOKEN where the cluster asks for a token"
            ) from None
        except SystemExit:  # by Ray's own handler of SIGTERM
            raise KeyboardInterrupt from None
        signal.signal(signal.SIGTERM, _as_ctrl_c)  # instead of that
        try:
            yield
        finally:
            ray.shutdown()


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """By the handler that Ray Tune has for it, where it has."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler) and handler is not signal.default_int_handler:
        handler(signal.SIGINT, frame)
    else:
        raise_stopped(number, frame)


def _reach(address: str | None) -> None:
    """Raises OSError where an address HOST:PORT does not answer."""
    host, colon, port = (address or "").rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), REACH_SECONDS).close()


def room(needs: Needs) -> tuple[int, str]:
    """How many processes with these needs the machines of the running Ray hold at once, and what the largest has, in
    words.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(min(int(node.get(name, 0.0) / amount) for name, amount in needs.items() if amount) for node in nodes)
    most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in ("CPU", "GPU")}
    return places, f"{most['CPU']:g} CPU, {most['GPU']:g} GPU"
