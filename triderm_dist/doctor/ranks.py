"""What the ranks that the doctor is started on see, and whether they reach one another.

They meet in a key-value store, where one that does not answer can be named: each leaves there what it sees of shards,
software and devices. Then all sum numbers as training sums gradients. Rank 0 compares, prints, and tells the exit
status with which all leave.
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
from triderm_dist.doctor import this_host
from triderm_dist.doctor.data import open_shards
from triderm_dist.doctor.findings import Finding, imported
from triderm_dist.doctor.software import installed
from triderm_dist.schema import InputError

BUCKET_MIB = 25
"""What the ranks sum: as much as a bucket of DDP's gradients."""
CLOCK_SECONDS = 2.0
"""Clocks of two hosts may be this far apart; more is told."""
EXAMINATION_SECONDS = 600.0
"""How long the other ranks wait for rank 0 to look at the rest."""
LEAVING_SECONDS = 5.0
MANY_HOSTS = 6
"""More are counted, not named."""


@dataclass(frozen=True)
class Sight:
    """What one rank sees. shards: number of lesions and fingerprint, or why they can't be read (`readable`); empty
    where nothing is packed yet.  gpus: on its host.  troubles: findings of its host that are not ok, told once a host.
    """

    host: str
    shards: str
    readable: bool
    software: dict[str, str]
    gpu: str
    gpus: int
    local_rank: int
    troubles: list[dict[str, str]]


def started_on_ranks() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def meet(experiment: Experiment, seconds: float) -> tuple[Meeting, list[Finding]]:
    """Rank 0's meeting and findings; the other ranks never return, they leave as rank 0 tells them.

    seconds: within which every rank must answer, and the sums must be made. Raises InputError on a rank that does not
    reach rank 0.
    """
    meeting = Meeting(seconds)
    hosts = meeting.tell("host", socket.gethostname(), range(meeting.world))
    told = meeting.tell("sight", asdict(look(experiment)), hosts)
    sights = {rank: Sight(**raw) for rank, raw in told.items()}
    together = meeting.agree(len(sights) == meeting.world)
    sums = meeting.tell("sums", exchange(meeting, seconds), sights) if together else {}
    if meeting.rank:
        meeting.leave(meeting.hear("status", EXAMINATION_SECONDS))
    return meeting, compare(meeting, hosts, sights, sums)


