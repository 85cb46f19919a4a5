"""Training of one network: the loop, and one optimiser step over a split global batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.config import TrainConfig, flat
from triderm_dist.data.loader import Loader, Step, ViewSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards import ShardIndex
from triderm_dist.engine.checkpoint import Checkpoints, TrainState, save_weights
from triderm_dist.engine.evaluate import evaluate, forward
from triderm_dist.engine.flops import budget
from triderm_dist.engine.meter import Meter
from triderm_dist.engine.parallel import accumulate, all_sum, backward, whole_state, wrap
from triderm_dist.engine.profiling import profiler
from triderm_dist.engine.startup import report
from triderm_dist.engine.tracking import Tracker
from triderm_dist.losses import CompoundLoss, Head, probabilities
from triderm_dist.metrics import argmax_macro_f1, official_macro_f1
from triderm_dist.models.network import Network
from triderm_dist.optim import build_optimizer, build_scheduler
from triderm_dist.schema import DIAGNOSES, InputError


@dataclass(frozen=True)
class TrainingData:
    """A packed set, where its views come from, and the index rows (N,) that are trained on and validated on."""

    index: ShardIndex
    source: ViewSource
    train_rows: np.ndarray
    validation_rows: np.ndarray
    workers: int
    prefetch: int


def train(
    name: str,
    network: Network,
    head: Head,
    config: TrainConfig,
    data: TrainingData,
    accelerator: Accelerator,
    folder: Path,
    seed: int,
    identity: str,
    on_validation: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train `network` and leave the selected weights in it and in FOLDER/weights.safetensors; resumes from
    FOLDER/checkpoints.

    Call on all ranks. Two runs with the same `identity` (settings and data), seed, micro-batch and global batch give
    the same numbers, on any number of ranks up to the order of floating-point sums. `on_validation` is told (epoch,
    scores). Raises InputError for a loss that is not finite, before the step.
    """
    samples = Samples(data.train_rows, data.index.labels[data.train_rows], data.index.shard[data.train_rows])
    sampling = Sampling(**config.sampling.model_dump())
    steps = [
        EpochPlan(samples, sampling, seed, epoch).num_batches(config.global_batch) for epoch in range(config.epochs)
    ]
    total_steps = sum(steps)
    labels = data.index.labels[data.validation_rows]
    counts = np.bincount(samples.labels, minlength=len(DIAGNOSES))
    loss = CompoundLoss(config.loss, head, counts).to(accelerator.device)
    optimizer = build_optimizer(network, config.optim, fused=accelerator.device.type == "cuda")
    scheduler = build_scheduler(optimizer, config.optim, total_steps, steps[0])
    compute = budget(network, accelerator.device, accelerator.num_processes, config.peak_tflops)
    lesions = len(data.train_rows), len(data.validation_rows)
    accelerator.print(report(name, accelerator, config, network, lesions, steps, compute))
    wrapped, prepared = wrap(accelerator, network, optimizer, config.activation_checkpointing, config.compile)
    checkpoints = Checkpoints(folder, identity, config.keep_last)
    state, sums = checkpoints.restore(accelerator, wrapped, prepared, scheduler)
    meter = Meter(state.step, total_steps, config.global_batch, accelerator.device, compute)
    tracker = Tracker(
        name, folder, accelerator.is_main_process, epochs=config.epochs, total_steps=total_steps, step=state.step,
        trackers=config.trackers, settings=flat(config.model_dump(mode="json")),
    )  # fmt: skip

    with tracker, profiler(folder, config.profile, accelerator.is_main_process) as profile:
        while state.epoch < config.epochs:
            batches = EpochPlan(samples, sampling, seed, state.epoch).batches(
                accelerator.process_index, accelerator.num_processes, config.global_batch, start=state.batch
            )
            loader = Loader(
                data.index, data.source, batches, config.micro_batch, accelerator.device,
                augment=config.augment, seed=seed, epoch=state.epoch, workers=data.workers, prefetch=data.prefetch,
            )  # fmt: skip
            meter.start(loader, state.step)
            wrapped.train()
            for step in loader:
                focal, sums, norm = train_step(
                    wrapped, loss, prepared, step, accelerator, config, seed, state.step, sums
                )
                scheduler.step()
                state.batch, state.step = step.number + 1, state.step + 1
                if state.step % config.log_every == 0:
                    values = loss.values(all_sum(focal), sums)
                    values |= {"lr": float(scheduler.get_last_lr()[0]), "grad_norm": norm}
                    values |= meter.read(loader, state.step)
                    tracker.log("train", state.epoch + state.batch / steps[state.epoch], state.step, values)
                profile.step()
                if config.save_every and state.step % config.save_every == 0:
                    checkpoints.save(accelerator, wrapped, prepared, scheduler, state, sums)
            state.epoch, state.batch = state.epoch + 1, 0

            validation = evaluate(
                wrapped, data.index, data.source, data.validation_rows, accelerator,
                micro_batch=config.micro_batch, workers=data.workers, prefetch=data.prefetch,
            )  # fmt: skip
            p = probabilities(torch.from_numpy(validation.logits), head).numpy()
            scores = {"macro_f1": argmax_macro_f1(p, labels), "official": official_macro_f1(p, labels)}
            if config.select == "last" or scores["macro_f1"] > state.best_score:
                state.best_score, state.best_epoch = scores["macro_f1"], state.epoch
                _keep_weights(accelerator, wrapped, folder, state)
            checkpoints.save(accelerator, wrapped, prepared, scheduler, state, sums)
            tracker.log("validation", state.epoch, state.step, scores)
            if on_validation:
                on_validation(state.epoch, scores)


