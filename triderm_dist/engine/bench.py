"""Measure the training throughput of a network with the step, loader and meter of real training; compare records."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.config import ModelConfig, TrainConfig
from triderm_dist.data.loader import Loader, LoaderFactory
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.distributed.collectives import all_reduce_max
from triderm_dist.distributed.library_errors import is_out_of_memory
from triderm_dist.distributed.parallel import check_supported, choose_precision, strategy_of, wrap
from triderm_dist.engine.finite import NonFiniteGuard
from triderm_dist.engine.graph import GraphedStep, build_step, choose_graph, on_graph_stream, warm_up_steps
from triderm_dist.engine.step import TrainStep
from triderm_dist.environment import describe_commit
from triderm_dist.files import write_text
from triderm_dist.losses import CompoundLoss
from triderm_dist.models.network import Network
from triderm_dist.monitoring.flops import training_compute
from triderm_dist.monitoring.startup_report import device_name
from triderm_dist.monitoring.throughput import ThroughputMeter
from triderm_dist.optim import build_optimizer
from triderm_dist.schema import UNLABELED, VIEWS, DataError, InputError, Lesion, Task
from triderm_dist.tasks import milk10k_task

WARM_UP = 5
"""Steps before the measurement: compilation, autotuning, first allocations."""
PROBE = 3
"""Steps that estimate the number of steps that fit into the given time."""
CONCEPTS_PER_VIEW = 7
"""Concepts of synthetic photos if the task names them by a prefix only; as many as MILK10k has."""
MAX_STEPS = 10_000
"""Upper limit of the steps of a measurement."""

COMPARED_KEYS = (
    "task", "device", "ranks", "strategy", "precision", "kind", "tower", "image_size", "frozen", "width", "depth",
    "micro_batch", "global_batch", "compile", "activation_checkpointing",
)  # fmt: skip
"""Keys of a record that must be equal for two records to be compared."""


def measure(
    model: ModelConfig,
    network: Network,
    loaders: LoaderFactory,
    accelerator: Accelerator,
    seconds: float,
    seed: int = 0,
) -> dict[str, float]:
    """Train `network` for about `seconds` after a warm-up; return steps, seconds_per_step and the values of
    `ThroughputMeter.read`.

    Call on all ranks. The weights are arbitrary afterwards. Raises InputError if the network does not fit into memory.
    """
    config = model.train
    check_supported(accelerator, config)
    compute = training_compute(network, accelerator.device, accelerator.num_processes, config.peak_tflops)
    graphed, _ = choose_graph(accelerator, config, model.kind)
    wrapped, train_step, guard = _build(model, network, loaders, accelerator, graphed)
    loader = _endless_loader(config, loaders, accelerator, seed)
    steps, numbers, sums = iter(loader), count(), None

    def run(num_steps: int) -> float:
        nonlocal sums
        started = time.perf_counter()
        for _ in range(num_steps):
            sums = train_step(next(steps), next(numbers), sums).sums
        guard.check()  # synchronizes with the device
        return time.perf_counter() - started

    wrapped.train()
    warm_up = WARM_UP + (warm_up_steps(accelerator) if graphed else 0)
    try:
        run(warm_up)
        fitting = round(seconds / (run(PROBE) / PROBE))
        wanted = min(max(PROBE, fitting), MAX_STEPS - warm_up - PROBE)
        total = int(all_reduce_max(torch.tensor(wanted, device=accelerator.device)))
        meter = ThroughputMeter(0, total, config.global_batch, accelerator.device, compute)
        meter.start(loader, 0)
        elapsed = run(total)
        values = meter.read(loader, total)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"a micro-batch of {config.micro_batch} does not fit; lower train.micro_batch or set "
            "train.activation_checkpointing=true"
        ) from None
    finally:
        steps.close()  # type: ignore[attr-defined]
    del values["seconds_left"]
    return {"steps": total, "seconds_per_step": elapsed / total, **values}


def _build(
    model: ModelConfig, network: Network, loaders: LoaderFactory, accelerator: Accelerator, graphed: bool
) -> tuple[nn.Module, TrainStep | GraphedStep, NonFiniteGuard]:
    """Wrap the network; return it, its training step, and the step's guard."""
    config = model.train
    with on_graph_stream(accelerator.device, graphed):
        prepared = wrap(accelerator, network, partial(build_optimizer, config=config.optim), config)
    signature = loaders.index.signature
    counts, heads = np.ones(len(signature.diagnoses)), 1 + len(signature.views)
    loss = CompoundLoss(config.loss, model.head, counts, heads).to(accelerator.device)
    guard = NonFiniteGuard(accelerator, prepared.torch_optimizer)
    return prepared.network, build_step(accelerator, prepared, loss, config, guard, graphed), guard


def _endless_loader(config: TrainConfig, loaders: LoaderFactory, accelerator: Accelerator, seed: int) -> Loader:
    """Return a loader of `MAX_STEPS` steps, which repeats the lesions of the set."""
    rows = np.resize(np.arange(len(loaders.index)), MAX_STEPS * config.global_batch)
    plan = EpochPlan(Samples.of(loaders.index, rows), Sampling("shuffle"), seed, 0)
    batches = plan.batches(accelerator.process_index, accelerator.num_processes, config.global_batch)
    return loaders.create(batches, config.micro_batch, accelerator.device, augment=config.augment, seed=seed)


