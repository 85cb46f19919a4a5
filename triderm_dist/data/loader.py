"""Load the batches of a plan: read, decode, move to the device, augment and normalize.

Sources (`photo_source`, `token_source`) read and decode in threads. The loader is not prepared by Accelerate: the plan
has already given each rank its part.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch

from triderm_dist.config import AugmentConfig
from triderm_dist.data.augment import LesionRng, drop_inputs, lesion_keys, to_device
from triderm_dist.data.lesions import Lesions
from triderm_dist.data.plan import EpochPlan, PlannedBatch, RankBatches, Samples, Sampling
from triderm_dist.data.threads import Decoders
from triderm_dist.data.upload import DataWait
from triderm_dist.data.view_source import Fetched, ViewSource
from triderm_dist.schema import VIEWS, Batch

PREPARED_LESIONS = 512
"""Lesions whose ids, metadata and random draws are prepared together, before their photos are read."""


@dataclass
class Step:
    """One rank's part of a global batch, in micro-batches. count: valid lesions of the global batch on all ranks."""

    number: int
    count: int
    micro_batches: list[Batch]
    rows: np.ndarray


class Loader:
    """Iterates over the steps of a plan for one rank, decoding `prefetch` micro-batches ahead in `workers` threads.

    augment: augment photos and drop views and concepts, with random numbers of (seed, epoch, lesion, copy).
    wait: the time that the device waited for data.
    """

    def __init__(
        self,
        index: Lesions,
        source: ViewSource,
        batches: Iterable[PlannedBatch],
        *,
        micro_batch: int,
        device: torch.device,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        epoch: int = 0,
        workers: int = 2,
        prefetch: int = 4,
    ) -> None:
        self.index, self.source, self.batches = index, source, batches
        self.micro_batch, self.device = micro_batch, device
        self.augment, self.seed, self.epoch = augment, seed, epoch
        self.workers, self.prefetch = workers, prefetch
        self.wait = DataWait(device)

    def __iter__(self) -> Iterator[Step]:
        pool = Decoders(self.workers)
        try:
            with self._read_ahead() as mark_read:
                pending: deque[tuple[_MicroBatch, Fetched]] = deque()
                parts = self._parts()
                ready: list[Batch] = []
                steps = 0
                while True:
                    with self.wait():
                        while len(pending) < self.prefetch and (part := next(parts, None)) is not None:
                            pending.append((part, self.source.fetch(pool, part.rows, part.rng, self.device)))
                        if not pending:
                            return
                        part, fetched = pending.popleft()
                        fetched.wait()
                    ready.append(self._finish(part, fetched))
                    if part.last:
                        steps += 1
                        mark_read(steps)
                        yield Step(part.batch.number, part.batch.count, ready, part.batch.rows)
                        ready = []
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        if isinstance(self.batches, RankBatches):
            return self.source.read_ahead(self.batches.rows_ahead, self.batches.global_batch)
        return contextlib.nullcontext(lambda steps: None)

    def _parts(self) -> Iterator[_MicroBatch]:
        """Yield the micro-batches of the plan.

        Other inputs are prepared for `PREPARED_LESIONS` at a time: that holds the GIL, which the decoders need, for
        less time, and copies to a GPU less often.
        """
        batches = iter(self.batches)
        while first := next(batches, None):
            more = PREPARED_LESIONS // max(1, len(first.rows)) - 1
            group = [first, *itertools.islice(batches, max(0, more))]
            rows, copies, valid = (
                np.concatenate([getattr(batch, name) for batch in group]) for name in ("rows", "copies", "valid")
            )
            inputs, rng = self.index.inputs(rows), None
            if self.augment:
                rng = LesionRng(self.seed, self.epoch, lesion_keys(inputs.lesion_ids), copies)
                present, concepts = drop_inputs(rng, self.augment, inputs.view_present, inputs.concepts)
                inputs = replace(inputs, view_present=present, concepts=concepts)
            columns = {**vars(inputs), "valid": valid}
            ids = columns.pop("lesion_ids")
            tensors = {name: to_device(array, self.device) for name, array in columns.items() if array is not None}
            end = 0
            for batch in group:
                start, end = end, end + len(batch.rows)
                for at in range(start, end, self.micro_batch):
                    part = slice(at, min(at + self.micro_batch, end))
                    inputs_of_part = {name: tensor[part] for name, tensor in tensors.items()}
                    yield _MicroBatch(
                        batch, rows[part], ids[part], inputs_of_part, rng and rng.take(part), part.stop == end
                    )

    def _finish(self, part: _MicroBatch, fetched: Fetched) -> Batch:
        views = self.source.finish(fetched, self.device, part.rng)
        for absent in [view for view in VIEWS if view not in views]:
            views[absent] = torch.empty((len(part.rows), 0), device=self.device)
        return Batch(
            part.lesion_ids, **views, **part.inputs, draws=part.rng.scoped("dropout").bits if part.rng else None
        )


_Lesions = TypeVar("_Lesions", bound=Lesions, covariant=True)


@dataclass(frozen=True)
class LoaderFactory(Generic[_Lesions]):
    """Creates the loaders of one packed set, or of a union of several, for one network.

    source: photos, or cached tokens. workers: decoder threads per rank. prefetch: micro-batches decoded ahead.
    """

    index: _Lesions
    source: ViewSource
    workers: int = 2
    prefetch: int = 4

    def create(
        self,
        batches: Iterable[PlannedBatch],
        micro_batch: int,
        device: torch.device,
        *,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        epoch: int = 0,
    ) -> Loader:
        """Return the loader of planned batches; the keywords are those of `Loader`."""
        return Loader(
            self.index, self.source, batches, micro_batch=micro_batch, device=device,
            augment=augment, seed=seed, epoch=epoch, workers=self.workers, prefetch=self.prefetch,
        )  # fmt: skip

    def sequential(
        self,
        rows: np.ndarray,
        micro_batch: int,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        epoch: int = 0,
    ) -> Loader:
        """Return a rank's loader of rows (N,) in this order, one micro-batch per step; the last one is padded."""
        plan = EpochPlan(Samples.of(self.index, rows), Sampling("sequential"), 0, 0)
        batches = plan.batches(rank, world_size, micro_batch * world_size)
        return self.create(batches, micro_batch, device, augment=augment, seed=seed, epoch=epoch)


@dataclass(frozen=True)
class _MicroBatch:
    """A micro-batch before its photos are there. inputs: the other tensors of the `Batch`, on the device."""

    batch: PlannedBatch
    rows: np.ndarray
    lesion_ids: list[str]
    inputs: dict[str, torch.Tensor]
    rng: LesionRng | None
    last: bool
