"""Estimated memory of training and evaluation beside the peak of a GPU, with stand-in towers and synthetic photos.

python -m benchmarks.memory [cases=[base,large_checkpointed]] [output=memory.json]

Each case takes three training steps in a new process, with the training's own step, loader and average of the weights,
and then evaluates a batch. DDP and FSDP2 need several ranks, or a stub of a GPU whose other ranks are silent. The
last line is one JSON object: `memory_worst_error` is the largest |estimate / peak - 1|.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import Section

if TYPE_CHECKING:
    from accelerate import Accelerator

    from triderm_dist.config import DataConfig, ModelConfig, TrainConfig
    from triderm_dist.data.loader import LoaderFactory
    from triderm_dist.data.shards.index import ShardIndex
    from triderm_dist.engine.ema import Ema
    from triderm_dist.engine.graph import GraphedStep
    from triderm_dist.engine.step import TrainStep

GIB = 2**30
LESIONS = 8
"""Packed lesions, each of which comes several times in a batch."""
RANKS = 8
WATCHDOG = 0.5
"""Seconds in which NCCL's watchdog thread, which wakes every 100 ms, releases the buckets that DDP replaced after the
first step. Before, memory holds all gradients once more; the estimate is of the steps after that.
"""


@dataclass(frozen=True)
class Case:
    """A training to measure: an experiment, its model, settings, and the strategy of `RANKS` ranks if not single."""

    experiment: str
    model: str = "trimodal"
    settings: tuple[str, ...] = ()
    strategy: str = "single"


CHECKPOINTED = "train.activation_checkpointing=true"
CASES = {
    "base": Case("milk10k"),
    "dual_cnn": Case("milk10k", "dual_cnn"),
    "large": Case("milk10k_large"),
    "base, 12": Case("milk10k", settings=("train.micro_batch=12", "train.global_batch=12")),
    "base, no average": Case("milk10k", settings=("train.ema_decay=0",)),
    "base, 32 x 3": Case("milk10k", settings=("train.micro_batch=32",)),
    "dual_cnn, 32 x 3": Case("milk10k", "dual_cnn", ("train.micro_batch=32",)),
    "large, 32 x 3": Case("milk10k_large", settings=("train.micro_batch=32",)),
    "base, checkpointed": Case("milk10k", settings=(CHECKPOINTED,)),
    "dual_cnn, checkpointed": Case("milk10k", "dual_cnn", (CHECKPOINTED,)),
    "large, checkpointed": Case("milk10k_large", settings=(CHECKPOINTED,)),
    "base, 16 x 6, checkpointed": Case("milk10k", settings=("train.micro_batch=16", CHECKPOINTED)),
    "dual_cnn, 16 x 6, checkpointed": Case("milk10k", "dual_cnn", ("train.micro_batch=16", CHECKPOINTED)),
    "large, 16 x 6, checkpointed": Case("milk10k_large", settings=("train.micro_batch=16", CHECKPOINTED)),
    "base, DDP": Case("milk10k", settings=("train.micro_batch=12",), strategy="ddp"),
    "dual_cnn, DDP": Case("milk10k", "dual_cnn", ("train.micro_batch=12",), "ddp"),
    "large, DDP": Case("milk10k_large", settings=("train.micro_batch=12",), strategy="ddp"),
    "base, DDP, 96": Case("milk10k", settings=("train.global_batch=768",), strategy="ddp"),
    "base, FSDP2": Case("milk10k", settings=("train.micro_batch=12",), strategy="fsdp2"),
    "large, FSDP2": Case("milk10k_large", settings=("train.micro_batch=12",), strategy="fsdp2"),
    "dual_cnn, FSDP2": Case("milk10k", "dual_cnn", ("train.micro_batch=12",), "fsdp2"),
}


class MemoryBenchmark(Section):
    cases: list[str] = Field([], description="names of the cases, as the table prints them; []: all")
    strategies: list[str] = Field(["single", "ddp", "fsdp2"], description="those of the cases")
    compile: bool = Field(False, description="torch.compile the blocks")
    output: Path | None = Field(None, description="JSON file of the results")


def main(config: MemoryBenchmark) -> None:
    found = {}
    print(
        f"{'case':<32}{'peak':>8}{'estimate':>10}{'ratio':>7}{'reserved':>10}{'evaluation':>12}{'estimate':>10}{'ratio':>7}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            if case.strategy not in config.strategies or (config.cases and name not in config.cases):
                continue
            found[name] = one = _in_new_process(name, config.compile, Path(folder))
            print(_row(name, one), flush=True)
    errors = [
        abs(one[f"{part}estimate"] / one[f"{part}peak"] - 1) for one in found.values() for part in ("", "evaluation_")
    ]
    result = {"memory_worst_error": round(max(errors), 4), "cases": len(found)}
    if config.output:
        config.output.write_text(json.dumps({**result, "results": found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _row(name: str, one: Mapping[str, float]) -> str:
    def pair(part: str) -> str:
        peak, estimate = one[f"{part}peak"], one[f"{part}estimate"]
        return f"{estimate / GIB:10.2f}{estimate / peak:7.2f}"

    return (
        f"{name:<32}{one['peak'] / GIB:8.2f}{pair('')}{one['reserved'] / GIB:10.2f}"
        f"{one['evaluation_peak'] / GIB:12.2f}{pair('evaluation_')}"
    )


def _in_new_process(name: str, compiled: bool, folder: Path) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    if CASES[name].strategy != "single":
        os.environ["NULLGPU_REAL"] = "1"  # without it a stub returns zeros, on which the buckets of DDP fail
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measure, CASES[name], compiled, folder).result()


def is_stub() -> bool:
    """Whether the GPU is a stub that counts what is asked of it and computes nothing."""
    return "NULLGPU_GIB" in os.environ


def _pretend_ranks(strategy: str) -> int:
    """Start a process group of which this is the only process that answers; return its size."""
    import torch
    import torch.distributed as dist
    import torch.nn.parallel.distributed as ddp

    ranks = RANKS if is_stub() else 1
    os.environ |= {
        "WORLD_SIZE": str(ranks),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    if strategy == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=ranks)
    ddp._verify_param_shape_across_processes = lambda *_, **__: None  # it asks the other ranks
    return ranks


def _measure(case: Case, compiled: bool, folder: Path) -> dict[str, float]:
    """Return the estimates and peaks of a case in bytes. folder: for the packed photos."""
    if case.strategy != "single":
        _pretend_ranks(case.strategy)
    from triderm_dist.config import Experiment, load
    from triderm_dist.distributed import parallel
    from triderm_dist.engine.bench import synthetic_shards
    from triderm_dist.monitoring.memory_estimate import estimate_model_memory

    experiment = load(Experiment, case.experiment, [f"train.compile={compiled}", "train.graph=false", *case.settings])
    model, data = experiment.models[case.model], experiment.data
    assert data.short_side, "the experiments of CASES reduce photos"
    index = synthetic_shards(folder / f"shards-{data.short_side}", LESIONS, data.short_side)
    accelerator = parallel.start_training(model.train)
    assert accelerator.device.type == "cuda", "this benchmark needs a GPU"
    found = _measured_peaks(model, data, index, accelerator)
    half, ranks = accelerator.mixed_precision != "no", accelerator.num_processes
    need, _ = estimate_model_memory(model, index.signature, half, ranks, case.strategy, index.canvas)
    found["estimate"] = need.step(model.train.micro_batch)
    found["evaluation_estimate"] = need.evaluation(model.train.micro_batch, 8)
    return found


def _measured_peaks(
    model: ModelConfig, data: DataConfig, index: ShardIndex, accelerator: Accelerator
) -> dict[str, float]:
    """Train three steps and evaluate one batch; return the peaks of both, and what the allocator reserved."""
    import numpy as np
    import torch

    from triderm_dist.data.loader import LoaderFactory
    from triderm_dist.data.photo_source import PhotoSource
    from triderm_dist.distributed import parallel
    from triderm_dist.engine.ema import Ema
    from triderm_dist.engine.evaluate import evaluate
    from triderm_dist.engine.finite import NonFiniteGuard
    from triderm_dist.engine.graph import build_step, choose_graph, on_graph_stream, warm_up_steps
    from triderm_dist.losses import CompoundLoss
    from triderm_dist.monitoring.memory_estimate import network_without_weights
    from triderm_dist.optim import build_optimizer

    config, device = model.train, accelerator.device
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cpu" if is_stub() else device):  # the stub cannot draw normal numbers
        network, _ = network_without_weights(model, index.signature)
    network = network.to(device)
    graphed, _ = choose_graph(accelerator, config, model.kind)
    with on_graph_stream(device, graphed):
        prepared = parallel.wrap(accelerator, network, partial(build_optimizer, config=config.optim), config)
    wrapped, _, optimizer = prepared
    average = Ema(wrapped, config.ema_decay) if config.ema_decay else None
    loss = CompoundLoss(config.loss, model.head, np.ones(len(index.diagnoses))).to(device)
    guard = NonFiniteGuard(accelerator, optimizer)
    step = build_step(accelerator, prepared, loss, config, guard, graphed)
    side = next(iter(network.towers.values())).input_shape[-1]  # type: ignore[index]
    source = PhotoSource(index, int(side), (0.5,) * 3, (0.5,) * 3, config.augment)
    loaders = LoaderFactory(index, source, 1, data.prefetch)
    wrapped.train()
    found = _train(step, average, loaders, config, accelerator, warm_up_steps(accelerator) + 1 if graphed else 2)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    rows = np.resize(np.arange(LESIONS), 2 * config.micro_batch)
    # The other ranks of a stub answer with numbers that are no rows.
    with average.swapped_in() if average else contextlib.nullcontext(), contextlib.suppress(KeyError):
        evaluate(wrapped, loaders, rows, accelerator, micro_batch=config.micro_batch, transforms=8)
    return {**found, "evaluation_peak": torch.cuda.max_memory_allocated()}


def _train(
    step: TrainStep | GraphedStep,
    average: Ema | None,
    loaders: LoaderFactory,
    config: TrainConfig,
    accelerator: Accelerator,
    warm_up: int,
) -> dict[str, float]:
    """Train two steps after `warm_up` others; return their peaks of allocated and reserved memory."""
    import numpy as np
    import torch

    from triderm_dist.data.plan import EpochPlan, Samples, Sampling

    rows = np.resize(np.arange(LESIONS), (warm_up + 2) * config.global_batch)
    plan = EpochPlan(Samples.of(loaders.index, rows), Sampling("shuffle"), 0, 0)
    batches = plan.batches(0, accelerator.num_processes, config.global_batch)
    sums = None
    for number, batch in enumerate(
        loaders.create(batches, config.micro_batch, accelerator.device, augment=config.augment)
    ):
        if number == warm_up:
            time.sleep(WATCHDOG)
            torch.cuda.reset_peak_memory_stats()
        sums = step(batch, number, sums).sums
        if average:
            average.after_step(number + 1)
    return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


if __name__ == "__main__":
    run(MemoryBenchmark, main, __doc__)
