"""One training step: this toolkit's, the build guide's sketch, and a bare PyTorch loop over this toolkit's network.

python -m benchmarks.step [device=auto|cpu|cuda] [tower=tiny|small|base|large] [key=value ...]

All alternate on the same batch in memory, with two towers of the same kind whose first 6 and 4 blocks are frozen.
Then the peak memory of a step with and without activation checkpointing, each in a new process, and the share of the
time that the toolkit's loop waits for data from shards. On a GPU also the largest micro-batch that fits. The last
line is one JSON object: `vs_sketch` in lesions/s, `overhead` over the bare loop (median over rounds), the
share of the peak memory that checkpointing saves and of the time that it adds, and `recipe_time`, the share of the time
that mixup, CutMix, drop path and an average of the weights (EMA) add.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import ModelConfig, TowerConfig, TrainConfig
from triderm_dist.runtime import child_processes
from triderm_dist.settings import Section

TOWERS = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
CONCEPTS = 14
LOG_EVERY = 10
GIB = 2**30
# Freed tensors are returned to the system, so that the memory of a process on the CPU is the memory of its tensors.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

TakeStep = Callable[[], object]
"""Takes one training step."""


class StepBenchmark(Section):
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    tower: Literal["tiny", "small", "base", "large"] | None = Field(
        None, description="ViT of both views, patches of 16 pixels; null: base on a GPU, small on a CPU"
    )
    image_size: int = Field(224, ge=16, description="input side in pixels")
    batch: int | None = Field(None, ge=2, description="lesions per step; null: 96 on a GPU, 8 on a CPU")
    rounds: int = Field(12, ge=2, description="rounds, after three to warm up")
    steps: int | None = Field(None, ge=1, description="steps per round; null: 10 on a GPU, 1 on a CPU")
    compile: bool | None = Field(
        None, description="torch.compile our network's blocks, for the bare loop too; null: on a GPU, where it pays"
    )
    seconds: float = Field(15.0, gt=0, description="seconds of training from shards")
    workers: int = Field(0, ge=0, description="decoder threads for `seconds`; 0: one per core")


@dataclass(frozen=True)
class Size:
    """Size of a training: ViT towers and the batch."""

    width: int
    layers: int
    image: int
    batch: int
    precision: Literal["fp32", "bf16"]
    compile: bool
    checkpointing: bool = False
    recipe: bool = False  # with mixup, drop path and an average of the weights
    gradients: Literal["fp32", "bf16"] = "fp32"

    @property
    def vision(self) -> dict[str, int]:
        return {
            "width": self.width, "layers": self.layers, "image_size": self.image, "patch_size": 16, "head_width": 64
        }  # fmt: skip

    def model(self, folder: Path) -> ModelConfig:
        """Settings of our network on the same open_clip towers, with random weights."""
        settings = {"model_cfg": {"embed_dim": 512, "vision_cfg": self.vision, "text_cfg": {}}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(settings), encoding="utf-8")
        train = TrainConfig(
            global_batch=self.batch, micro_batch=self.batch, precision=self.precision, compile=self.compile,
            activation_checkpointing=self.checkpointing, gradient_precision=self.gradients,
        )  # fmt: skip
        tower = TowerConfig(source=f"local-dir:{folder}", pretrained=False, quick_gelu=False)
        if self.recipe:
            augment = train.augment.model_copy(update={"mixup": 0.4, "cutmix": 1.0})
            train = train.model_copy(update={"ema_decay": 0.999, "augment": augment})
            tower = tower.model_copy(update={"drop_path": 0.2})
        return ModelConfig(width=self.width, head="sigmoid", tower=tower, train=train)


def main(config: StepBenchmark) -> None:
    import torch

    from triderm_dist.monitoring.flops import training_compute
    from triderm_dist.monitoring.startup_report import device_name

    gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if gpu else "cpu")
    size = Size(
        *TOWERS[config.tower or ("base" if gpu else "small")],
        image=config.image_size,
        batch=config.batch or (96 if gpu else 8),
        precision="bf16" if gpu else "fp32",
        compile=gpu if config.compile is None else config.compile,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compute = training_compute(our_network(size, folder).to(device), device, 1)
        times = time_steps(contestants(size, device, folder), config.rounds, config.steps or (10 if gpu else 1), device)
    median = {contestant: statistics.median(values) for contestant, values in times.items()}
    print(f"{size} on {device_name(device)}: {config.rounds} rounds, alternating")
    print(f"{'':<28}{'s per step':>10}{'lesions/s':>11}{'spread':>9}{'of the sketch':>15}")
    for contestant, values in times.items():
        middle = median[contestant]
        print(
            f"{contestant:<28}{middle:>10.4f}{size.batch / middle:>11.1f}{(max(values) - min(values)) / middle:>9.0%}"
            f"{median['sketch'] / middle:>15.2f}"
        )
    plain, checked = (
        in_fresh_process(
            step_memory, replace(size, checkpointing=checkpointing), device.type, environment=RETURN_FREED_MEMORY
        )
        for checkpointing in (False, True)
    )
    print(f"peak memory of a step: {plain:.2f} GiB, with activation checkpointing {checked:.2f} GiB")
    loop = in_fresh_process(from_shards, size, device.type, config.seconds, config.workers or os.cpu_count() or 1)
    print(f"from shards: {loop['lesions_per_s']:.1f} lesions/s, {loop['data_wait']:.1%} of the time waiting for data")
    result: dict[str, Any] = {
        "vs_sketch": round(median["sketch"] / median["ours"], 3),
        "overhead": round(relative(times["ours"], times["bare loop"]), 4),
        "checkpoint_memory": round(1 - checked / plain, 3),
        "checkpoint_time": round(relative(times["ours, checkpointing"], times["ours"]), 3),
        "recipe_time": round(relative(times["ours, recipe"], times["ours"]), 3),
        "mfu": compute and round(compute.mfu(size.batch / median["ours"]), 4),
        "device": device_name(device),
        "data_wait": round(loop["data_wait"], 4),
    }
    if gpu:
        result["vs_sketch_bf16"] = round(median["sketch in bf16"] / median["ours"], 3)
        for checkpointing in (False, True):
            most = in_fresh_process(largest_batch, replace(size, checkpointing=checkpointing, compile=False))
            print(f"largest micro-batch, eager, {'with' if checkpointing else 'without'} checkpointing: {most}")
            result["largest_micro_batch" + "_checkpointing" * checkpointing] = most
    print(json.dumps(result))


def contestants(size: Size, device: Any, folder: Path) -> dict[str, TakeStep]:
    steps = {"sketch": sketch(size, device, bf16=False)}
    if size.precision == "bf16":
        steps["sketch in bf16"] = sketch(size, device, bf16=True)
    return steps | {
        "bare loop": bare_loop(size, device, folder),
        "ours": ours(size, device, folder),
        "ours, checkpointing": ours(replace(size, checkpointing=True), device, folder),
        "ours, recipe": ours(replace(size, recipe=True), device, folder),
    }


def time_steps(contestants: dict[str, TakeStep], rounds: int, steps: int, device: Any) -> dict[str, list[float]]:
    """Measure the seconds per step of each contestant in each round; the order is reversed from round to round."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-3, rounds):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            wait()
            started = time.perf_counter()
            for _ in range(steps):
                contestants[name]()
            wait()
            if number >= 0:
                times[name].append((time.perf_counter() - started) / steps)
    return times


