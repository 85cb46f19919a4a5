"""Predict weak-scaling efficiency on 8, 16 and 64 GPUs; the formulas are checked against 1, 2 and 4 gloo ranks.

python -m benchmarks.scaling [key=value ...]

The batch per rank is constant (weak scaling). N ranks, P trained and F frozen parameters, B bytes/s and a seconds of
latency of the slowest link of the ring, T the seconds of a step on one rank, two thirds of them backward:

    DDP             c = 2 (N-1)/N 4 P / B         exposed = max(c - 2/3 T, 2 (N-1)/N bucket / B), fp32 gradients
    ZeRO 1, 2       c = (N-1)/N 2 P / B           exposed = max(c - 2/3 T, 0) + c: gradients, then weights, 16 bit
    FSDP2, ZeRO 3   c = (N-1)/N (w (P + F) + w P + 4 P) / B    exposed = max(c - T, c / blocks): gathered a block ahead
                    with weights of w bytes: 2 for ZeRO 3 under bf16, 4 for FSDP2, which keeps them in fp32
    all             + 3 * 2 log2(N) a: soft F1 sums, gradient norm, found-not-finite

    efficiency = T / (T + exposed)

On the CPU N ranks share C cores and the all-reduce runs on these cores, so nothing overlaps: a step takes
T max(1, N/C) + 2 (N-1) 4 P / M, with M bytes/s through this machine's loopback, taken from one all-reduce on 2 ranks.
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
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.step import TOWERS, Size, our_network
from triderm_dist.cli import run
from triderm_dist.settings import Section

LINKS = {"NVLink": (360e9, 10e-6), "100 Gb/s": (11e9, 30e-6)}
"""Bytes/s and seconds: NVLink of an H100 gives about 80% of its 450 GB/s per direction, Ethernet about 90% of 12.5."""
BUCKET = 25 * 2**20
GPUS = (8, 16, 64)


class ScalingBenchmark(Section):
    lesions: int = Field(12, ge=1, description="lesions per GPU and step")
    tower: str = Field("base", description="ViT of both views on the GPUs: tiny, small, base or large")
    peak_tflops: float = Field(989.0, gt=0, description="dense bf16 peak of a GPU")
    mfu: float = Field(
        0.4, gt=0, le=1, description="share of the peak that a step reaches; as measured by benchmarks.step"
    )
    rounds: int = Field(5, ge=2, description="measured steps of each gloo run, after two warm-up steps")


def main(config: ScalingBenchmark) -> None:
    from triderm_dist.monitoring.flops import training_flops

    size = Size(*TOWERS[config.tower], image=224, batch=config.lesions, precision="bf16", compile=True)
    with tempfile.TemporaryDirectory() as name:
        network = our_network(size, Path(name))
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in network.parameters()) - trained
    blocks = len(network.blocks())
    step_seconds = training_flops(network) * size.batch / (config.peak_tflops * 1e12 * config.mfu)
    print(
        f"{config.tower} towers, {trained / 1e6:.0f} million trained and {frozen / 1e6:.0f} frozen parameters, "
        f"{config.lesions} lesions per GPU: {step_seconds * 1e3:.1f} ms per step on one GPU at MFU {config.mfu:.0%}"
    )
    print(f"{'efficiency':<16}" + "".join(f"{f'{gpus} GPUs, {link}':>20}" for link in LINKS for gpus in GPUS))
    table: dict[str, dict[str, float]] = {}
    for strategy, exposed in STRATEGIES.items():
        table[strategy] = {
            f"{gpus}, {link}": round(
                step_seconds / (step_seconds + exposed(gpus, trained, frozen, blocks, step_seconds, *LINKS[link])), 3
            )
            for link in LINKS
            for gpus in GPUS
        }
        print(f"{strategy:<16}" + "".join(f"{value:>20.1%}" for value in table[strategy].values()))
    checked = check(config.rounds)
    print(json.dumps({"efficiency": table, "gloo": checked}))


def ddp(n: int, trained: int, frozen: int, blocks: int, step_seconds: float, bandwidth: float, latency: float) -> float:
    moved = 2 * (n - 1) / n / bandwidth
    return max(moved * 4 * trained - step_seconds * 2 / 3, moved * min(BUCKET, 4 * trained)) + small_collectives(
        n, latency
    )


def zero2(
    n: int, trained: int, frozen: int, blocks: int, step_seconds: float, bandwidth: float, latency: float
) -> float:
    half = (n - 1) / n * 2 * trained / bandwidth
    return max(half - step_seconds * 2 / 3, 0.0) + half + small_collectives(n, latency)


def sharded(
    weight: int, n: int, trained: int, frozen: int, blocks: int, step_seconds: float, bandwidth: float, latency: float
) -> float:
    moved = (n - 1) / n * (weight * (trained + frozen) + weight * trained + 4 * trained) / bandwidth
    return max(moved - step_seconds, moved / blocks) + small_collectives(n, latency)


def small_collectives(n: int, latency: float) -> float:
    """Return the seconds of the all-reduces of loss sums, gradient norm and found-not-finite, which are all latency."""
    return 3 * 2 * math.log2(n) * latency


STRATEGIES: dict[str, Callable[..., float]] = {
    "DDP": ddp,
    "ZeRO 1, 2": zero2,
    "ZeRO 3": partial(sharded, 2),
    "FSDP2": partial(sharded, 4),
}


def check(rounds: int) -> dict[str, dict[str, float]]:
    """Compare measured and predicted seconds per step of DDP on 1, 2 and 4 gloo ranks of one thread each."""
    cores = len(os.sched_getaffinity(0))
    measured = {ranks: gloo(ranks, rounds) for ranks in (1, 2, 4)}
    step_seconds, bandwidth = measured[1]["step"], 2 * measured[2]["bytes"] / measured[2]["all_reduce"]
    print(f"\ngloo on {cores} cores, {bandwidth / 1e9:.2f} GB/s through the loopback")
    print(f"{'ranks':>5}{'s per step':>10}{'predicted':>11}{'efficiency':>12}{'predicted':>11}")
    result = {}
    for ranks, values in measured.items():
        predicted = step_seconds * max(1.0, ranks / cores) + 2 * (ranks - 1) * values["bytes"] / bandwidth
        result[str(ranks)] = {
            "step": round(values["step"], 4), "predicted": round(predicted, 4),
            "efficiency": round(step_seconds / values["step"], 3),
            "predicted_efficiency": round(step_seconds / predicted, 3),
        }  # fmt: skip
        print(
            f"{ranks:>5}{values['step']:>10.3f}{predicted:>11.3f}{step_seconds / values['step']:>12.0%}"
            f"{step_seconds / predicted:>11.0%}"
        )
    return result


def gloo(ranks: int, rounds: int) -> dict[str, float]:
    """Return the measurements of rank 0 of real processes over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_rank, args=(rank, ranks, port, rounds, results)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"one of {ranks} ranks failed; its error is printed above")
    return results.get()


def _rank(rank: int, ranks: int, port: int, rounds: int, results: Any) -> None:
    """Measure a step and an all-reduce on one rank."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch
    import torch.distributed as dist

    from benchmarks.step import ours

    torch.set_num_threads(1)
    size = Size(*TOWERS["tiny"], image=96, batch=8, precision="fp32", compile=False)
    with tempfile.TemporaryDirectory() as name:
        take_step = ours(size, torch.device("cpu"), Path(name), ranks)
        numbers = sum(p.numel() for p in our_network(size, Path(name)).parameters() if p.requires_grad)
        gradient = torch.zeros(numbers)

        def timed(function: Callable[[], object]) -> float:
            seconds = []
            for number in range(-2, rounds):
                if ranks > 1:
                    dist.barrier()
                started = time.perf_counter()
                function()
                if number >= 0:
                    seconds.append(time.perf_counter() - started)
            return statistics.median(seconds)

        values = {"step": timed(take_step), "bytes": float(4 * numbers)}
        values["all_reduce"] = timed(lambda: dist.all_reduce(gradient)) if ranks > 1 else 0.0
    if rank == 0:
        results.put(values)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(ScalingBenchmark, main, __doc__)
