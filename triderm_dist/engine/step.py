"""One optimizer step over a global batch that is split over ranks and micro-batches."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.config import TrainConfig
from triderm_dist.data.loader import Step
from triderm_dist.distributed.collectives import all_reduce_sum
from triderm_dist.distributed.parallel import accumulate, backward, clip
from triderm_dist.engine.batch_norm import RunningStatistics
from triderm_dist.engine.evaluate import forward
from triderm_dist.engine.finite import Finite
from triderm_dist.losses import CompoundLoss
from triderm_dist.schema import DIAGNOSES


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
    finite: Finite | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One optimizer step over a global batch, of which this rank holds the micro-batches of `step`.

    Returns this rank's share of the focal values (3,), the soft F1 sums (3, 3, C) of the global batch, and the
    gradient norm before clipping, a scalar; nothing here waits for the device. The sums must be known before the first
    backward: one micro-batch takes them from its own forward; several take them from a first pass without gradients,
    with the same dropout, or from the step before if the settings say so. `finite` keeps a bad step from being taken.
    """
    alone = len(step.micro_batches) == 1
    statistics = RunningStatistics(wrapped)
    first = accelerator.process_index * len(step.micro_batches)
    sums = None if alone else _sums_ahead(wrapped, loss, step, config, seed, number, first, previous_sums)
    own_sums = torch.zeros(3, 3, len(DIAGNOSES), device=accelerator.device)
    focal = torch.zeros(3, device=accelerator.device)
    for i, batch in enumerate(step.micro_batches):
        with accumulate(accelerator, wrapped, last=i + 1 == len(step.micro_batches)):
            seed_dropout(seed, number, first + i)
            statistics.rewind()
            outputs = forward(wrapped, batch)
            statistics.take()
            own_sums += loss.sums(outputs, batch.labels, batch.valid)
            if alone:
                sums = all_reduce_sum(own_sums)
            part, focal_part = loss(outputs, batch.labels, batch.valid, step.count, sums)
            focal += focal_part
            backward(accelerator, part)
    statistics.finish(accelerator, len(step.micro_batches))
    sums = own_sums if alone else all_reduce_sum(own_sums)
    norm = clip(accelerator, wrapped, config.optim.clip_norm)
    if finite:
        finite.watch(number + 1, [name for batch in step.micro_batches for name in batch.lesion_ids], norm, sums)
    optimizer.step()
    optimizer.zero_grad()
    return focal, sums, norm


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
    for i, batch in enumerate(step.micro_batches):
        seed_dropout(seed, number, first + i)
        sums += loss.sums(forward(wrapped, batch), batch.labels, batch.valid)
    return all_reduce_sum(sums)
