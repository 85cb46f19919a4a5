"""Collectives over all ranks, and what to do when one is lost."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import (
    broadcast_object_list,
)

from triderm_dist.cli import Interrupted
from triderm_dist.schema import InputError


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is rank 0, also before `start`."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def interrupt_on_lost_rank() -> Iterator[None]:
    """Raises Interrupted, which says what to do, where another rank is gone or has not answered for rank_timeout.

    It goes round what ranks do together; also as a decorator.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors. NCCL's watchdog ends the process by itself, with the same meaning.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        rank, said = os.environ.get("RANK", "0"), str(error).splitlines()[0]
        raise Interrupted(
            f"rank {rank} has lost touch with another rank ({said}); when all hosts are there again, the same command "
            "goes on from the last checkpoint"
        ) from None


def is_distributed() -> bool:
    """Whether there are other ranks to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Until every rank is here, also before `start` where the launcher has joined the ranks."""
    if is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


T = TypeVar("T")


@functools.cache
def _gloo_group() -> Any:
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
    if is_distributed():
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