def relative(some: list[float], others: list[float]) -> float:
    """Return how much longer `some` took than `others`, the median of the ratio over rounds minus 1."""
    return statistics.median(a / b for a, b in zip(some, others, strict=True)) - 1


def sketch(size: Size, device: Any, bf16: bool) -> TakeStep:
    import torch
    import torch.nn.functional as F

    from benchmarks.sketch import SketchNetwork, layer_wise_groups, train_batches

    batch = synthetic_batch(size, device)
    model = SketchNetwork(size.vision, CONCEPTS).to(device)
    optimizer = torch.optim.AdamW(layer_wise_groups(model), lr=1e-4, weight_decay=0.05)
    inputs = {
        "clinical_image": batch.clinical,
        "dermoscopic_image": batch.dermoscopic,
        "monet_scores": batch.concepts,
        "metadata": batch.metadata,
        "targets": F.one_hot(batch.labels, len(signature().diagnoses)).float(),
    }
    return lambda: train_batches(model, optimizer, [inputs], device, bf16)


def bare_loop(size: Size, device: Any, folder: Path) -> TakeStep:
    """Build the step of a loop without an engine: the undivided losses, no gathering, no logging, no checks."""
    import torch

    from triderm_dist.engine.evaluate import forward
    from triderm_dist.losses import focal_loss, soft_f1_loss
    from triderm_dist.optim import build_optimizer, build_scheduler

    batch, config = synthetic_batch(size, device), size.model(folder).train
    network = our_network(size, folder).to(device).train()
    for block in network.blocks() if size.compile else ():
        block.compile(dynamic=False)
    optimizer = build_optimizer(network, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, 100_000, 100)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=size.precision == "bf16"):
            outputs = forward(network, batch)
        losses = [
            0.5 * (focal_loss(logits, batch.labels, "sigmoid").mean() + soft_f1_loss(logits, batch.labels, "sigmoid"))
            for logits in outputs.heads
        ]
        (losses[0] + 0.3 * losses[1] + 0.3 * losses[2]).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return step


