"""One optimizer step over a global batch that is split over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.config import TrainConfig
from triderm_dist.data.loader import Step
from triderm_dist.distributed.collectives import all_reduce_sum
from triderm_dist.distributed.parallel import accumulate, backward, clip_grad_norm, strategy_of, unwrap
from triderm_dist.engine.batch_norm import RunningStatistics
from triderm_dist.engine.evaluate import forward
from triderm_dist.engine.finite import NonFiniteGuard
from triderm_dist.losses import CompoundLoss, Count, Sums
from triderm_dist.models.dropout import LesionMasks
from triderm_dist.schema import Batch, ConfigError


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step. Its tensors are on the device, which may still be computing them.

    sums: the loss sums of the global batch.  count: its valid lesions.  grad_norm: global norm before clipping.
    """

    sums: Sums
    count: int
    grad_norm: torch.Tensor

    def sums_of(self, lesions: int) -> Sums:
        """Scale the sums to a batch of `lesions`, since a padded batch has fewer."""
        return _scaled(self.sums, lesions / self.count)


@dataclass(frozen=True)
class StepInputs:
    """Everything that differs between two optimizer steps of a training, except for the learning rates.

    keys: of the dropout masks of each micro-batch (`LesionMasks.draw`).  number: of the step, counted from 1.
    previous: the loss sums of the step before, scaled to `count`; None if the loss does not use them.
    """

    micro_batches: list[Batch]
    keys: list[torch.Tensor | None]
    count: Count
    number: int | torch.Tensor
    previous: Sums | None


class TrainStep:
    """Takes optimizer steps. Each rank holds some micro-batches of the global batch.

    It does not wait for the device, unless the optimizer cannot skip a step itself (`NonFiniteGuard`).

    forward: runs the network in evaluation.
    """

    forward = staticmethod(forward)

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
        # Terms of plugins may do what the compiler cannot trace.
        compiled = config.compile and not config.loss.terms
        self._sums = torch.compile(loss.sums, dynamic=False) if compiled else loss.sums
        # Not checked under DeepSpeed, which keeps the gradients itself and takes a missing one for 0.
        self._checked = strategy_of(accelerator) == "deepspeed"

    def __call__(self, step: Step, number: int, previous: Sums | None = None) -> StepResult:
        """Take optimizer step `number`, counted from 0. Call on all ranks.

        The loss sums of the global batch must be known before the first backward pass. A single micro-batch takes them
        from its own forward pass, several from a first pass without gradients and with the same dropout. With
        train.loss.soft_f1_sums=previous both use the sums of the step before, where there was one.
        previous: these sums, scaled to train.global_batch lesions.
        """
        sums, norm = self.compute(self.inputs(step, number, previous))
        return StepResult(sums, step.count, norm)

    def inputs(self, step: Step, number: int, previous: Sums | None) -> StepInputs:
        """Return the inputs of a step, and register its lesions with the guard."""
        self.guard.remember(number + 1, step)
        ratios, wanted = {*self.loss.ratios}, self.config.loss.soft_f1_sums == "previous"
        if previous and wanted and ratios and ratios <= {*previous}:
            previous = _scaled(previous, step.count / self.config.global_batch)
        else:
            previous = None
        keys = [self.masks.draw(batch) for batch in step.micro_batches]
        return StepInputs(step.micro_batches, keys, step.count, number + 1, previous)

    def compute(self, inputs: StepInputs) -> tuple[Sums, torch.Tensor]:
        """Compute a step from the forward pass to the update of the weights.

        Returns the loss sums of the global batch and the gradient norm before clipping.
        """
        micro_batches, loss = inputs.micro_batches, self.loss
        local = Sums()
        ahead = inputs.previous if loss.ratios else {}  # without ratios the loss needs no sums
        with self._statistics.of_step(self.accelerator, len(micro_batches)):
            if ahead is None and len(micro_batches) > 1:
                ahead = self._first_pass(inputs)
            slopes = None if ahead is None else loss.slopes(ahead, inputs.count)
            for i, (batch, keys) in enumerate(zip(micro_batches, inputs.keys, strict=True)):
                last = i + 1 == len(micro_batches)
                with accumulate(self.accelerator, self.wrapped, last), self.masks.using(keys):
                    self._statistics.rewind()
                    outputs = forward(self.wrapped, batch)
                    self._statistics.add()
                    sums = self._sums(outputs, batch)
                    local = _added(local, sums)
                    if slopes is None:
                        local = _all_reduced(local)
                        slopes = loss.slopes(local, inputs.count)
                    backward(self.accelerator, loss.surrogate(sums, slopes))
        self._check_gradients()
        total = local if ahead is None else _all_reduced(local)
        norm = clip_grad_norm(self.accelerator, self.wrapped, self.config.optim.clip_norm)
        self.guard.before_step(inputs.number, norm, total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm

    def _check_gradients(self) -> None:
        """Raise ConfigError in the first step for a parameter that the loss is independent of.

        One process would train without it, and DDP fail in the second step.
        """
        if self._checked:
            return
        self._checked = True
        parameters = unwrap(self.wrapped).named_parameters()
        if unused := [name for name, each in parameters if each.requires_grad and each.grad is None]:
            more = f" and of {len(unused) - 1} more" if len(unused) > 1 else ""
            raise ConfigError(
                f"the loss is independent of the parameter {unused[0]}{more}; use it in fuse, or do not create it"
            )

    @cached_property
    def _statistics(self) -> RunningStatistics:
        """Created in the first step, when the network is in training mode."""
        return RunningStatistics(self.wrapped)

    @torch.no_grad()
    def _first_pass(self, inputs: StepInputs) -> Sums:
        """Compute the loss sums of the global batch."""
        local = Sums()
        for batch, keys in zip(inputs.micro_batches, inputs.keys, strict=True):
            with self.masks.using(keys):
                local = _added(local, self._sums(forward(self.wrapped, batch), batch))
        return _all_reduced(local)


def _scaled(sums: Sums, factor: float) -> Sums:
    return sums if factor == 1 else {name: tensor * factor for name, tensor in sums.items()}


def _added(total: Sums, part: Sums) -> Sums:
    """Return total + part, without gradient; an empty total is 0."""
    return {name: total[name] + sums.detach() if total else sums.detach() for name, sums in part.items()}


def _all_reduced(sums: Sums) -> Sums:
    """Sum over all ranks in one all-reduce."""
    flat = all_reduce_sum(torch.cat([tensor.flatten() for tensor in sums.values()]))
    parts = flat.split([tensor.numel() for tensor in sums.values()])
    return {name: part.view_as(tensor) for (name, tensor), part in zip(sums.items(), parts, strict=True)}