def train_step(
    wrapped: nn.Module,
    loss: CompoundLoss,
    optimizer: torch.optim.Optimizer,
    step: Step,
    accelerator: Accelerator,
    config: TrainConfig,
    seed: int,
    number: int,
    previous_sums: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One optimiser step over a global batch, of which this rank holds the micro-batches of `step`.

    Returns this rank's share of the focal values (3,), the soft F1 sums (3, 3, C) of the global batch, and the
    gradient norm before clipping. The sums must be known before the first backward: one micro-batch takes them from
    its own forward; several take them from a first pass without gradients, with the same dropout, or from the step
    before if the settings say so.
    """
    alone = len(step.micro_batches) == 1
    first = accelerator.process_index * len(step.micro_batches)
    sums = None if alone else _sums_ahead(wrapped, loss, step, config, seed, number, first, previous_sums)
    own_sums = torch.zeros(3, 3, len(DIAGNOSES), device=accelerator.device)
    focal = torch.zeros(3, device=accelerator.device)
    for i, batch in enumerate(step.micro_batches):
        with accumulate(accelerator, wrapped, last=i + 1 == len(step.micro_batches)):
            seed_dropout(seed, number, first + i)
            outputs = forward(wrapped, batch)
            own_sums += loss.sums(outputs, batch.labels, batch.valid)
            if alone:
                sums = all_sum(own_sums)
            part, focal_part = loss(outputs, batch.labels, batch.valid, step.count, sums)
            focal += focal_part
            backward(accelerator, part)
    norm = float(accelerator.clip_grad_norm_(wrapped.parameters(), config.optim.clip_norm) or 0.0)
    if not np.isfinite(norm) and accelerator.scaler is None:
        ids = ", ".join(step.micro_batches[0].lesion_ids[:8])
        raise InputError(
            f"step {number + 1}: the gradient is not finite, stopped before the step; first lesions of the batch on "
            f"rank {accelerator.process_index}: {ids}; lower train.optim.lr or set train.precision=fp32"
        )
    optimizer.step()
    optimizer.zero_grad()
    return focal, own_sums if alone else all_sum(own_sums), norm


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Make dropout a function of (seed, step, number of the micro-batch in the global batch).

    So a resumed run needs no saved random state, a second forward repeats the first, and ranks that share a global
    batch draw what one process with accumulation would draw.
    """
    torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + micro_batch) % 2**63)


@torch.no_grad()
def _sums_ahead(
    wrapped: nn.Module,
    loss: CompoundLoss,
    step: Step,
    config: TrainConfig,
    seed: int,
    number: int,
    first: int,
    previous: torch.Tensor | None,
) -> torch.Tensor:
    """Soft F1 sums of the global batch before any backward, (3, 3, C)."""
    sums = torch.zeros(3, 3, len(DIAGNOSES), device=step.micro_batches[0].labels.device)
    if config.loss.soft_f1_weight == 0:
        return sums
    if config.loss.soft_f1_sums == "previous" and previous is not None:
        return previous.to(sums.device)
    with _still_running_statistics(wrapped):
        for i, batch in enumerate(step.micro_batches):
            seed_dropout(seed, number, first + i)
            sums += loss.sums(forward(wrapped, batch), batch.labels, batch.valid)
    return all_sum(sums)


@contextlib.contextmanager
def _still_running_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norms use the batch's statistics but do not record them: the real pass will."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _keep_weights(accelerator: Accelerator, wrapped: nn.Module, folder: Path, state: TrainState) -> None:
    """The weights that predict, whole and under canonical keys."""
    weights = whole_state(accelerator, wrapped)
    if accelerator.is_main_process:
        save_weights(folder / "weights", weights, epoch=state.best_epoch, validation_macro_f1=state.best_score)
    accelerator.wait_for_everyone()
