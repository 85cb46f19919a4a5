"""One optimizer step over a global batch that is split over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.config import TrainConfig
from triderm_dist.data.loader import Step
from triderm_dist.distributed.collectives import all_reduce_sum
from triderm_dist.distributed.parallel import accumulate, backward, clip_grad_norm, unwrap
from triderm_dist.engine.batch_norm import RunningStatistics
from triderm_dist.engine.evaluate import forward
from triderm_dist.engine.finite import NonFiniteGuard
from triderm_dist.losses import CompoundLoss, Sums
from triderm_dist.models.dropout import LesionMasks


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step. Its tensors are on the device, which may still be computing them.

    sums: the loss sums of the global batch.  count: its valid lesions.  grad_norm: global norm before clipping.
    """

    sums: Sums
    count: int
    grad_norm: torch.Tensor


class TrainStep:
    """Takes optimizer steps. Each rank holds some micro-batches of the global batch.

    It does not wait for the device, unless the optimizer cannot skip a step itself (`NonFiniteGuard`).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: CompoundLoss,
        config: TrainConfig,
        guard: NonFiniteGuard,
    ) -> None:
        """wrapped, optimizer: as `parallel.wrap` prepared them."""
        self.accelerator, self.wrapped, self.optimizer, self.loss = accelerator, wrapped, optimizer, loss
        self.config, self.guard = config, guard
        self.masks = LesionMasks(unwrap(wrapped), accelerator.device)

    def __call__(self, step: Step, number: int, previous: Sums | None = None) -> StepResult:
        """Take optimizer step `number`, counted from 0. Call on all ranks.

        The loss sums of the global batch must be known before the first backward pass. A single micro-batch takes them
        from its own forward pass, several from a first pass without gradients and with the same dropout. With
        train.loss.soft_f1_sums=previous both use the sums of the step before (`previous`), where there was one.
        """
        micro_batches, loss = step.micro_batches, self.loss
        statistics = RunningStatistics(self.wrapped)
        local = Sums()
        ahead = self._known_ahead(previous)
        if ahead is None and len(micro_batches) > 1:
            ahead = self._first_pass(step)
        slopes = None if ahead is None else loss.slopes(ahead, step.count)
        for i, batch in enumerate(micro_batches):
            last = i + 1 == len(micro_batches)
            with accumulate(self.accelerator, self.wrapped, last), self.masks.of(batch):
                statistics.rewind()
                outputs = forward(self.wrapped, batch)
                statistics.add()
                sums = loss.sums(outputs, batch)
                local = _added(local, sums)
                if slopes is None:
                    local = _all_reduced(local)
                    slopes = loss.slopes(local, step.count)
                backward(self.accelerator, loss.surrogate(sums, slopes))
        statistics.finish(self.accelerator, len(micro_batches))
        result = StepResult(
            local if ahead is None else _all_reduced(local), step.count,
            clip_grad_norm(self.accelerator, self.wrapped, self.config.optim.clip_norm),
        )  # fmt: skip
        self.guard.before_step(number + 1, step, result.grad_norm, result.sums)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result

    def _known_ahead(self, previous: Sums | None) -> Sums | None:
        """Return the loss sums to use if no forward pass is needed for them; empty if the loss uses none."""
        if not self.loss.ratios:
            return {}
        if self.config.loss.soft_f1_sums == "previous" and previous and set(self.loss.ratios) <= set(previous):
            return previous
        return None

    @torch.no_grad()
    def _first_pass(self, step: Step) -> Sums:
        """Compute the loss sums of the global batch."""
        local = Sums()
        for batch in step.micro_batches:
            with self.masks.of(batch):
                local = _added(local, self.loss.sums(forward(self.wrapped, batch), batch))
        return _all_reduced(local)


def _added(total: Sums, part: Sums) -> Sums:
    """Return total + part, without gradient; an empty total is 0."""
    return {name: total[name] + sums.detach() if total else sums.detach() for name, sums in part.items()}


def _all_reduced(sums: Sums) -> Sums:
    """Sum over all ranks in one all-reduce."""
    flat = all_reduce_sum(torch.cat([tensor.flatten() for tensor in sums.values()]))
    parts = flat.split([tensor.numel() for tensor in sums.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(sums.items(), parts, strict=True)}
