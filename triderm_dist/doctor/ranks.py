"""Compare the ranks on which the doctor is started, and check that they reach each other.

The ranks connect to a key-value store, so that a rank without an answer can be named. Each writes its host, software,
devices and shards; then all of them all-reduce a buffer, as training all-reduces gradients. Rank 0 compares, prints,
and decides the exit code of all ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from triderm_dist.config import Experiment
from triderm_dist.doctor import host_findings
from triderm_dist.doctor.data import open_shards
from triderm_dist.doctor.findings import Finding, try_import
from triderm_dist.doctor.software import installed
from triderm_dist.schema import InputError

BUCKET_MIB = 25
"""Size of the all-reduced buffer, as DDP's gradient buckets."""
CLOCK_SECONDS = 2.0
"""Difference in seconds between the clocks of two hosts above which it is reported."""
EXAMINATION_SECONDS = 600.0
"""Seconds that the other ranks wait while rank 0 makes the remaining checks."""
EXIT_SECONDS = 5.0
"""Seconds that rank 0 waits for the others before all exit."""
MAX_NAMED_HOSTS = 6
"""Hosts that are printed by name; of the others only the number is."""


@dataclass(frozen=True)
class RankReport:
    """The state of one rank.

    shards: number of lesions and fingerprint, or if they are not `readable` the reason; empty if nothing is
    packed yet. gpus: of its host. problems: findings of its host that are not ok, from local rank 0 only.
    """

    host: str
    shards: str
    readable: bool
    software: dict[str, str]
    gpu: str
    gpus: int
    local_rank: int
    problems: list[dict[str, str]]


