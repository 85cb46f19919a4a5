"""Guard against non-finite steps: a step with a non-finite loss or gradient does not change the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from triderm_dist.data.loader import Step
from triderm_dist.distributed.collectives import is_distributed
from triderm_dist.distributed.heartbeat import note_progress
from triderm_dist.distributed.parallel import strategy_of
from triderm_dist.losses import Sums, is_built_in
from triderm_dist.schema import InputError

LARGEST_WEIGHT = 1e8
"""Training reaches no larger weights; a larger one means that a file is damaged."""


def damaged_weight(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return name and value of the first tensor value that is above `LARGEST_WEIGHT` or non-finite; "" if none."""
    for name, tensor in weights:
        if tensor.is_floating_point() and tensor.numel():
            largest = tensor.detach().abs().max().item()
            if not largest <= LARGEST_WEIGHT:
                return f"{name} holds {largest:.3g}"
    return ""


class NonFiniteGuard:
    """Prevents steps with a non-finite loss or gradient, where possible without waiting for the device.

    `before_step` tests the gradient norm, which is equal on all ranks, and sets a flag on the device. Fused optimizers
    (`fused=True` in PyTorch) read the flag as `found_inf`, the flag of the loss scaler: after the first bad step no
    step changes anything, and the host reads the flag only in `check`, before it logs, saves or validates. For other
    optimizers the host reads the flag before every step. In both cases weights, checkpoints and scores remain those of
    the last good step. DeepSpeed steps inside the last backward pass: there the host reads the flag after every step,
    and checkpoints and scores remain those of the last good step.

    Under fp16 the loss scaler handles infinite gradients: it skips the step and lowers the scale. The flag is then set
    by non-finite loss sums, which follow from non-finite outputs, and `check` also raises for a scale below 1.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
        """optimizer: the plain one, not Accelerate's wrapper."""
        self.accelerator = accelerator
        self._found_inf = torch.zeros((), device=accelerator.device)
        self._first_bad = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self._lesion_ids: dict[int, list[str]] = {}
        self._sums: dict[int, Sums] = {}
        scaled = accelerator.scaler is not None
        # torch's GradScaler recognizes optimizers that skip steps on the device by this attribute.
        fused = getattr(optimizer, "_step_supports_amp_scaling", False) and strategy_of(accelerator) != "deepspeed"
        self.check_each_step = not fused and not scaled
        """Whether the host must read the flag before every step."""
        if fused and not scaled:
            optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]

    def remember(self, number: int, step: Step) -> None:
        """Keep the lesions of optimizer step `number`, counted from 1, for `check`; call before the step is taken."""
        self._lesion_ids[number] = [name for batch in step.micro_batches for name in batch.lesion_ids]

    def before_step(self, number: int | torch.Tensor, norm: torch.Tensor, sums: Sums) -> None:
        """Check a step before the optimizer takes it.

        number: of the optimizer step, counted from 1; in a CUDA graph a scalar on the device.  norm: before clipping.
        sums: of the global batch.
        """
        if self.accelerator.mixed_precision == "fp16":
            norm = torch.stack([tensor.sum() for tensor in sums.values()]).sum()
        bad = norm - norm != 0  # true for NaN and infinity; launches fewer kernels than isfinite
        first = bad & (self._found_inf == 0)
        if isinstance(number, torch.Tensor):  # masked_fill_ would synchronize to read it
            torch.where(first, number, self._first_bad, out=self._first_bad)
        else:
            self._first_bad.masked_fill_(first, number)
            self._sums[number] = sums  # a graph overwrites its own
        torch.maximum(self._found_inf, bad, out=self._found_inf)
        if self.check_each_step:
            self.check()

    def check(self) -> None:
        """Raise InputError, on all ranks, if a step since the last check was bad. Waits for the device."""
        scaler = self.accelerator.scaler
        if self._found_inf.item():
            number = int(self._first_bad)
            what, advice = self._cause(self._sums.get(number, {}))
            raise InputError(
                f"step {number}: {what} is not finite; the step was not taken. {advice} to resume from the last "
                f"checkpoint, which is intact. Lesions of the batch: {self._all_lesion_ids(number)}"
            )
        if scaler and scaler.get_scale() < 1:
            raise InputError(
                f"step {max(self._lesion_ids, default=0)}: fp16 gradients are infinite even at a loss scale below 1; "
                "set train.precision=bf16 or fp32"
            )
        note_progress()
        self._lesion_ids.clear()
        self._sums.clear()

    def _cause(self, sums: Sums) -> tuple[str, str]:
        """Return what is not finite in a step with these loss sums, and what to do.

        Terms of plugins are named where they alone are not finite, or may have a gradient that is not.
        """
        hint = "" if self.accelerator.mixed_precision == "no" else " or train.precision=fp32"
        advice = f"Rerun the command with a lower train.optim.lr{hint}"
        bad = [name for name, each in sums.items() if not each.isfinite().all()]
        if bad and not any(map(is_built_in, bad)):
            return f"train.loss.terms.{bad[0]}", "Correct the term and rerun the command"
        if not bad and (terms := [name for name in sums if not is_built_in(name)]):
            advice += f", or correct train.loss.terms.{terms[0]} if its gradient is infinite or NaN,"
        return "loss or gradient", advice

    def _all_lesion_ids(self, number: int) -> str:
        """Return the lesions of a step on all ranks, comma-separated."""
        local = self._lesion_ids[number]
        parts: list[Any] = [local]
        if is_distributed():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, local)
        return ", ".join(lesion_id for part in parts for lesion_id in part)
