"""What 1,024 ranks do on a file system at the start and in an epoch: operations counted for the first rank of all, the
first of another node and any other one, and summed over all ranks.

python -m benchmarks.rank_files [world=1024] [lesions=10000000]

A rank opens a simulated set whose photos are holes in sparse files, assigns folds, plans an epoch, and reads the photos
of its part in the order of the plan, as a training does, without decoding them. It runs under strace (Linux), which
counts the system calls on files of the set, and on those of the node's own disk: the cache of remote shards, and
columns that the ranks of a node share. Opens and stats go by path; MB are those read, without pages of mapped files.

The set lies on a network disk, with and without a window of shuffling, or behind a URL: there a shard is fetched as a
hole of its size, and requests are counted. The ranks start one after the other, so nobody waits for another's files,
but the first of a node runs on, as it does in a training: what a node checks once is checked as long. The last line is
one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from benchmarks.simulated_set import write_simulated_set
from triderm_dist.cli import run
from triderm_dist.settings import Section

PHASES = ("open", "plan", "read")
KINDS = ("opens", "stats", "reads", "MB", "requests")
ROLES = ("first rank", "first of a node", "another rank", "all ranks")
_MARK = "/benchmarks.rank_files/"
"""A path that does not exist; a rank looks for PATH/PHASE where a phase begins."""
_CALL = re.compile(r"^\d+ +(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_STATS = ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2")
_READS = ("read", "pread64", "readv", "preadv")


class RankFiles(Section):
    world: int = Field(1024, ge=2, description="simulated ranks")
    per_node: int = Field(8, ge=2, description="ranks of a node")
    lesions: int = Field(10_000_000, ge=1000, description="lesions of the set")
    shard_samples: int = Field(512, ge=1, description="lesions a shard")
    per_rank: int = Field(8, ge=1, description="lesions per rank and step")
    window: int = Field(131_072, ge=1, description="train.sampling.window of the case with a window")
    cases: list[Literal["folder", "window", "url"]] = Field(
        ["folder", "window", "url"], description="what is simulated"
    )
    scratch: str | None = Field(None, description="folder for written files; null takes the system's temporary folder")
    output: Path | None = Field(None, description="JSON file of all counts")
    case: str | None = Field(None, description="internal: be one rank of this case")


def main(config: RankFiles) -> None:
    if config.case:
        return as_rank(config, Path(config.scratch or "."))
    if not shutil.which("strace"):
        sys.exit("strace: not installed; this program counts system calls with it")
    results: dict[str, dict[str, Mapping[str, Counter[str]]]] = {}
    with tempfile.TemporaryDirectory(dir=config.scratch) as name:
        folder = Path(name)
        write_simulated_set(folder / "set", config.lesions, config.shard_samples)
        nodes = config.world // config.per_node
        each = {0: 1, config.per_node: nodes - 1, config.per_node + 1: config.world - nodes}  # how many each stands for
        for case in config.cases:
            found: list[dict[str, Counter[str]]] = []
            for ranks in ((0,), (config.per_node, config.per_node + 1)):  # of two nodes, whose disks are empty
                shutil.rmtree(folder / "node", ignore_errors=True)
                (folder / "node").mkdir()
                with contextlib.ExitStack() as running:
                    found += [running.enter_context(counted(config, case, rank, folder)) for rank in ranks]
            total: dict[str, Counter[str]] = {}
            for own, count in zip(found, each.values(), strict=True):
                for where, counts in own.items():
                    for key, value in counts.items():
                        total.setdefault(where, Counter())[key] += value * count
            results[case] = dict(zip(ROLES, [*found, total], strict=True))
            print_table(case, results[case])
    if config.output:
        config.output.write_text(json.dumps({"settings": config.model_dump(mode="json"), "cases": results}, indent=1))
    at_start = results[config.cases[0]][ROLES[-1]]
    phases = [at_start.get(f"set, {phase}", Counter()) for phase in ("open", "plan")]
    print(json.dumps({"world": config.world, "lesions": config.lesions, **{
        f"start_{kind}": round(sum(counts[kind] for counts in phases))
        for kind in KINDS
    }}))  # fmt: skip


@contextlib.contextmanager
def counted(config: RankFiles, case: str, rank: int, folder: Path) -> Iterator[dict[str, Counter[str]]]:
    """Run one rank under strace; return its counts by place (set or node) and phase, which are filled when it ends, at
    the end of the context.
    """
    trace = folder / f"trace-{rank}.txt"
    words = [f"{key}={getattr(config, key)}" for key in ("world", "per_node", "shard_samples", "per_rank", "window")]
    command = [
        "strace", "-f", "--seccomp-bpf", "-qq", "-y", "-s", "0", "-o", str(trace), "-e",
        f"trace=open,openat,{','.join((*_STATS, *_READS))}", "-e", "signal=none",
        sys.executable, "-m", "benchmarks.rank_files", f"case={case}", f"scratch={folder}", *words,
    ]  # fmt: skip
    variables = {"RANK": rank, "LOCAL_RANK": rank % config.per_node, "WORLD_SIZE": config.world,
                 "LOCAL_WORLD_SIZE": config.per_node, "XDG_CACHE_HOME": folder / "node"}  # fmt: skip
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    counts: dict[str, Counter[str]] = {}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        requests = next((line for line in process.stdout if line.startswith("{")), None)
        if requests is not None:
            yield counts
        process.stdin.close()
    if process.returncode or requests is None:
        sys.exit(f"rank {rank} of case {case} ended with {process.returncode}")
    with trace.open(errors="replace") as file:
        # Behind a URL the files of the set are requests, which the rank counts.
        places = {} if case == "url" else {"set": f"{folder}/set/"}
        counts.update(count_calls(file, {**places, "node": f"{folder}/node/"}))
    trace.unlink()
    for phase, made in json.loads(requests).items():
        if made:
            counts.setdefault(f"set, {phase}", Counter()).update(made)


def count_calls(lines: Iterable[str], places: Mapping[str, str]) -> dict[str, Counter[str]]:
    """Count the calls of a trace by place, the beginning of a path, and phase."""
    counts: dict[str, Counter[str]] = {}
    phase = None
    for line in lines:
        if _MARK in line:
            phase = line.split(_MARK)[1].split('"')[0]
        place = next((name for name, path in places.items() if path in line), None)
        if place is None or phase not in PHASES or not (call := _CALL.match(line)):
            continue
        own, name = counts.setdefault(f"{place}, {phase}", Counter()), call["name"]
        if name in _READS:
            own["reads"] += 1
            own["MB"] += max(int(call["result"]), 0) / 1e6  # type: ignore[assignment]
        elif name in ("open", "openat"):
            own["opens"] += 1
        elif "AT_EMPTY_PATH" not in call["arguments"]:
            own["stats"] += 1
    return counts


def print_table(case: str, found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    print(f"\n{case:<40}" + "".join(f"{kind:>10}" for kind in KINDS))
    places = sorted({where for counts in found.values() for where in counts}, key=_order)
    for where in places:
        for role in ROLES:
            cells = (_short(found[role].get(where, {}).get(kind, 0)) for kind in KINDS)
            print(f"{where:<14}{role:<26}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def _order(where: str) -> tuple[int, bool]:
    place, phase = where.split(", ")
    return PHASES.index(phase), place == "node"


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.3g}" if value < 10 else f"{value:.0f}"


def as_rank(config: RankFiles, folder: Path) -> None:
    """Open, plan and read as the rank that the environment names; print the requests of each phase, and end when
    standard input does.
    """
    from triderm_dist.config import DataConfig, RemoteConfig
    from triderm_dist.data.photo_source import PhotoSource
    from triderm_dist.data.plan import EpochPlan, Samples, Sampling
    from triderm_dist.data.shards import remote
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.data.shards.remote import Store
    from triderm_dist.engine.fold import assigned_folds

    requests = {phase: Counter[str]() for phase in PHASES}
    now = PHASES[0]

    def begin(phase: str) -> None:
        nonlocal now
        now = phase
        os.path.exists(f"{_MARK}{phase}")

    download = Store._download

    def fetch_hole(store: Any, file: Any, path: Path, deadline: float, stop: Any) -> None:
        requests[now]["requests"] += 1
        requests[now]["MB"] += max(file.bytes, 0) / 1e6
        if not file.url.endswith(".tar"):
            return download(store, file, path, deadline, stop)
        with path.open("wb") as hole:
            hole.truncate(file.bytes)

    Store._download = fetch_hole  # type: ignore[assignment,method-assign]
    check = remote._check
    remote._check = lambda path, file: None if file.url.endswith(".tar") else check(path, file)

    rank, world = int(os.environ["RANK"]), config.world
    where = f"file://{folder}/set" if config.case == "url" else f"{folder}/set"
    begin("open")
    index = open_index(where, RemoteConfig(cache=f"{folder}/node/cache", cache_gb=100_000))
    begin("plan")
    folds = assigned_folds(index, DataConfig())
    samples = Samples.of(index, np.flatnonzero(folds > 0))
    sampling = Sampling("shuffle", window=config.window if config.case == "window" else None)
    batches = EpochPlan(samples, sampling, 0, 0).batches(rank, world, config.per_rank * world)
    first = next(iter(batches))
    index.inputs(first.rows)
    source = PhotoSource(index, 224, (0.5,) * 3, (0.5,) * 3)
    begin("read")
    with source.read_ahead(batches.rows_ahead if index.remote else np.empty(0, np.int64), batches.part * world) as done:
        for number, batch in enumerate(batches):
            for shard, offsets, sizes in source.locate(batch.rows):
                source.shards.read(shard, min(offsets), sum(sizes))
            done(number + 1)
    source.close()
    begin("end")
    print(json.dumps(requests), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    run(RankFiles, main, __doc__)