def ours(size: Size, device: Any, folder: Path, ranks: int = 1) -> TakeStep:
    """Build the step of `engine.trainer.Trainer` on one of `ranks`, with logging and checks, without the loader."""
    network = our_network(size, folder).to(device)
    return training_step(size.model(folder), network, [synthetic_batch(size, device)], device, folder, ranks)


def training_step(
    model: ModelConfig, network: Any, micro_batches: list[Any], device: Any, folder: Path, ranks: int = 1
) -> TakeStep:
    """Build the step of `engine.trainer.Trainer` on one of `ranks`, with logging and checks, without the loader.

    network: on the device; it is trained.  micro_batches: every step trains on these.  folder: gets the logs.
    """
    import numpy as np

    from triderm_dist.data.loader import Step
    from triderm_dist.data.mixing import Mixing
    from triderm_dist.data.upload import DataWait
    from triderm_dist.distributed import parallel
    from triderm_dist.engine.ema import Ema
    from triderm_dist.engine.finite import NonFiniteGuard
    from triderm_dist.engine.graph import build_step, choose_graph, on_graph_stream
    from triderm_dist.losses import CompoundLoss
    from triderm_dist.monitoring.throughput import ThroughputMeter
    from triderm_dist.monitoring.tracking import Tracker
    from triderm_dist.monitoring.train_lines import TrainLines
    from triderm_dist.optim import build_optimizer, build_scheduler

    config, task = model.train, network.signature
    lesions = sum(len(batch.labels) for batch in micro_batches)
    accelerator = parallel.start_training(config.model_copy(update={"global_batch": ranks * lesions}))
    build = partial(build_optimizer, config=config.optim)
    graphed, _ = choose_graph(accelerator, config, model.kind)
    with on_graph_stream(accelerator.device, graphed):
        prepared = parallel.wrap(accelerator, network, build, config)
    wrapped, _, optimizer = prepared
    wrapped.train()
    scheduler = build_scheduler(optimizer, config.optim, 100_000, 100)
    heads = 1 + len(task.views)
    loss = CompoundLoss(config.loss, model.head, np.ones(len(task.diagnoses)), heads).to(device)
    guard, loader = NonFiniteGuard(accelerator, optimizer), SimpleNamespace(wait=DataWait(device))
    train_step = build_step(accelerator, prepared, loss, config, guard, graphed)
    meter = ThroughputMeter(0, 100_000, ranks * lesions, device)
    meter.start(loader, 0)  # type: ignore[arg-type]
    tracker = Tracker("ours", folder, lines=TrainLines(100_000, 1, loss.names), config=config).__enter__()
    average = Ema(wrapped, config.ema_decay) if config.ema_decay else None
    mixing = Mixing(config.augment, task) if config.augment.mixes else lambda batch: batch
    done, sums = 0, None

    def take_step() -> None:
        nonlocal done, sums
        batches = [mixing(batch) for batch in micro_batches]
        result = train_step(Step(0, ranks * lesions, batches, np.arange(lesions)), done, sums)
        sums = result.sums
        scheduler.step()
        done += 1
        if average:
            average.after_step(done)
        if done % LOG_EVERY == 0:
            guard.check()
            values = loss.values(result.sums, result.count)
            values |= {"lr": float(scheduler.get_last_lr()[0]), "grad_norm": float(result.grad_norm)}
            values |= meter.read(loader, done)  # type: ignore[arg-type]
            with contextlib.redirect_stdout(io.StringIO()):
                tracker.log("train", 0.0, done, values)

    return take_step