def started_on_ranks() -> bool:
    """Return whether a launcher started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_ranks(experiment: Experiment, seconds: float) -> tuple[Rendezvous, list[Finding]]:
    """Return rank 0's rendezvous and findings; on the other ranks do not return, but exit with rank 0's code.

    seconds: limit for every answer and for the all-reduce. Raises InputError on a rank that cannot reach rank 0.
    """
    rendezvous = Rendezvous(seconds)
    hosts = rendezvous.gather("host", socket.gethostname(), range(rendezvous.world))
    gathered = rendezvous.gather("report", asdict(inspect_rank(experiment)), hosts)
    reports = {rank: RankReport(**raw) for rank, raw in gathered.items()}
    complete = rendezvous.broadcast("complete", len(reports) == rendezvous.world, 3 * seconds)
    timings = rendezvous.gather("timing", time_all_reduce(rendezvous, seconds), reports) if complete else {}
    if rendezvous.rank:
        rendezvous.exit_with_rank_0(rendezvous.receive("status", EXAMINATION_SECONDS))
    return rendezvous, compare(rendezvous, hosts, reports, timings)


class Rendezvous:
    """The key-value store at MASTER_ADDR:MASTER_PORT. Raises InputError if it cannot be reached."""

    def __init__(self, seconds: float) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise each timeout prints a warning
        from torch.distributed import PrefixStore, TCPStore

        self.rank, self.world, self.seconds = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), seconds
        self.address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=self.rank == 0 and not hosted_by_launcher,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            raise self._unreachable(error) from None
        self.store = PrefixStore("doctor", store)

    def gather(self, key: str, value: Any, ranks: Iterable[int]) -> dict[int, Any]:
        """Publish a value of this rank. Returns the values of `ranks` that answer in time on rank 0, {} on others."""
        self._set(f"{key} {self.rank}", value)
        if self.rank:
            return {}
        names = {rank: f"{key} {rank}" for rank in ranks}
        with contextlib.suppress(RuntimeError):  # ranks that did not answer are left out below
            self.store.wait(list(names.values()), timedelta(seconds=self.seconds))
        return {rank: self._get(name) for rank, name in names.items() if self.store.check([name])}

    def broadcast(self, key: str, value: Any, seconds: float) -> Any:
        """Return rank 0's `value` on all ranks."""
        if self.rank == 0:
            self._set(key, value)
            return value
        return self.receive(key, seconds)

    def receive(self, key: str, seconds: float) -> Any:
        """Wait for a value that rank 0 sets. Raises InputError if it does not come."""
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return self._get(key)
        except RuntimeError as error:
            raise self._unreachable(error) from None

    def exit_all(self, status: int) -> NoReturn:
        """On rank 0: exit all ranks with this code, once everything is printed.

        All exit together, since a launcher kills the others when the first one fails. Uses os._exit, since a thread may
        hang in an all-reduce.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        self._set("status", status)
        waiting_for = [f"ready {rank}" for rank in range(1, self.world) if self.store.check([f"host {rank}"])]
        with contextlib.suppress(RuntimeError):
            self.store.wait(waiting_for, timedelta(seconds=EXIT_SECONDS))
        self._set("exit", True)
        os._exit(status)

    def exit_with_rank_0(self, status: int) -> NoReturn:
        """On the other ranks: exit when rank 0 does."""
        self._set(f"ready {self.rank}", True)
        with contextlib.suppress(RuntimeError):  # rank 0, which may host the store, has exited
            self.store.wait(["exit"], timedelta(seconds=EXIT_SECONDS))
        os._exit(status)

    def _set(self, key: str, value: Any) -> None:
        try:
            self.store.set(key, json.dumps(value))
        except RuntimeError as error:
            raise self._unreachable(error) from None

    def _get(self, key: str) -> Any:
        return json.loads(self.store.get(key))

    def _unreachable(self, error: RuntimeError) -> InputError:
        return InputError(
            f"rank {self.rank} on {socket.gethostname()} cannot reach rank 0 at {self.address} ({_first_line(error)}); "
            "check that the host is up, its name is right, and the port is open between the nodes"
        )


# --- one rank --------------------------------------------------------------------------------------------------------


def inspect_rank(experiment: Experiment) -> RankReport:
    """Return the state of this rank."""
    torch, local_rank = try_import("torch"), int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    where, named = experiment.train_shards, experiment.data.shards
    packed = open_shards(where, experiment.data) if named or Path(where).exists() else ""
    shards = packed if isinstance(packed, str) else f"{len(packed)} lesions, index {packed.fingerprint[:12]}"
    sections = host_findings(experiment) if local_rank == 0 and os.environ["RANK"] != "0" else {}
    return RankReport(
        host=socket.gethostname(),
        shards=shards,
        readable=not isinstance(packed, str),
        software=_software(gpus > 0),
        gpu=torch.cuda.get_device_name(local_rank) if local_rank < gpus else "",
        gpus=gpus,
        local_rank=local_rank,
        problems=[asdict(each) for section in sections.values() for each in section if each.state != "ok"],
    )


def _software(gpu: bool) -> dict[str, str]:
    versions = {"Python": platform.python_version(), "triderm_dist's code": _code()}
    for name in ("torch", "accelerate", "deepspeed"):
        found = installed(name)
        versions[name] = found[1] if found else "none"
    if gpu:
        versions["NCCL"] = ".".join(map(str, try_import("torch").cuda.nccl.version()))
    return versions


def _code() -> str:
    """Return a hash of the library's source."""
    library, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(library.rglob("*.py")):
        digest.update(str(path.relative_to(library)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def time_all_reduce(rendezvous: Rendezvous, seconds: float) -> dict[str, Any]:
    """All-reduce `BUCKET_MIB` by gloo and, with GPUs, by NCCL.

    Returns the seconds by backend, `clock` (time after the first all-reduce), and `error` if there was one.
    """
    result: dict[str, Any] = {}
    thread = threading.Thread(target=_all_reduce, args=(rendezvous, seconds, result), daemon=True)
    thread.start()
    thread.join(seconds)  # a thread that hangs in C++ cannot be stopped
    if thread.is_alive():
        result["error"] = f"did not end within {seconds:g} s"
    return dict(result)


def _all_reduce(rendezvous: Rendezvous, seconds: float, result: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    try:
        # Far above the limit of `time_all_reduce`, since NCCL aborts the process when it times out.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            # A separate connection, since one that waits blocks its other users.
            store=dist.PrefixStore("all-reduce", rendezvous.store.clone()),
            rank=rendezvous.rank,
            world_size=rendezvous.world,
            timeout=timedelta(seconds=10 * seconds),
        )
        for name in ("gloo", "NCCL") if gpu else ("gloo",):
            device = torch.device("cpu" if name == "gloo" else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            numbers = torch.ones(BUCKET_MIB * 2**20 // 4, device=device)
            for _ in range(2):  # the first one connects
                started = time.perf_counter()
                dist.all_reduce(numbers)
                total = float(numbers[0])  # synchronizes with the device
                elapsed = time.perf_counter() - started
                result.setdefault("clock", time.time())
            if total != rendezvous.world**2:
                raise RuntimeError(f"the all-reduce of {name} returned a wrong sum")
            result[name] = elapsed
    except Exception as error:  # all errors of a backend are reported
        result["error"] = _first_line(error)


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(
    rendezvous: Rendezvous,
    hosts: Mapping[int, str],
    reports: Mapping[int, RankReport],
    timings: Mapping[int, Mapping[str, Any]],
) -> list[Finding]:
    """Return the differences between ranks, given the host, report and timing that each published."""

    def named(ranks: Iterable[int]) -> str:
        return name_ranks(ranks, hosts)

    found = [Finding("ranks", f"{rendezvous.world}: {named(hosts)}")]
    if absent := [rank for rank in range(rendezvous.world) if rank not in hosts]:
        text = f"{named(absent)} did not connect to {rendezvous.address} within {rendezvous.seconds:g} s"
        advice = "see the output of that node; check that it reaches that host and port; answer_seconds=60 waits longer"
        found.append(Finding("answers", text, "error", advice))
    if silent := [rank for rank in hosts if rank not in reports]:
        text = f"{named(silent)} connected, but sent no report within {rendezvous.seconds:g} s"
        advice = "a network mount that does not respond hangs like this: try `ls` of data.shards on that node"
        found.append(Finding("answers", text, "error", advice))
    found += [_shards(reports, named), _same_software(reports, named), _gpus(reports, named)]
    if len(reports) == rendezvous.world:
        found += [_all_reduce_finding(rendezvous, timings, named), *_clocks(timings, named)]
    for report in reports.values():
        if report.host != hosts[0] and report.local_rank == 0:
            problems = [Finding(**raw) for raw in report.problems]  # type: ignore[arg-type]
            found += [Finding(f"{report.host}: {each.name}", each.text, each.state, each.advice) for each in problems]
    return found


def name_ranks(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Name ranks by host, as in `ranks 0-3 on node-a, rank 7 on node-b`."""
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(hosts.get(rank, "an unknown host"), []).append(rank)
    names = [f"rank{'s' * (len(own) > 1)} {_ranges(own)} on {host}" for host, own in by_host.items()]
    more = len(names) - MAX_NAMED_HOSTS
    return ", ".join(names[:MAX_NAMED_HOSTS]) + (f" and on {more} more host(s)" if more > 0 else "")


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


Namer = Callable[[Iterable[int]], str]


def _differing(values: Mapping[int, str], named: Namer) -> str:
    """Name the ranks whose value differs from that of rank 0, with the values; empty if none does."""
    groups: dict[str, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    others = {value: ranks for value, ranks in groups.items() if value != values[0]}
    if not others:
        return ""
    return "; ".join(f"{named(ranks)}: {value}" for value, ranks in [(values[0], [0]), *others.items()])


def _shards(reports: Mapping[int, RankReport], named: Namer) -> Finding:
    values = {rank: report.shards or "nothing packed yet" for rank, report in reports.items()}
    if text := _differing(values, named):
        advice = "data.shards must be a folder that all nodes share, a copy of it on each, or a URL"
        return Finding("shards", text, "error", advice)
    if not reports[0].shards:
        return Finding("shards", "nothing packed yet, so nothing to compare")
    if not reports[0].readable:
        return Finding("shards", "no rank can read them: see `training`", "warning", "")
    return Finding("shards", f"{values[0]}: the same on {named(reports)}")


def _same_software(reports: Mapping[int, RankReport], named: Namer) -> Finding:
    keys = list(dict.fromkeys(key for report in reports.values() for key in report.software))
    texts = {
        key: _differing({rank: report.software.get(key, "none") for rank, report in reports.items()}, named)
        for key in keys
    }
    if text := "; ".join(f"{key} {text}" for key, text in texts.items() if text):
        return Finding("software", text, "error", "install the same versions on every node")
    return Finding("software", f"{', '.join(keys)}: the same on {named(reports)}")


def _gpus(reports: Mapping[int, RankReport], named: Namer) -> Finding:
    without = [rank for rank, report in reports.items() if not report.gpu]
    if len(without) == len(reports):
        return Finding("GPUs", "none: the ranks run on the CPU")
    if without:
        advice = "set --num_processes to the number of GPUs; each node must have the same number"
        return Finding("GPUs", f"none for {named(without)}, while others have one", "error", advice)
    if text := _differing({rank: report.gpu for rank, report in reports.items()}, named):
        return Finding("GPUs", text, "warning", "the slowest GPU limits the speed, the smallest the micro-batch")
    return Finding("GPUs", f"one {reports[0].gpu} per rank")


def _all_reduce_finding(rendezvous: Rendezvous, timings: Mapping[int, Mapping[str, Any]], named: Namer) -> Finding:
    title = "all-reduce"
    advice = "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME select the network interface; NCCL_DEBUG=INFO logs details"
    if silent := [rank for rank in range(rendezvous.world) if rank not in timings]:
        return Finding(title, f"{named(silent)} stopped answering during it", "error", advice)
    if errors := {rank: each["error"] for rank, each in timings.items() if "error" in each}:
        by_error: dict[str, list[int]] = {}
        for rank, error in errors.items():
            done = [name for name in ("gloo", "NCCL") if name in timings[rank]]
            by_error.setdefault(f"{'NCCL' if done else 'gloo'}: {error}", []).append(rank)
        text = "; ".join(f"{named(ranks)}: {error}" for error, ranks in by_error.items())
        return Finding(title, text, "error", advice)
    slowest = {name: max(each[name] for each in timings.values()) for name in ("gloo", "NCCL") if name in timings[0]}
    text = ", ".join(f"{elapsed * 1e3:,.0f} ms by {name}" for name, elapsed in slowest.items())
    return Finding(title, f"{BUCKET_MIB} MiB over {rendezvous.world} ranks in {text}")


def _clocks(timings: Mapping[int, Mapping[str, Any]], named: Namer) -> list[Finding]:
    clocks = {rank: each["clock"] for rank, each in timings.items() if "clock" in each}
    if 0 not in clocks:
        return []
    apart = {rank: clock - clocks[0] for rank, clock in clocks.items()}
    off = {rank: seconds for rank, seconds in apart.items() if abs(seconds) > CLOCK_SECONDS}
    if not off:
        return [Finding("clocks", f"less than {CLOCK_SECONDS:g} s apart")]
    worst = max(off.values(), key=abs)
    text = f"{named(off)}: {worst:+.1f} s from rank 0; the limit is {CLOCK_SECONDS:g} s"
    return [Finding("clocks", text, "warning", "synchronize them by NTP (timedatectl set-ntp true, chronyc makestep)")]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
