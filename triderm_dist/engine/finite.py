"""Guard against non-finite steps: a step whose loss or gradient is not finite is never taken."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from triderm_dist.distributed.collectives import is_distributed
from triderm_dist.distributed.parallel import strategy_of
from triderm_dist.schema import InputError


class Finite:
    """Keeps a step whose loss or gradient is not finite from being taken, without waiting for the device.

    `watch` looks at the gradient norm on the device, the same number on all ranks, and raises a flag there that the
    fused AdamW obeys (the one that a loss scaler raises): from the first bad step on no step changes anything. `check`
    is where the host reads the flag: before it logs, saves or validates. So the weights stay those of the last good
    step, and no checkpoint or score is ever made of others.

    DeepSpeed skips such a step by itself and has waited for the device anyway: the flag is read at once. Under
    fp16 an infinite gradient is the loss scaler's business (it skips the step and lowers the scale); the flag then
    looks at the soft F1 sums, which are not finite where an output is not, and `check` at a scale that fell below 1.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator, self._deepspeed = accelerator, strategy_of(accelerator) == "deepspeed"
        self._found = torch.zeros((), device=accelerator.device)
        self._first = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self._seen: dict[int, list[str]] = {}
        if not self._deepspeed and accelerator.scaler is None:
            optimizer.found_inf = self._found  # type: ignore[attr-defined]

    def watch(self, number: int, lesion_ids: list[str], norm: torch.Tensor, sums: torch.Tensor) -> None:
        """Before the optimizer's step `number`, counted from 1, over this rank's lesions; norm before clipping."""
        self._seen[number] = lesion_ids
        bad = ~torch.isfinite(sums.sum() if self.accelerator.mixed_precision == "fp16" else norm)
        self._first.copy_(torch.where(bad & (self._found == 0), number, self._first))
        self._found.copy_(torch.maximum(self._found, bad.float()))
        if self._deepspeed:
            self.check()

    def check(self) -> None:
        """Raise InputError, on all ranks, if a step since the last check was bad. Waits for the device."""
        scaler = self.accelerator.scaler
        if self._found.item():
            number = int(self._first)
            precise = "" if self.accelerator.mixed_precision == "no" else " or train.precision=fp32"
            raise InputError(
                f"step {number}: loss or gradient is not finite; the step was not taken. The same command with a lower "
                f"train.optim.lr{precise} goes on from the last checkpoint, which is good. Lesions of its batch: "
                f"{self._ids(number)}"
            )
        if scaler and scaler.get_scale() < 1:
            raise InputError(
                f"step {max(self._seen, default=0)}: fp16 gradients stay infinite at a loss scale below 1; set "
                "train.precision=bf16 or fp32"
            )
        self._seen.clear()

    def _ids(self, number: int) -> str:
        """The lesions of a step, of all ranks."""
        own = self._seen[number]
        parts: list[Any] = [own]
        if is_distributed():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, own)
        return ", ".join(name for part in parts for name in part)
