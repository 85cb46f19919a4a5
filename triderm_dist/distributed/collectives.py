"""Collectives over all ranks, and what happens when a rank is lost."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list

from triderm_dist.cli import Interrupted
from triderm_dist.schema import Busy, InputError


def world_size() -> int:
    """Return the number of processes that the launcher started, also before `start`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process among all ranks, also before `start`."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Return whether this process is rank 0, also before `start`."""
    return rank() == 0


@contextmanager
def interrupt_on_lost_rank() -> Iterator[None]:
    """Context or decorator for code with collectives. Raises Interrupted if another rank died or did not answer within
    rank_timeout.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors. NCCL's watchdog ends the process itself, with the same meaning.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise Interrupted(
            f"rank {rank()} lost contact with another rank ({str(error).splitlines()[0]}). When all hosts are back, "
            "rerun the same command to resume from the last checkpoint"
        ) from None


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


T = TypeVar("T")


@functools.cache
def gloo_group() -> Any:
    """Return the group of all ranks over gloo, for tensors on the CPU."""
    return dist.new_group(backend="gloo")


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and broadcast its result; call on all ranks. InputError, Busy and OSError are raised on all
    of them, so that none waits for rank 0.
    """
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except (InputError, Busy, OSError) as error:
            outcome[1] = error
    if is_distributed():
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
