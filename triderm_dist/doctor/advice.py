"""The shipped experiment for a machine, with the micro-batches that fit into its GPUs, and the command to start."""

from __future__ import annotations

from collections.abc import Sequence

from triderm_dist.config import DataConfig, Experiment, load
from triderm_dist.doctor.findings import GIB, Finding
from triderm_dist.doctor.machine import Gpu
from triderm_dist.doctor.networks import largest_micro_batch, usable_bytes
from triderm_dist.schema import Signature

RECIPE = "milk10k"
"""The experiment on which those for a GPU are based; they change micro-batches."""
BY_MEMORY = ("a100", "rtx4090")
"""Experiments for a single GPU, suggested if their micro-batches are those that fit."""
EIGHT = "h100x8"
"""The first of `BY_MEMORY` on eight GPUs."""


def suggest(gpus: Sequence[Gpu], signature: Signature) -> list[Finding]:
    """Suggest an experiment for a machine with these GPUs, by the estimated memory of its models, and how to start it.

    On several GPUs the folds of all models are trained in parallel, each on one GPU, which avoids communication. The
    second suggestion is a training of one fold on all GPUs.
    """
    if not gpus:
        return _findings("cpu", [])
    smallest = min(gpu.memory for gpu in gpus)
    overrides = fitting_settings(load(Experiment, RECIPE), signature, usable_bytes(smallest / GIB, graphed=True))
    if overrides is None:
        problem = f"a GPU of {smallest / GIB:.0f} GiB is too small for {RECIPE}"
        return [Finding("experiment", problem, "warning", "a smaller tower, or cpu.yaml"), *_findings("cpu", [])]
    experiment = next((name for name in BY_MEMORY if _has(name, overrides)), RECIPE)
    if experiment != RECIPE:
        overrides = []
    if len(gpus) == 1:
        return _findings(experiment, overrides)
    if len(gpus) == 8 and experiment == BY_MEMORY[0]:
        experiment = EIGHT
    found = _findings(experiment, [*overrides, "parallel_folds=true"])
    micro = largest_micro_batch(96, len(gpus), 96, smallest=2)
    split = (
        [f"train.micro_batch={micro}"] if micro else [f"train.global_batch={16 * len(gpus)}", "train.micro_batch=16"]
    )
    ranks = f"triderm ranks --config_file ddp{'' if len(gpus) == 8 else f' --num_processes {len(gpus)}'}"
    command = " ".join([ranks, f"-m crossval --config {RECIPE}", *split, "data.shards=PACKED_FOLDER"])
    return [*found, Finding("each fold on all GPUs", command)]


def canvas_of(data: DataConfig) -> tuple[int, int] | None:
    """Return width and height of photos that are packed by these settings; None if they keep their size."""
    return (round(data.short_side * 4 / 3), data.short_side) if data.short_side else None


def fitting_settings(experiment: Experiment, signature: Signature, memory: float) -> list[str] | None:
    """Return the settings with which a step of each model fits into `memory` bytes of a GPU, [] if no change is needed.

    Prefers the largest micro-batch; activation checkpointing is used only if not even the smallest fits without. None
    if it does not fit with either.
    """
    from triderm_dist.monitoring.memory_estimate import estimate_model_memory

    settings = []
    for name, model in experiment.models.items():
        train = model.train
        for checkpointing in dict.fromkeys((train.activation_checkpointing, True)):
            tried = train.model_copy(update={"activation_checkpointing": checkpointing})
            need, _ = estimate_model_memory(
                model.model_copy(update={"train": tried}), signature, half=True, canvas=canvas_of(experiment.data)
            )
            fitting = need.largest(memory, train.smallest_micro_batch)
            if fitting:
                break
        else:
            return None
        if fitting != train.micro_batch:
            settings.append(f"models.{name}.train.micro_batch={fitting}")
        if checkpointing != train.activation_checkpointing:
            settings.append(f"models.{name}.train.activation_checkpointing=true")
    return settings


def _has(name: str, overrides: Sequence[str]) -> bool:
    """Return whether a shipped experiment trains its models like the recipe with these settings."""
    wanted, shipped = load(Experiment, RECIPE, list(overrides)), load(Experiment, name)
    keys = ("micro_batch", "activation_checkpointing")
    return all(
        getattr(wanted.models[model].train, key) == getattr(shipped.models[model].train, key)
        for model in wanted.models
        for key in keys
    )


def _findings(experiment: str, overrides: Sequence[str]) -> list[Finding]:
    return [
        Finding("experiment", f"{experiment}; `triderm config copy {experiment}` makes a copy to change"),
        Finding("start", " ".join(["triderm pipeline", f"--config {experiment}", *overrides, "data.source=FOLDER"])),
    ]
