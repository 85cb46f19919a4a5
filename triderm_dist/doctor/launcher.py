"""Check the accelerate file of a run: number of processes, and their rendezvous port."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from triderm_dist.config import find_file
from triderm_dist.doctor.findings import Finding, try_import
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import ConfigError
from triderm_dist.settings import read_mapping, untyped

if TYPE_CHECKING:
    from triderm_dist.distributed.parallel import Strategy

SHARDING: dict[str, Strategy] = {"DEEPSPEED": "deepspeed", "FSDP": "fsdp2"}
"""Strategies by `distributed_type`; others are single or DDP."""
DEFAULT_PORT = 29500
"""Accelerate's default rendezvous port."""


@dataclass(frozen=True)
class Launcher:
    """The content of an accelerate file. ranks: processes on all nodes. port: of rank 0; 0 takes any free one."""

    file: Path
    strategy: Strategy
    nodes: int
    ranks: int
    host: str
    port: int


def read_launcher(file: str | os.PathLike[str]) -> Launcher:
    """Read an accelerate file. Raises ConfigError for one that is missing or that Accelerate refuses."""
    path = find_file("accelerate_configs", file)
    try:
        raw = untyped(read_mapping(path, "triderm config list names the shipped ones"))
        if reader := try_import("accelerate.commands.config.config_args"):
            reader.load_config_from_file(str(path))
        ranks = int(raw.get("num_processes") or 1)
        return Launcher(
            path,
            strategy=SHARDING.get(str(raw.get("distributed_type")).upper(), "ddp" if ranks > 1 else "single"),
            nodes=int(raw.get("num_machines") or 1),
            ranks=ranks,
            host=str(raw.get("main_process_ip") or "localhost"),
            port=DEFAULT_PORT if raw.get("main_process_port") is None else int(raw["main_process_port"]),
        )
    except ConfigError as error:
        raise ConfigError(f"launcher: {error}; accelerate_configs/ has such files") from None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"launcher: {path}: not an accelerate file ({one_line(error)}); accelerate_configs/ has such files"
        ) from None


def strategy(launcher: Launcher | None, ranks: int) -> Strategy:
    """Return the parallel strategy of a run; without an accelerate file, of `ranks` ranks that a launcher started."""
    if launcher:
        return launcher.strategy
    for name in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            return SHARDING[name]
    return "ddp" if ranks > 1 else "single"


def launcher_findings(launcher: Launcher | None, gpus: int, cores: int) -> list[Finding]:
    """Check that the ranks can start on this host, one of the launcher's nodes. Binds the port for a moment."""
    if launcher is None:
        port = os.environ.get("MASTER_PORT", "")
        return [_port(int(port), "another MASTER_PORT")] if port.isdigit() else []
    per_node = launcher.ranks // launcher.nodes
    text = f"{launcher.file}: {launcher.ranks} process{'es' * (launcher.ranks > 1)}"
    if launcher.nodes > 1:
        text += f" on {launcher.nodes} nodes, {per_node} on each"
    if gpus and per_node > gpus:
        advice = f"--num_processes {gpus * launcher.nodes} after --config_file, or edit the file"
        found = [Finding("processes", f"{text}; this host has {gpus} GPU(s)", "error", advice)]
    elif not gpus and per_node > cores:
        found = [
            Finding("processes", f"{text}; this host has {cores} cores", "warning", "--num_processes N starts fewer")
        ]
    else:
        found = [Finding("processes", text)]
    return found if launcher.ranks == 1 else [*found, _rendezvous(launcher)]


def _rendezvous(launcher: Launcher) -> Finding:
    if launcher.nodes == 1:
        return _port(launcher.port, "--main_process_port 0 (any free one)")
    if launcher.host in ("localhost", "127.0.0.1"):
        found = _port(launcher.port, "--main_process_port PORT, the same on all nodes")
        advice = "on each node pass --main_process_ip HOST, the host of --machine_rank 0"
        text = f"{found.text}; main_process_ip is {launcher.host}, each node would wait for its own rank 0"
        return found if found.state == "error" else Finding(found.name, text, "warning", advice)
    try:
        local = _is_local(launcher.host)
    except OSError:
        advice = "correct main_process_ip, or make it resolvable on every node"
        return Finding("port", f"main_process_ip {launcher.host} does not resolve on this host", "error", advice)
    if local:
        return _port(launcher.port, "--main_process_port PORT, the same on all nodes")
    return Finding("port", f"{launcher.port} on {launcher.host}, another host: run the doctor there too")


def _is_local(host: str) -> bool:
    """Return whether a name or address belongs to this host. Raises OSError for a name that does not resolve."""
    for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind) as probe:
                probe.bind(address)
            return True
        except OSError:
            continue
    return False


def _port(port: int, alternative: str) -> Finding:
    """Check that a port is free. alternative: the option that selects another one, for the advice."""
    if port == 0:
        return Finding("port", "any free one")
    # Bind like the rendezvous store: to all addresses, even while old connections are closing.
    for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((any_address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return Finding(
                    "port", f"{port} is in use{_holder(port)}", "error", f"stop that program, or pass {alternative}"
                )
            if error.errno == errno.EACCES:
                return Finding("port", f"{port} needs root", "error", f"pass {alternative}, 1024 or above")
        except OverflowError:
            return Finding("port", f"{port} is not a port", "error", f"pass {alternative}")
    return Finding("port", f"{port} is free")


def _holder(port: int) -> str:
    """Name the program that listens on a port, if this user may see it."""
    psutil = try_import("psutil")
    if psutil is None:
        return ""
    try:
        for each in psutil.net_connections("tcp"):
            if each.laddr and each.laddr.port == port and each.status == psutil.CONN_LISTEN and each.pid:
                return f" by {psutil.Process(each.pid).name()}, process {each.pid}"
    except (psutil.Error, OSError):
        pass
    return ""
