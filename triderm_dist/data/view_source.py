"""The interface of what a loader reads: photos in shards, or cached tokens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from triderm_dist.data.augment import LesionRng
from triderm_dist.data.threads import Decoders
from triderm_dist.runtime.usage import add_data_wait
from triderm_dist.schema import Batch

JOB_LESIONS = 16
"""Largest number of lesions per job of a decoder thread; more would not reduce the overhead of scheduling."""


@dataclass
class Fetched:
    """Host tensors (B, ...) of the views, which are filled when the jobs are done.

    memory: what the source needs to reuse the tensors' memory.
    """

    views: list[torch.Tensor]
    jobs: list[Future[None]]
    memory: Any = None

    @classmethod
    def join(cls, parts: Sequence[Fetched], memory: Any) -> Fetched:
        """Return the tensors and jobs of several sources as one."""
        views, jobs = [view for part in parts for view in part.views], [job for part in parts for job in part.jobs]
        return cls(views, jobs, memory)

    def wait(self) -> None:
        """Wait until the tensors are filled. Raises what a job raised."""
        started = time.perf_counter()
        for job in reversed(self.jobs):
            job.exception()  # waits for the last job first, so that this thread is woken once
        for job in self.jobs:
            job.result()
        add_data_wait(time.perf_counter() - started)


class ViewSource(Protocol):
    """The source of the task's views of a lesion: photos in shards, or cached tokens of a frozen tower."""

    def read_ahead(self, rows: np.ndarray, batch: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Prepare for reads of rows (n,) by all ranks in this order, `batch` rows per step; -1 is a row without a read.

        Yields a function to call with the number of steps read so far. By default does nothing: reads are local.
        """
        return contextlib.nullcontext(lambda steps: None)

    def fetch(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, device: torch.device) -> Fetched:
        """Start to read the views of rows (B,); `finish` with the same device and rng completes it."""

    def finish(self, fetched: Fetched, device: torch.device, rng: LesionRng | None) -> dict[str, torch.Tensor]:
        """Return the network's input on the device by view, and release the host tensors for reuse."""

    def transformed(self, batch: Batch, rows: np.ndarray, transform: int) -> Batch:
        """Return `batch`, which holds index rows (B,) without augmentation, under a transform of the dihedral group.

        transform: 0 to 7.
        """
