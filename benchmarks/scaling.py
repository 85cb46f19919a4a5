"""Model how fast training is on several GPUs, and print the smallest micro-batch that keeps 90% of their speed.

python -m benchmarks.scaling [key=value ...]

The compute of a step comes from the H200 measurements in benchmarks/results/gpu (`measured_networks`), links from
published ones (`CLUSTERS`). The lesions per GPU are constant (weak scaling). N ranks, P trained weights (R of them
outside blocks), F frozen ones, w bytes of a weight, g of a gradient; a rank sends in a step

    DDP             all-reduce of g P in the backward pass, by buckets
    FSDP2           all-gather of 4 P in the forward pass, of 4 (P - R) in the backward pass, reduce-scatter of g P
    ZeRO 1, 2       all-reduce of g P after the backward pass (one bucket), all-gather of w P after the optimizer's step
    ZeRO 3          all-gather of w (P + F) in the forward pass, of w P in the backward pass, reduce-scatter of g P

An all-reduce of S bytes sends 2 (N-1)/N S, an all-gather or reduce-scatter (N-1)/N S, as NCCL's and gloo's rings do. On
two nodes NCCL takes a tree: S bytes leave a node. The gradients of a backward pass are ready in equal pieces, and are
sent one after the other while it continues; what is not sent at its end, and what comes after it, is waited for.
Communication slows no computation down here, and no rank is late, so measured efficiencies will be lower.

The bytes are counted on real gloo ranks, and compared with the formulas; so are, on ranks that share these cores and
overlap nothing, the seconds of a step: T max(1, N/cores) + 2 (N-1) 4 P / M, with M bytes/s of an all-reduce on 2 ranks.
Last line: one JSON object.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from benchmarks.step import TOWERS, Size, our_network
from triderm_dist.cli import run
from triderm_dist.settings import Section

RESULTS = Path(__file__).parent / "results" / "gpu" / "part1.json"
Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
ROUNDS: dict[Kind, int] = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
"""How often each byte is sent, times (N-1)/N."""
STRATEGIES = ("DDP", "FSDP2", "ZeRO 1, 2", "ZeRO 3")
TARGET = 0.9


@dataclass(frozen=True)
class Network:
    """What a network computes on a GPU and sends.

    trained, outside, frozen: weights; `outside` are trained and in no block.  step: seconds of a step of no lesion
    (optimizer, gaps).  lesion: seconds more of each.  forward: share of the forward pass in them.  fits: lesions whose
    step fits into 80 GB.
    """

    trained: int
    outside: int
    frozen: int
    blocks: int
    step: float
    lesion: float
    forward: float
    fits: int


@dataclass(frozen=True)
class Cluster:
    """nodes of `gpus` GPUs.  inside: bytes/s of a GPU's links within a node.  out: bytes/s of all NICs of a node.
    latency: seconds of an all-reduce of few bytes.
    """

    nodes: int
    gpus: int
    inside: float
    out: float
    latency: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def seconds(self, kind: Kind, size: float) -> float:
        """Return the seconds of a collective of `size` bytes."""
        ring = ROUNDS[kind] * (self.ranks - 1) / self.ranks * size
        leaving = size if kind == "all-reduce" and self.nodes == 2 else ring
        return self.latency + max(ring / self.inside, leaving / self.out if self.nodes > 1 else 0.0)


NVLINK, NIC = 350e9, 0.92 / 8 * 1e9
"""Bytes/s: of a ring over the NVLinks of 8 H100 (350 to 360 GB/s: github.com/NVIDIA/nccl/issues/1281); of a NIC for
each Gb/s (91 of 100 GB/s with four NICs of 200 Gb/s: github.com/NVIDIA/nccl-tests/issues/100; 46 to 48 of 50 GB/s:
nccl-tests/issues/290)."""


def h100_nodes(nodes: int, nics: int = 8, gbit: float = 400, latency: float = 50e-6) -> Cluster:
    """Return nodes of eight H100 with NICs of `gbit` Gb/s. latency: 47 us over InfiniBand (NVIDIA/nccl/issues/1244)."""
    return Cluster(nodes, 8, NVLINK, nics * gbit * NIC, latency if nodes > 1 else 20e-6)


CLUSTERS = {
    "8 GPUs, NVLink": h100_nodes(1),
    "16 GPUs, one 100 Gb/s NIC per node": h100_nodes(2, 1, 100, 160e-6),
    "16 GPUs, one 400 Gb/s NIC per node": h100_nodes(2, 1, 400),
    "16 GPUs, eight 400 Gb/s NICs per node": h100_nodes(2),
    "64 GPUs, one 100 Gb/s NIC per node": h100_nodes(8, 1, 100, 160e-6),
    "64 GPUs, one 400 Gb/s NIC per node": h100_nodes(8, 1, 400),
    "64 GPUs, eight 400 Gb/s NICs per node": h100_nodes(8),
}


@dataclass(frozen=True)
class Exchange:
    """A collective of a step: its kind, bytes, and the part of the step in which it runs."""

    kind: Kind
    size: float
    during: Literal["forward", "backward", "after"]


def exchanges(strategy: str, network: Network, gradient: int = 4, weight: int = 2) -> list[Exchange]:
    """Return the collectives of a step. gradient, weight: bytes of one, `weight` under ZeRO (2 with bf16)."""
    trained = network.trained
    return {
        "DDP": [Exchange("all-reduce", gradient * trained, "backward")],
        "FSDP2": [
            Exchange("all-gather", 4 * trained, "forward"),
            Exchange("all-gather", 4 * (trained - network.outside), "backward"),
            Exchange("reduce-scatter", gradient * trained, "backward"),
        ],
        "ZeRO 1, 2": [
            Exchange("all-reduce", gradient * trained, "after"),
            Exchange("all-gather", weight * trained, "after"),
        ],
        "ZeRO 3": [
            Exchange("all-gather", weight * (trained + network.frozen), "forward"),
            Exchange("all-gather", weight * trained, "backward"),
            Exchange("reduce-scatter", gradient * trained, "backward"),
        ],
    }[strategy]


def sent(of: list[Exchange], ranks: int, gloo: bool = False) -> float:
    """Return the bytes that each rank sends. gloo: which does a reduce-scatter as an all-reduce."""
    rounds = {**ROUNDS, "reduce-scatter": 2} if gloo else ROUNDS
    return sum(rounds[each.kind] * (ranks - 1) / ranks * each.size for each in of)


def step_seconds(
    network: Network, lesions: float, strategy: str, cluster: Cluster, gradient: int = 4, bucket_mb: float = 25.0
) -> float:
    """Return the seconds of a step with `lesions` a GPU."""
    forward = network.forward * network.lesion * lesions
    backward = network.lesion * lesions - forward
    blocks = max(1, network.blocks)
    waited = network.step + 2 * cluster.latency  # loss sums; statistics of batch norms, or the norm of shards
    for each in exchanges(strategy, network, gradient):
        whole = cluster.seconds(each.kind, each.size)
        if each.during == "forward":  # gathered a block ahead
            waited += cluster.seconds(each.kind, each.size / blocks) + max(0.0, whole * (1 - 1 / blocks) - forward)
        elif each.during == "after":
            waited += whole
    behind = [each for each in exchanges(strategy, network, gradient) if each.during == "backward"]
    pieces = blocks
    if strategy == "DDP":
        pieces = max(1, math.ceil(4 * network.trained / (bucket_mb * 2**20)))  # which are rounded afterwards
    done = 0.0
    for number in range(1, pieces + 1):
        piece = sum(cluster.seconds(each.kind, each.size / pieces) for each in behind)
        done = max(done, backward * number / pieces) + piece
    return forward + max(backward, done) + waited


def efficiency(network: Network, lesions: float, strategy: str, cluster: Cluster, gradient: int = 4) -> float:
    """Return the speed of a cluster as a share of that of its GPUs alone, each with `lesions` a step."""
    alone = network.step + network.lesion * lesions
    return alone / step_seconds(network, lesions, strategy, cluster, gradient)


def smallest_micro_batch(network: Network, strategy: str, cluster: Cluster, gradient: int = 4) -> int:
    """Return the fewest lesions a GPU and step that keep 90%, which with gradient accumulation are several
    micro-batches.
    """
    few, many = 0, 1
    while efficiency(network, many, strategy, cluster, gradient) < TARGET:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        enough = efficiency(network, middle, strategy, cluster, gradient) >= TARGET
        few, many = (few, middle) if enough else (middle, many)
    return many


def speed(network: Network, lesions: int, strategy: str, cluster: Cluster, gradient: int = 4) -> float:
    """Return the lesions/s of a cluster with `lesions` a GPU as a multiple of those of one GPU with 96."""
    alone = 96 / (network.step + 96 * network.lesion)
    return cluster.ranks * lesions / step_seconds(network, lesions, strategy, cluster, gradient) / alone


def measured_networks(names: list[str]) -> dict[str, Network]:
    """Return networks of `gpu_cells.MODELS` with the compute that was measured on an H200.

    From the compiled, graphed steps of 12 and 96 lesions (base). Where only that of 96 was measured (large), its time
    is taken in proportion to the lesions; where neither was, the time for which an eager step kept the device busy.
    """
    from benchmarks.gpu_cells import MODELS
    from triderm_dist.config import Experiment, load
    from triderm_dist.monitoring.flops import training_flops
    from triderm_dist.monitoring.memory_estimate import bare_network
    from triderm_dist.tasks import milk10k_task

    cells = json.loads(RESULTS.read_text(encoding="utf-8"))
    concepts = tuple(f"{view}/{number}" for view in ("clinical", "dermoscopic") for number in range(7))
    found = {}
    for name in names:
        file, model = MODELS[name]
        bare, _ = bare_network(load(Experiment, file).models[model], milk10k_task().signature(concepts))
        blocks = [block for block in bare.blocks() if any(each.requires_grad for each in block.parameters())]
        trained = sum(each.numel() for each in bare.parameters() if each.requires_grad)
        inside = sum(each.numel() for block in blocks for each in block.parameters() if each.requires_grad)
        frozen = sum(each.numel() for each in bare.parameters()) - trained
        forward = training_flops(bare, backward=False) / training_flops(bare)
        few, many = (cells.get(f"{name}-{lesions}-compiled-graph") for lesions in (12, 96))
        if few and many:
            lesion = (many["step_ms"] - few["step_ms"]) / 1e3 / 84
            step = few["step_ms"] / 1e3 - 12 * lesion
        else:
            milliseconds = many["step_ms"] if many else cells[f"{name}-96-eager"]["device_ms"]
            step, lesion = 0.0, milliseconds / 1e3 / 96
        fits = int(96 * 76 / cells[f"{name}-96-eager"]["peak_gib"])
        found[name] = Network(trained, trained - inside, frozen, len(blocks), step, lesion, forward, fits)
    return found


class ScalingBenchmark(Section):
    networks: list[str] = Field(["base", "large", "dual_cnn"], description="networks: base, large, dual_cnn")
    lesions: int = Field(96, ge=1, description="lesions a GPU and step, of the efficiencies")
    check: bool = Field(True, description="compare the formulas with real gloo ranks")
    rounds: int = Field(5, ge=2, description="measured steps of each gloo run, after two warm-up steps")


def main(config: ScalingBenchmark) -> None:
    result: dict[str, Any] = {"lesions": config.lesions, "smallest": {}, "efficiency": {}}
    for name, network in measured_networks(config.networks).items():
        alone = network.step + 96 * network.lesion
        print(
            f"\n{name}: {network.trained / 1e6:.1f} million trained weights, {network.frozen / 1e6:.1f} frozen; "
            f"{alone * 1e3:.1f} ms per step of 96 lesions on one H200, {network.forward:.0%} of it forward\n"
            f"lesions a GPU and step that keep {TARGET:.0%}; with {config.lesions}, under DDP, efficiency, and "
            "speed in GPUs with 96"
        )
        many = str(config.lesions)
        columns = [*((strategy, 4) for strategy in STRATEGIES), ("DDP", 2), ("FSDP2", 2)]
        heads = [f"{strategy}{', bf16' if gradient == 2 else ''}" for strategy, gradient in columns]
        print(f"{'':<36}" + "".join(f"{head:>13}" for head in (*heads, many, "speed", f"{many}, bf16", "speed")))
        for where, cluster in CLUSTERS.items():
            few = [smallest_micro_batch(network, strategy, cluster, gradient) for strategy, gradient in columns]
            kept = {g: efficiency(network, config.lesions, "DDP", cluster, g) for g in (4, 2)}
            fast = {g: speed(network, config.lesions, "DDP", cluster, g) for g in (4, 2)}
            numbers = [f"{each:,}{'*' if each > network.fits else ''}" for each in few]
            numbers += [text for g in (4, 2) for text in (f"{kept[g]:.0%}", f"{fast[g]:.1f}")]
            print(f"{where:<36}" + "".join(f"{number:>13}" for number in numbers))
            result["smallest"].setdefault(name, {})[where] = dict(zip(heads, few, strict=True))
            result["efficiency"].setdefault(name, {})[where] = {
                "fp32": round(kept[4], 3), "bf16": round(kept[2], 3), "speed": round(fast[4], 1),
                "speed_bf16": round(fast[2], 1),
            }  # fmt: skip
    print("\n* more than fit into 80 GB at once: several micro-batches")
    if config.check:
        result["gloo"] = check(config.rounds)
    print(json.dumps(result))


def check(rounds: int) -> dict[str, dict[str, float]]:
    """Compare bytes and seconds of steps on real gloo ranks of one thread each with the formulas."""
    cores = len(os.sched_getaffinity(0))
    runs = {
        f"{strategy}, {ranks} ranks{', bf16' if gradient == 2 else ''}": (strategy, ranks, gradient)
        for strategy, ranks, gradient in (
            ("DDP", 1, 4), ("DDP", 2, 4), ("DDP", 4, 4), ("DDP", 2, 2), ("DDP", 4, 2), ("FSDP2", 2, 4), ("FSDP2", 4, 4),
            ("FSDP2", 4, 2),
        )
    }  # fmt: skip
    measured = {name: gloo(*each, rounds) for name, each in runs.items()}
    alone, pair = measured["DDP, 1 ranks"], measured["DDP, 2 ranks"]
    step, bandwidth = alone["step"], 2 * 4 * pair["trained"] / pair["all_reduce"]
    print(f"\ngloo on {cores} cores, {bandwidth / 1e9:.2f} GB/s through the loopback")
    print(f"{'':<20}{'MB sent':>9}{'formula':>9}{'s a step':>10}{'formula':>9}")
    result = {}
    for name, (strategy, ranks, gradient) in runs.items():
        values = measured[name]
        network = Network(int(values["trained"]), int(values["outside"]), 0, 1, 0.0, 0.0, 0.0, 0)
        formula = sent(exchanges(strategy, network, gradient), ranks, gloo=True)
        result[name] = {"sent_mb": round(values["sent"] / 1e6, 3), "formula_mb": round(formula / 1e6, 3)}
        line = f"{name:<20}{values['sent'] / 1e6:>9.2f}{formula / 1e6:>9.2f}{values['step']:>10.3f}"
        if strategy == "DDP" and gradient == 4:
            seconds = step * max(1.0, ranks / cores) + 2 * (ranks - 1) * 4 * values["trained"] / bandwidth
            result[name] |= {"step_s": round(values["step"], 4), "formula_s": round(seconds, 4)}
            line += f"{seconds:>9.3f}"
        print(line)
    return result


def gloo(strategy: str, ranks: int, gradient: int, rounds: int) -> dict[str, float]:
    """Return the measurements of rank 0 of real processes over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    shared = (ranks, port, strategy, gradient, rounds, results)
    workers = [context.Process(target=_rank, args=(rank, *shared)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"one of {ranks} ranks failed; its error is printed above")
    return results.get()


def bytes_written() -> int:
    """Return the bytes that this process has written to files and sockets, as Linux counts them."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def _rank(rank: int, ranks: int, port: int, strategy: str, gradient: int, rounds: int, results: Any) -> None:
    """Measure a step and an all-reduce on one rank."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    if strategy == "FSDP2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    import torch
    import torch.distributed as dist

    from benchmarks.step import ours

    torch.set_num_threads(1)
    size = Size(*TOWERS["tiny"], image=96, batch=8, precision="fp32", compile=False)
    size = replace(size, gradients="bf16" if gradient == 2 else "fp32")
    with tempfile.TemporaryDirectory() as name:
        take_step = ours(size, torch.device("cpu"), Path(name), ranks)
        network = our_network(size, Path(name))
        trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
        inside = [each for block in network.blocks() for each in block.parameters()]
        outside = trained - sum(each.numel() for each in inside if each.requires_grad)
        numbers = torch.zeros(trained)

        def timed(function: Callable[[], object]) -> tuple[float, float]:
            seconds, written = [], []
            for number in range(-2, rounds):
                if ranks > 1:
                    dist.barrier()
                started, before = time.perf_counter(), bytes_written()
                function()
                if number >= 0:
                    seconds.append(time.perf_counter() - started)
                    written.append(bytes_written() - before)
            return statistics.median(seconds), statistics.median(written)

        step, bytes_sent = timed(take_step)
        values = {"step": step, "sent": bytes_sent, "trained": float(trained), "outside": float(outside)}
        values["all_reduce"] = timed(lambda: dist.all_reduce(numbers))[0] if ranks > 1 else 0.0
    if rank == 0:
        results.put(values)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(ScalingBenchmark, main, __doc__)