def synthetic_shards(folder: Path, lesions: int, short_side: int, task: Task | None = None) -> ShardIndex:
    """Pack synthetic photos of a task into FOLDER, or read its index if they are packed already.

    The photos are 4:3, with enough detail that a JPEG is as large as that of a real photo. task: MILK10k's by default.
    """
    task = task or milk10k_task()
    if (folder / "index.json").exists():
        return read_index(folder)
    from PIL import Image

    generator, photos = np.random.default_rng(0), folder.with_name(folder.name + "-photos")
    photos.mkdir(parents=True, exist_ok=True)
    size = (short_side * 4 // 3, short_side)
    names = task.concepts.names or (tuple(map(str, range(CONCEPTS_PER_VIEW))) if task.concepts.prefix else ())
    concepts = tuple(f"{view}/{name}" for view in task.view_names for name in names)
    metadata = tuple(field.high / 2 if field.is_number else 0.0 for field in task.fields)
    made = []
    for number in range(lesions):
        images = dict[str, str | None].fromkeys(VIEWS)
        for view in task.view_names:
            path = photos / f"lesion-{number:05d}-{view}.jpg"
            if not path.exists():
                coarse = generator.integers(60, 200, (6, 8, 3), np.uint8)
                picture = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
                picture = picture + generator.normal(0, 6, (*picture.shape[:2], 1)).astype(np.int16)
                part = path.with_suffix(".part")
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(part, "JPEG", quality=90)
                part.rename(path)
            images[view] = str(path)
        scores = tuple(generator.random(len(concepts)).tolist())
        name, label = f"lesion-{number:05d}", number % len(task.diagnoses)
        finer = task.fine.labels.get(task.diagnosis_names[label], ()) if task.fine else ()
        fine = task.fine.label_of(finer[number % len(finer)]) if task.fine and finer else UNLABELED
        made.append(Lesion(name, images, scores, metadata, label, name, fine))
    return pack_shards(Dataset(task, made, concepts, True, []), folder, short_side=None)


def record_of(model: ModelConfig, task: Task, accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, Any]:
    """Return the measured values with task, device, model settings, versions, commit and date, ready for JSON."""
    import timm

    config, tower = model.train, model.tower
    frozen = "all" if tower.frozen else f"{tower.freeze_clinical}+{tower.freeze_dermoscopic}"
    frozen += ", cached" if tower.cache_frozen_blocks and not tower.frozen else ""
    return {
        "task": task.name,
        "device": device_name(accelerator.device),
        "ranks": accelerator.num_processes,
        "strategy": strategy_of(accelerator),
        "precision": choose_precision(config.precision, accelerator.device)[0],
        "kind": model.kind,
        "tower": tower.source,
        "image_size": tower.image_size,
        "frozen": frozen,
        "width": model.width,
        "depth": model.depth,
        "micro_batch": config.micro_batch,
        "global_batch": config.global_batch,
        "compile": config.compile,
        "activation_checkpointing": config.activation_checkpointing,
        **{name: round(value, 5) for name, value in values.items()},
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "commit": describe_commit() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of records; [] if there is no file. Raises DataError for any other content.

    Records without a task were written before tasks existed, and are of MILK10k.
    """
    if not path.exists():
        return []
    try:
        records = [{"task": milk10k_task().name, **record} for record in json.loads(path.read_text(encoding="utf-8"))]
        if all({*COMPARED_KEYS, "lesions_per_s"} <= set(record) for record in records):
            return records
    except (OSError, ValueError, TypeError):
        pass
    raise DataError(f"{path}: not a list of benchmark records; take the file from the repository again")


def add_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record to the file, replacing an older one with the same `COMPARED_KEYS`."""
    others = [old for old in read_records(path) if any(old[key] != record[key] for key in COMPARED_KEYS)]
    write_text(path, json.dumps([*others, record], indent=1) + "\n")


def find_comparable(records: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the newest record with the same `COMPARED_KEYS`, or None."""
    same = [old for old in records if all(old[key] == record[key] for key in COMPARED_KEYS)]
    return max(same, key=lambda old: old["date"], default=None)


def comparison(record: Mapping[str, Any], committed: Mapping[str, Any] | None) -> str:
    """Format a record as a table, next to a committed one if there is one."""
    rows = {
        "lesions/s": (f"{record['lesions_per_s']:,.1f}", committed and f"{committed['lesions_per_s']:,.1f}"),
        "seconds per step": (f"{record['seconds_per_step']:.3f}", committed and f"{committed['seconds_per_step']:.3f}"),
        "MFU": (_share(record.get("mfu")), committed and _share(committed.get("mfu"))),
        "data wait": (_share(record["data_wait"]), committed and _share(committed["data_wait"])),
        "peak memory": (f"{record['memory_gib']:.2f} GiB", committed and f"{committed['memory_gib']:.2f} GiB"),
    }
    header = f"{'':<18}{'measured':>12}" + (f"{'committed':>12}" if committed else "")
    lines = [
        header,
        *(
            f"{name:<18}{measured:>12}" + (f"{reference:>12}" if reference else "")
            for name, (measured, reference) in rows.items()
        ),
    ]
    if committed:
        ratio = record["lesions_per_s"] / committed["lesions_per_s"]
        lines.append(f"{ratio:.2f} of the throughput measured on {committed['date']} at commit {committed['commit']}")
    else:
        lines.append(f"no committed record of this model and batch on {record['device']}, {record['ranks']} rank(s)")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
