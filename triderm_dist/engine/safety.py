"""What keeps a run from losing work: stopping at a step boundary when asked to, and never stepping on what is not
finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from triderm_dist.cli import Interrupted, taking_signals
from triderm_dist.engine.parallel import is_main, many, way
from triderm_dist.schema import InputError

T = TypeVar("T")


class Stop:
    """While it is open, SIGTERM and SIGUSR1 to any rank raise Interrupted in `check` of all ranks, at the same call.

    The device is never asked. Every check launches an all-reduce of one number between the hosts (gloo, whatever the
    gradients travel by) and reads the one that the check before had launched, which is done by then: a stop is agreed
    on one check late, and nobody waits.
    """

    def __init__(self) -> None:
        self._asked = torch.zeros(1)
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._signals: AbstractContextManager[None] = taking_signals(self._receive)

    def __enter__(self) -> Stop:
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.__exit__(kind, error, trace)
        if error is None:
            self._finish()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._asked.fill_(1)

    def check(self) -> None:
        """Call on all ranks the same number of times, where work can be taken up again."""
        if not many():
            agreed = bool(self._asked)
        else:
            before, flag = self._pending, self._asked.clone()
            self._pending = flag, dist.all_reduce(flag, group=_hosts(), async_op=True)
            if before:
                before[1].wait()
            agreed = before is not None and bool(before[0])
        if agreed:
            self._finish()
            raise Interrupted("stopped where everything is saved; the same command goes on")

    def check_now(self) -> None:
        """`check` that waits for the other ranks and so sees every signal until here."""
        self.check()
        self.check()

    @contextmanager
    def saves(self, save: Callable[[], None]) -> Iterator[None]:
        """Where a check inside the block stops, `save` is called on all ranks."""
        try:
            yield
        except Interrupted:
            save()
            raise

    def _finish(self) -> None:
        if self._pending:
            self._pending[1].wait()  # all ranks have launched it
            self._pending = None


@functools.cache
def _hosts() -> Any:
    """A group of all ranks that talks between the hosts."""
    return dist.new_group(backend="gloo")


def on_main(work: Callable[[], T]) -> T:
    """What rank 0 gets from `work`, on all ranks; call on all. Bad input, or a file that can't be read or written, is
    raised on all of them, so that none waits for rank 0.
    """
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except (InputError, OSError) as error:
            outcome[1] = error
    if many():
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


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
        self.accelerator, self._deepspeed = accelerator, way(accelerator) == "deepspeed"
        self._found = torch.zeros((), device=accelerator.device)
        self._first = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self._seen: dict[int, list[str]] = {}
        if not self._deepspeed and accelerator.scaler is None:
            optimizer.found_inf = self._found  # type: ignore[attr-defined]

    def watch(self, number: int, lesion_ids: list[str], norm: torch.Tensor, sums: torch.Tensor) -> None:
        """Before the optimiser's step `number`, counted from 1, over this rank's lesions; norm before clipping."""
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
        if many():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, own)
        return ", ".join(name for part in parts for name in part)
