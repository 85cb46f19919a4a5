"""Collectives over all ranks, and errors when a rank is lost."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from triderm_dist.cli import Interrupted, exit_code
from triderm_dist.distributed import heartbeat
from triderm_dist.distributed.library_errors import DOCTOR, is_backend_error, permanent_fault, reason_of
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import Busy, InputError


def world_size() -> int:
    """Return the number of processes that the launcher started, also before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among all ranks, also before they have joined."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Return whether this process is rank 0, also before they have joined."""
    return rank() == 0


@contextmanager
def interrupt_on_lost_rank() -> Iterator[None]:
    """Context manager or decorator for code with collectives.

    Raises Interrupted if another rank died, or did not answer within rank_timeout after the first progress, and
    InputError for permanent faults of the backends (see `heartbeat`). Sends other errors of this rank to the other
    ranks, which then end with the same exit code.
    """
    try:
        yield
    except Exception as error:
        beat, raised = heartbeat.current(), error
        if is_backend_error(error):
            raised = beat.explain(error) if beat else _before_contact(error)
        if beat and not isinstance(error, Interrupted):
            beat.note_failure(exit_code(raised), one_line(raised, 400))
        if raised is error:
            raise
        raise raised from None


def _before_contact(error: Exception) -> InputError:
    """Return the error to raise if the ranks have never reached each other."""
    what = permanent_fault(error) or f"the ranks did not reach one another ({reason_of(error)}); {DOCTOR}"
    return InputError(f"rank {rank()}: {what}")


def is_distributed() -> bool:
    """Return whether a process group of more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all ranks; return at once without a process group."""
    if is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks in place and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Take the largest value of all ranks, element by element, in place and return the tensor."""
    if is_distributed():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather_on_main(tensor: torch.Tensor) -> torch.Tensor | None:
    """Concatenate the tensors (n, ...) of all ranks, of equal shape, on rank 0; return None on the others."""
    if not is_distributed():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(tensor.contiguous(), parts)
    return None if parts is None else torch.cat(parts)


T = TypeVar("T")


@functools.cache
def gloo_group() -> Any:
    """Return the gloo group of all ranks, for tensors on the CPU."""
    beat = heartbeat.current()
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=beat.timeout) if beat else None)


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and broadcast its result. Call on all ranks.

    Raises InputError, Busy and OSError of `work` on all ranks, so that no rank waits for rank 0.
    """
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except (InputError, Busy, OSError) as error:
            outcome[1] = error
    if is_distributed():
        dist.broadcast_object_list(outcome, group=gloo_group())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