class Meeting:
    """The ranks around a key-value store at MASTER_ADDR:MASTER_PORT. Raises InputError where it is not reached."""

    def __init__(self, seconds: float) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each wait that ends without answer would be a warning
        from torch.distributed import PrefixStore, TCPStore

        self.rank, self.world, self.seconds = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), seconds
        self.place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        launcher_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=self.rank == 0 and not launcher_holds_it,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            raise self._lost(error) from None
        self.store = PrefixStore("doctor", store)

    def tell(self, what: str, mine: Any, ranks: Iterable[int]) -> dict[int, Any]:
        """Leave something of this rank. Rank 0 gets that of those `ranks` that answer in time, the others nothing."""
        self._set(f"{what} {self.rank}", mine)
        if self.rank:
            return {}
        names = {rank: f"{what} {rank}" for rank in ranks}
        with contextlib.suppress(RuntimeError):  # who is missing is seen below
            self.store.wait(list(names.values()), timedelta(seconds=self.seconds))
        return {rank: self._get(name) for rank, name in names.items() if self.store.check([name])}

    def agree(self, decision: bool) -> bool:
        """Rank 0's decision, on all ranks."""
        if self.rank == 0:
            self._set("decision", decision)
            return decision
        return self.hear("decision", 3 * self.seconds)

    def hear(self, what: str, seconds: float) -> Any:
        """What rank 0 has set, waiting for it."""
        try:
            self.store.wait([what], timedelta(seconds=seconds))
            return self._get(what)
        except RuntimeError as error:
            raise self._lost(error) from None

    def end(self, status: int) -> NoReturn:
        """On rank 0: let all ranks leave with this exit status, once everything is printed.

        All leave together, since a launcher ends the others when the first one fails; and at once, since a thread may
        hang in a sum.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        self._set("status", status)
        answering = [f"ready {rank}" for rank in range(1, self.world) if self.store.check([f"host {rank}"])]
        with contextlib.suppress(RuntimeError):
            self.store.wait(answering, timedelta(seconds=LEAVING_SECONDS))
        self._set("gone", True)
        os._exit(status)

    def leave(self, status: int) -> NoReturn:
        """On the other ranks: leave with rank 0."""
        self._set(f"ready {self.rank}", True)
        with contextlib.suppress(RuntimeError):  # rank 0, which may hold the store, has left
            self.store.wait(["gone"], timedelta(seconds=LEAVING_SECONDS))
        os._exit(status)

    def _set(self, key: str, value: Any) -> None:
        try:
            self.store.set(key, json.dumps(value))
        except RuntimeError as error:
            raise self._lost(error) from None

    def _get(self, key: str) -> Any:
        return json.loads(self.store.get(key))

    def _lost(self, error: RuntimeError) -> InputError:
        return InputError(
            f"rank {self.rank} on {socket.gethostname()} does not reach rank 0 at {self.place} ({_first_line(error)}); "
            "is that host up, its name right, and the port open between the nodes?"
        )


# --- what a rank sees ------------------------------------------------------------------------------------------------


def look(experiment: Experiment) -> Sight:
    """What this rank sees."""
    torch, local_rank = imported("torch"), int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    where, named = experiment.train_shards, experiment.data.shards
    packed = open_shards(where, experiment.data) if named or Path(where).exists() else ""
    shards = packed if isinstance(packed, str) else f"{len(packed)} lesions, index {packed.fingerprint[:12]}"
    sections = this_host(experiment) if local_rank == 0 and os.environ["RANK"] != "0" else {}
    return Sight(
        host=socket.gethostname(),
        shards=shards,
        readable=not isinstance(packed, str),
        software=_software(gpus > 0),
        gpu=torch.cuda.get_device_name(local_rank) if local_rank < gpus else "",
        gpus=gpus,
        local_rank=local_rank,
        troubles=[asdict(each) for section in sections.values() for each in section if each.state != "ok"],
    )


def _software(gpu: bool) -> dict[str, str]:
    versions = {"Python": platform.python_version(), "triderm_dist's code": _code()}
    for name in ("torch", "accelerate", "deepspeed"):
        found = installed(name)
        versions[name] = found[1] if found else "none"
    if gpu:
        versions["NCCL"] = ".".join(map(str, imported("torch").cuda.nccl.version()))
    return versions


def _code() -> str:
    """A fingerprint of the library's source."""
    library, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(library.rglob("*.py")):
        digest.update(str(path.relative_to(library)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def exchange(meeting: Meeting, seconds: float) -> dict[str, Any]:
    """Sum `BUCKET_MIB` of numbers over all ranks by gloo and, with GPUs, by NCCL: seconds by name, the clock when the
    ranks had met, and an error if there was one.
    """
    result: dict[str, Any] = {}
    thread = threading.Thread(target=_sum, args=(meeting, seconds, result), daemon=True)
    thread.start()
    thread.join(seconds)  # what hangs in C++ can't be stopped, only left
    if thread.is_alive():
        result["error"] = f"did not end within {seconds:g} s"
    return dict(result)


def _sum(meeting: Meeting, seconds: float, result: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    try:
        # A limit far beyond ours: at its own, NCCL would end the whole process.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore("sums", meeting.store.clone()),  # a connection that waits is no one else's
            rank=meeting.rank,
            world_size=meeting.world,
            timeout=timedelta(seconds=10 * seconds),
        )
        for name in ("gloo", "NCCL") if gpu else ("gloo",):
            device = torch.device("cpu" if name == "gloo" else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            numbers = torch.ones(BUCKET_MIB * 2**20 // 4, device=device)
            for _ in range(2):  # the first also connects
                started = time.perf_counter()
                dist.all_reduce(numbers)
                total = float(numbers[0])  # waits for the device
                took = time.perf_counter() - started
                result.setdefault("clock", time.time())
            if total != meeting.world**2:
                raise RuntimeError(f"{name} summed wrongly")
            result[name] = took
    except Exception as error:  # whatever a backend raises is the finding
        result["error"] = _first_line(error)


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(
    meeting: Meeting, hosts: Mapping[int, str], sights: Mapping[int, Sight], sums: Mapping[int, Mapping[str, Any]]
) -> list[Finding]:
    """What differs between ranks, from what each has told: its host, its sight, its sums."""

    def named(ranks: Iterable[int]) -> str:
        return name_ranks(ranks, hosts)

    found = [Finding("ranks", f"{meeting.world}: {named(hosts)}")]
    if absent := [rank for rank in range(meeting.world) if rank not in hosts]:
        text = f"{named(absent)} did not come to {meeting.place} within {meeting.seconds:g} s"
        advice = "see that node's output; does it reach that host and port? answer_seconds=60 waits longer"
        found.append(Finding("answers", text, "missing", advice))
    if silent := [rank for rank in hosts if rank not in sights]:
        text = f"{named(silent)} started, but did not tell within {meeting.seconds:g} s what it sees"
        advice = "a network mount that does not answer hangs like this: try `ls` of data.shards there"
        found.append(Finding("answers", text, "missing", advice))
    found += [_shards(sights, named), _same_software(sights, named), _gpus(sights, named)]
    if len(sights) == meeting.world:
        found += [_sums(meeting, sums, named), *_clocks(sums, named)]
    for sight in sights.values():
        if sight.host != hosts[0] and sight.local_rank == 0:
            troubles = [Finding(**raw) for raw in sight.troubles]  # type: ignore[arg-type]
            found += [Finding(f"{sight.host}: {each.name}", each.text, each.state, each.advice) for each in troubles]
    return found


def name_ranks(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Such as `ranks 0-3 on node-a, rank 7 on node-b`."""
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(hosts.get(rank, "an unknown host"), []).append(rank)
    names = [f"rank{'s' * (len(own) > 1)} {_ranges(own)} on {host}" for host, own in by_host.items()]
    more = len(names) - MANY_HOSTS
    return ", ".join(names[:MANY_HOSTS]) + (f" and those on {more} more host(s)" if more > 0 else "")


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
    """Who has another value than rank 0 and which, or nothing."""
    groups: dict[str, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    others = {value: ranks for value, ranks in groups.items() if value != values[0]}
    if not others:
        return ""
    return "; ".join(f"{named(ranks)}: {value}" for value, ranks in [(values[0], [0]), *others.items()])


def _shards(sights: Mapping[int, Sight], named: Namer) -> Finding:
    values = {rank: sight.shards or "nothing packed yet" for rank, sight in sights.items()}
    if text := _differing(values, named):
        advice = "data.shards has to be a folder that all nodes share, a copy of it on each, or a URL"
        return Finding("shards", text, "missing", advice)
    if not sights[0].shards:
        return Finding("shards", "nothing packed yet, so nothing to compare")
    if not sights[0].readable:
        return Finding("shards", "no rank can read them: see training", "note", "")
    return Finding("shards", f"{values[0]}: the same on {named(sights)}")


def _same_software(sights: Mapping[int, Sight], named: Namer) -> Finding:
    keys = list(dict.fromkeys(key for sight in sights.values() for key in sight.software))
    texts = {
        key: _differing({rank: sight.software.get(key, "none") for rank, sight in sights.items()}, named)
        for key in keys
    }
    if text := "; ".join(f"{key} {text}" for key, text in texts.items() if text):
        return Finding("software", text, "missing", "install the same versions on every node")
    return Finding("software", f"{', '.join(keys)}: the same on {named(sights)}")


def _gpus(sights: Mapping[int, Sight], named: Namer) -> Finding:
    without = [rank for rank, sight in sights.items() if not sight.gpu]
    if len(without) == len(sights):
        return Finding("GPUs", "none: the ranks run on the CPU")
    if without:
        advice = "--num_processes as many as there are GPUs, the same number on each node"
        return Finding("GPUs", f"none for {named(without)}, though others have one", "missing", advice)
    if text := _differing({rank: sight.gpu for rank, sight in sights.items()}, named):
        return Finding("GPUs", text, "note", "the slowest sets the pace, the smallest the micro-batch")
    return Finding("GPUs", f"one {sights[0].gpu} a rank")


def _sums(meeting: Meeting, sums: Mapping[int, Mapping[str, Any]], named: Namer) -> Finding:
    title = "all-reduce"
    advice = "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network to use; NCCL_DEBUG=INFO tells more"
    if lost := [rank for rank in range(meeting.world) if rank not in sums]:
        return Finding(title, f"{named(lost)} fell silent in it", "missing", advice)
    if errors := {rank: each["error"] for rank, each in sums.items() if "error" in each}:
        by_error: dict[str, list[int]] = {}
        for rank, error in errors.items():
            done = [name for name in ("gloo", "NCCL") if name in sums[rank]]
            by_error.setdefault(f"{'NCCL' if done else 'gloo'}: {error}", []).append(rank)
        text = "; ".join(f"{named(ranks)}: {error}" for error, ranks in by_error.items())
        return Finding(title, text, "missing", advice)
    slowest = {name: max(each[name] for each in sums.values()) for name in ("gloo", "NCCL") if name in sums[0]}
    text = ", ".join(f"{took * 1e3:,.0f} ms by {name}" for name, took in slowest.items())
    return Finding(title, f"{BUCKET_MIB} MiB summed over {meeting.world} ranks in {text}")


def _clocks(sums: Mapping[int, Mapping[str, Any]], named: Namer) -> list[Finding]:
    clocks = {rank: each["clock"] for rank, each in sums.items() if "clock" in each}
    if 0 not in clocks:
        return []
    apart = {rank: clock - clocks[0] for rank, clock in clocks.items()}
    off = {rank: seconds for rank, seconds in apart.items() if abs(seconds) > CLOCK_SECONDS}
    if not off:
        return [Finding("clocks", f"less than {CLOCK_SECONDS:g} s apart")]
    worst = max(off.values(), key=abs)
    text = f"{named(off)}: {worst:+.1f} s from rank 0; the limit is {CLOCK_SECONDS:g} s"
    return [Finding("clocks", text, "note", "set them by NTP (timedatectl set-ntp true, chronyc makestep)")]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