def signature() -> Any:
    from triderm_dist.tasks import milk10k_task

    return milk10k_task().signature(tuple(f"concept {number}" for number in range(CONCEPTS)))


def our_network(size: Size, folder: Path) -> Any:
    import torch

    from triderm_dist.models import build_network, build_towers

    torch.manual_seed(0)
    model = size.model(folder)
    return build_network(model, signature(), build_towers(model.tower))


def synthetic_batch(size: Size, device: Any) -> Any:
    return random_batch(size.batch, size.image, device)


def random_batch(lesions: int, image: int, device: Any) -> Any:
    """Build a batch of noise for MILK10k's signature; the photos are channels-last, as the loader returns them."""
    import numpy as np
    import torch

    from triderm_dist.data.augment import LesionRng, lesion_keys
    from triderm_dist.schema import Batch

    torch.manual_seed(0)
    clinical, dermoscopic = (
        torch.randn(lesions, 3, image, image, device=device).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    return Batch(
        lesion_ids=[str(number) for number in range(lesions)],
        clinical=clinical,
        dermoscopic=dermoscopic,
        view_present=torch.ones(lesions, 2, dtype=torch.bool),
        concepts=torch.rand(lesions, CONCEPTS),
        metadata=torch.zeros(lesions, len(signature().fields)),
        labels=torch.arange(lesions) % len(signature().diagnoses),
        valid=torch.ones(lesions, dtype=torch.bool),
        draws=LesionRng(0, 0, lesion_keys(map(str, range(lesions))), np.zeros(lesions, np.int64)).bits,
    ).to(device)


def in_fresh_process(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """Call a function in a new process."""
    context = multiprocessing.get_context("spawn")
    with child_processes.environment_variables(environment or {}), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def step_memory(size: Size, device_type: str) -> float:
    """Measure the peak memory of weights, gradients, optimizer state and activations in a step, in GiB."""
    import torch

    device = torch.device(device_type)
    with tempfile.TemporaryDirectory() as name:
        ours(
            replace(size, width=64, layers=7, image=32), device, Path(name)
        )()  # so that imports and pools do not count
        gc.collect()
        before = _status("VmRSS")
        take_step = ours(size, device, Path(name))
        for _ in range(2):
            take_step()
        if device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            take_step()
            return torch.cuda.max_memory_allocated() / GIB
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        take_step()
        return (_status("VmHWM") - before) / GIB


def _status(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def from_shards(size: Size, device_type: str, seconds: float, workers: int) -> dict[str, float]:
    """Measure throughput and data wait of the toolkit's loop on synthetic photos."""
    import torch

    from triderm_dist.data.loader import LoaderFactory
    from triderm_dist.data.photo_source import PhotoSource
    from triderm_dist.distributed import parallel
    from triderm_dist.engine import bench
    from triderm_dist.models import build_network, build_towers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = size.model(folder)
        index = bench.synthetic_shards(folder / "shards", max(128, size.batch), 288)
        accelerator = parallel.start_training(model.train)
        towers = build_towers(model.tower)
        source = PhotoSource(index, size.image, towers[0].mean, towers[0].std, model.train.augment)
        network = build_network(model, index.signature, towers).to(torch.device(device_type))
        return bench.measure(model, network, LoaderFactory(index, source, workers), accelerator, seconds)


def largest_batch(size: Size) -> int:
    """Find the largest batch, a multiple of 8, whose step fits into the GPU."""
    import torch

    from triderm_dist.distributed.library_errors import is_out_of_memory

    def fits(eights: int) -> bool:
        with tempfile.TemporaryDirectory() as name:
            try:
                take_step = ours(replace(size, batch=8 * eights), torch.device("cuda"), Path(name))
                take_step()
                take_step()
                return True
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return False
            finally:
                gc.collect()
                torch.cuda.empty_cache()

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 8 * low


if __name__ == "__main__":
    run(StepBenchmark, main, __doc__)
