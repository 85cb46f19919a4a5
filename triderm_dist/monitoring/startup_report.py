"""The report that a run prints before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from triderm_dist.config import TrainConfig
from triderm_dist.distributed.parallel import choose_precision, split_batch, strategy_of
from triderm_dist.environment import cpu_model
from triderm_dist.models.network import Network
from triderm_dist.models.tower import Tower
from triderm_dist.monitoring.expectation import Expectation
from triderm_dist.monitoring.flops import TrainingCompute
from triderm_dist.runtime.terminal import counted, wrapped

NOTED_PADDING = 0.25
"""Share of padding in an epoch from which the report mentions it."""


class LesionCounts(NamedTuple):
    """Lesions of a training. train: those to train on, of which `extra` are from extra sets.  validation: held out."""

    train: int
    extra: int
    validation: int


def format_report(
    name: str,
    accelerator: Accelerator,
    config: TrainConfig,
    network: Network,
    lesions: LesionCounts,
    steps: Sequence[int],
    compute: TrainingCompute | None,
    *,
    start: int = 0,
    brief: bool = False,
    why_precision: str = "",
    why_no_graph: str = "",
    rows: int = 0,
    expectation: Expectation | None = None,
) -> str:
    """Format the report: strategy, precision, batch, steps, options that are off, parts of the network that the task
    lacks, and parameters by part.

    network: before it is wrapped.  steps: of each epoch.
    start: the step from which the training resumes.  brief: only what differs between the folds of a model.
    why_precision: the reason; "" for that of `choose_precision`.
    why_no_graph: the reason why steps do not use a CUDA graph; "" if they do.
    rows: of an epoch without padding; 0 for unknown.
    """
    world = accelerator.num_processes
    extra = f" ({lesions.extra:,} of extra sets)" if lesions.extra else ""
    validation = f"{lesions.validation:,}" if lesions.validation else "none"
    precision, why = choose_precision(config.precision, accelerator.device)
    accumulation = split_batch(config.global_batch, config.micro_batch, world)
    differing = {
        "lesions": f"{lesions.train:,} to train{extra}, {validation} to validate",
        "steps": f"{sum(steps):,} in {counted(len(steps), 'epoch')} of {steps[0]:,}",
        "start": f"resumed at step {start:,} of {sum(steps):,}" if start else "",
    }
    if brief:
        return "\n".join([name, *_rows(differing)])
    lines = {
        "run": f"{strategy_of(accelerator)}, {counted(world, 'rank')} on {device_name(accelerator.device)}",
        "precision": f"{precision} ({why_precision or why})",
        **differing,
        "batch": f"global batch {config.global_batch} = {world} x {config.micro_batch} x {accumulation} "
        "(ranks, micro-batch, accumulation)" + _padding(config, world, rows, steps[0]),
        "speed": "MFU unavailable: " + _no_peak(accelerator.device) if compute is None else str(compute),
        "expected": str(expectation) if expectation else "",
        "off": "; ".join(_disabled_optimizations(accelerator, config, why_no_graph)),
        "left out": _left_out(network),
    }
    return "\n".join([name, *_rows(lines), _parameter_table(network)])


def _padding(config: TrainConfig, world: int, rows: int, steps: int) -> str:
    """Say how much of an epoch is padding, and which batch takes as many steps with the least of it; "" for little."""
    padding = 1 - rows / (steps * config.global_batch) if rows else 0.0
    if padding < NOTED_PADDING:
        return ""
    size = -(-rows // steps)  # of a batch without padding
    unit = world * config.micro_batch
    best = f"train.global_batch={unit * -(-size // unit)}"
    if config.global_batch - size < unit:
        accumulation = config.global_batch // unit
        micro = -(-size // (world * accumulation))
        best = f"train.global_batch={micro * world * accumulation} with train.micro_batch={micro}"
    return f"; {padding:.0%} of an epoch is padding, computed in vain: {best} takes as many steps"


def _rows(lines: Mapping[str, str]) -> list[str]:
    return [wrapped(text, " " * 13, f"  {key:<11}") for key, text in lines.items() if text]


def device_name(device: torch.device) -> str:
    """Return the model of the GPU, or of the CPU with the threads per process."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {counted(torch.get_num_threads(), 'thread')} per rank"


def parameters_by_part(network: Network) -> dict[str, tuple[int, int]]:
    """Return the (trained, frozen) parameter counts of each tower, child module and fusion stage, by name."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in network.named_parameters():
        part = _part(name)
        trained, frozen = counts.get(part, (0, 0))
        size = parameter.numel()
        counts[part] = (trained + size, frozen) if parameter.requires_grad else (trained, frozen + size)
    return counts


def _part(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "towers":
        return f"tower, {parts[1]}"
    if parts[0] == "fusion" and len(parts) > 3:
        return parts[2].replace("_", " ")
    return {"aux_norms": "auxiliary heads", "aux_heads": "auxiliary heads"}.get(parts[0], parts[0].replace("_", " "))


def _parameter_table(network: Network) -> str:
    counts = parameters_by_part(network)
    total = (sum(trained for trained, _ in counts.values()), sum(frozen for _, frozen in counts.values()))
    lines = [f"  {'parameters':<20} {'trained':>12} {'frozen':>12}"]
    for part, (trained, frozen) in {**counts, "all": total}.items():
        lines.append(f"    {part:<18} {trained:>12,} {frozen:>12,}")
    for view, tower in network.towers.items():
        assert isinstance(tower, Tower)
        if tower.frozen_blocks:
            blocks = f"{tower.frozen_blocks} of {len(tower.blocks)} blocks"
            how = "their output is cached" if tower.skips_frozen else "no autograd"
            lines.append(f"    tower, {view}: stem and {blocks} are frozen ({how})")
    return "\n".join(lines)


def _left_out(network: Network) -> str:
    parts = "; ".join(network.left_out())
    return f"{parts} (the task has no such data)" if parts else ""


def _no_peak(device: torch.device) -> str:
    if device.type == "cpu":
        return "peak FLOP/s of a CPU is unknown; set train.peak_tflops"
    return f"peak FLOP/s of {device_name(device)} is unknown; set train.peak_tflops from its data sheet"


def _disabled_optimizations(accelerator: Accelerator, config: TrainConfig, why_no_graph: str) -> list[str]:
    """List the options that are turned off, each with its reason or setting."""
    off = []
    if not config.compile:
        off.append("torch.compile (train.compile)")
    if why_no_graph:
        off.append(f"CUDA graph (train.graph: {why_no_graph})")
    if not config.activation_checkpointing:
        off.append("activation checkpointing (train.activation_checkpointing)")
    if accelerator.device.type == "cpu":
        off.append("pinned memory (no GPU)")
    if accelerator.mixed_precision != "fp16":
        off.append(f"loss scaling (only fp16 needs it, not {accelerator.mixed_precision.replace('no', 'fp32')})")
    if config.augment.mixes and config.augment.unmixed_epochs >= config.epochs:
        off.append(f"mixup and CutMix (train.augment.unmixed_epochs: the last {config.augment.unmixed_epochs} epochs)")
    if config.optim.warmup_epochs >= config.epochs:
        off.append(
            f"decay of the learning rate (train.optim.warmup_epochs: {config.optim.warmup_epochs:g}, all epochs)"
        )
    if config.loss.soft_f1_sums == "previous":
        off.append("exact loss sums over the global batch (train.loss.soft_f1_sums=previous)")
    return off
