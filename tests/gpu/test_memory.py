"""Memory on a GPU: the estimate against the allocator, and smaller micro-batches where it runs out."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from tests.gpu.training import batches, create_trainer, settings, take_steps
from triderm_dist.config import Experiment
from triderm_dist.data.shards.index import read_index
from triderm_dist.engine.crossval import run_folds
from triderm_dist.monitoring.memory_estimate import WORKSPACES, estimate_model_memory

TOWER = [
    "models.net.tower={source: 'timm:vit_tiny_patch16_224', pretrained: false, image_size: 224}",
    "models.net.tower.freeze_clinical=6", "models.net.tower.freeze_dermoscopic=4",
    "train.precision=bf16", "train.graph=false",
]  # fmt: skip
"""Large enough that activations, and not the smallest block of the allocator, are what is measured."""


def estimate(experiment: Experiment, shards: Path, micro_batch: int) -> int:
    """Return the estimated bytes of a step, without the workspaces of cuBLAS."""
    found, _ = estimate_model_memory(experiment.models["net"], read_index(shards).signature, True)
    return found.step(micro_batch) - WORKSPACES


@pytest.mark.parametrize(
    "words",
    [
        ("train.global_batch=48", "train.micro_batch=48"),
        ("train.global_batch=48", "train.micro_batch=24", "train.ema_decay=0.9"),
        ("train.global_batch=48", "train.micro_batch=48", "train.activation_checkpointing=true"),
    ],
    ids=["one micro-batch", "two micro-batches and average", "checkpointed"],
)
def test_peak_is_within_a_tenth_of_the_estimate(words: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    experiment = settings("trimodal", *TOWER, *words)
    before = allocated_by_tensors()
    trainer = create_trainer(experiment, shards, tmp_path)
    steps = batches(trainer)
    take_steps(trainer, steps, 2)
    batch = next(steps)
    steps.close()
    trainer.training.wrapped.train()
    torch.cuda.reset_peak_memory_stats()
    workspaces = torch.cuda.memory_allocated() - allocated_by_tensors()
    trainer.step(batch, 2, trainer.training.sums)
    peak = torch.cuda.max_memory_allocated() - before - workspaces
    expected = estimate(experiment, shards, trainer.config.micro_batch)
    assert peak == pytest.approx(expected, rel=0.1), f"{peak / 2**20:.0f} MiB, {expected / 2**20:.0f} estimated"


def allocated_by_tensors() -> int:
    """Return the allocated bytes without the workspaces of cuBLAS, which it takes again when it next needs them."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def test_micro_batch_halves_where_memory_runs_out(shards: Path, tmp_path: Path) -> None:
    """A training in a part of the memory: what the failed attempt held is free again."""
    words = ["train.global_batch=48", "train.micro_batch=48", "train.epochs=1", "data.folds=2"]
    experiment = settings("trimodal", *TOWER, *words, f"output={tmp_path}")
    needed = [estimate(experiment, shards, size) for size in (24, 48)]
    before = allocated_by_tensors()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + WORKSPACES + sum(needed) // 2
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        run_folds(experiment, read_index(shards), ["net"], [0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    folder = tmp_path / "net" / "fold-0"
    assert json.loads((folder / "micro_batch.json").read_text())["micro_batch"] == 24
    assert (folder / "predictions.parquet").exists()
    assert allocated_by_tensors() - before < 2**21  # the tables of dropout masks, 1.5 MiB, stay
