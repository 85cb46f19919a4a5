"""From planned rows to batches on the device.

Threads read and decode to uint8 (decoders release the interpreter lock, and moving photos between processes costs
more than decoding them); geometry, colour and normalisation run batched on the device. The loader is not prepared by
Accelerate: the plan has already given each rank its part.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from triderm_dist.config import AugmentConfig
from triderm_dist.data.augment import Draws, dihedral, hide, lesion_keys, normalise, view_transform
from triderm_dist.data.plan import PlannedBatch
from triderm_dist.data.shards import ShardIndex
from triderm_dist.data.tokens import TokenCache
from triderm_dist.schema import VIEWS, Batch, DataError


class ViewSource(Protocol):
    """Where the two views of a lesion come from: photos in shards, or cached tokens of a frozen tower."""

    def fetch(
        self, pool: ThreadPoolExecutor, rows: np.ndarray, draws: Draws | None, transform: int
    ) -> tuple[list[torch.Tensor], list[Future[None]]]:
        """Host tensors of both views, which are filled when the futures are done."""

    def finish(
        self, views: list[torch.Tensor], device: torch.device, draws: Draws | None, transform: int
    ) -> list[torch.Tensor]:
        """What the network takes, on the device."""


class PhotoSource:
    """Photos (B, 3, size, size) of a packed set, normalised for a tower.

    All photos are brought to the canvas, the size of the first one; where another size occurs, a photo is resized to
    cover the canvas and cropped to it. Draws augment; `transform` is one of the 8 of the dihedral group.
    """

    def __init__(
        self,
        index: ShardIndex,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: AugmentConfig | None = None,
    ) -> None:
        self.index, self.image_size, self.mean, self.std = index, image_size, mean, std
        self.augment = augment or AugmentConfig()
        self._files = [os.open(index.folder / shard.url, os.O_RDONLY) for shard in index.shards]
        row, view = np.argwhere(index.sizes > 0)[0]
        self.canvas = _decode(self._bytes(row, view), index, row, view).shape[:2]

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def fetch(
        self, pool: ThreadPoolExecutor, rows: np.ndarray, draws: Draws | None, transform: int
    ) -> tuple[list[torch.Tensor], list[Future[None]]]:
        pin = torch.cuda.is_available()
        buffers = [torch.empty((len(rows), *self.canvas, 3), dtype=torch.uint8, pin_memory=pin) for _ in VIEWS]
        arrays = [buffer.numpy() for buffer in buffers]
        jobs = [pool.submit(self._read, row, v, arrays[v][i]) for i, row in enumerate(rows) for v in range(len(VIEWS))]
        return buffers, jobs

    def finish(
        self, views: list[torch.Tensor], device: torch.device, draws: Draws | None, transform: int
    ) -> list[torch.Tensor]:
        pixels = []
        for name, photos in zip(VIEWS, views, strict=True):
            crops = view_transform(photos.to(device, non_blocking=True), self.image_size, draws, self.augment, name)
            turned = dihedral(crops, transform).contiguous(memory_format=torch.channels_last)
            pixels.append(normalise(turned, self.mean, self.std))
        return pixels

    def _bytes(self, row: int, view: int) -> bytes:
        shard = self.index.shard[row]
        return os.pread(self._files[shard], int(self.index.sizes[row, view]), int(self.index.offsets[row, view]))

    def _read(self, row: int, view: int, out: np.ndarray) -> None:
        if self.index.sizes[row, view] == 0:
            out[:] = 0
            return
        photo = _decode(self._bytes(row, view), self.index, row, view)
        out[:] = photo if photo.shape == out.shape else _cover(photo, out.shape[0], out.shape[1])


class TokenSource:
    """Tokens (B, L, D) of a frozen tower. Draws pick one of the cached augmented versions, or the plain one."""

    def __init__(self, cache: TokenCache, variants: Sequence[str], transforms: Sequence[str]) -> None:
        self.cache, self.variants, self.transforms = cache, variants, transforms

    def fetch(
        self, pool: ThreadPoolExecutor, rows: np.ndarray, draws: Draws | None, transform: int
    ) -> tuple[list[torch.Tensor], list[Future[None]]]:
        buffers = [torch.empty((len(rows), *self.cache.shape), dtype=torch.float16) for _ in VIEWS]
        jobs = []
        for v, name in enumerate(VIEWS):
            if draws is None:
                chosen = [self.transforms[transform]] * len(rows)
            else:
                pick = np.floor(draws(f"{name}/variant") * len(self.variants)).astype(int)
                chosen = [self.variants[i] for i in pick]
            jobs.append(pool.submit(self.cache.read, rows, v, chosen, buffers[v].numpy()))
        return buffers, jobs

    def finish(
        self, views: list[torch.Tensor], device: torch.device, draws: Draws | None, transform: int
    ) -> list[torch.Tensor]:
        return [tokens.to(device, non_blocking=True).float() for tokens in views]


@dataclass
class Step:
    """One rank's part of a global batch, in micro-batches. count: valid lesions of the whole global batch."""

    number: int
    count: int
    micro_batches: list[Batch]
    rows: np.ndarray


class Loader:
    """Iterates over the steps of a plan for one rank, decoding `prefetch` micro-batches ahead.

    With `augment` the views and concepts are augmented and hidden by draws of (seed, epoch, lesion, copy); without it
    `transform` of the dihedral group is applied. `waited` sums the seconds that the caller spent waiting for data.
    """

    def __init__(
        self,
        index: ShardIndex,
        source: ViewSource,
        batches: Iterable[PlannedBatch],
        micro_batch: int,
        device: torch.device,
        *,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        epoch: int = 0,
        transform: int = 0,
        workers: int = 2,
        prefetch: int = 4,
    ) -> None:
        self.index, self.source, self.batches, self.micro_batch, self.device = (
            index,
            source,
            batches,
            micro_batch,
            device,
        )
        self.augment, self.seed, self.epoch, self.transform = augment, seed, epoch, transform
        self.workers, self.prefetch = workers, prefetch
        self.keys = lesion_keys(index.lesion_ids)
        self.waited = 0.0

    def __iter__(self) -> Iterator[Step]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            pending: deque[_Pending] = deque()
            parts = (part for batch in self.batches for part in self._split(batch))
            step: list[_Pending] = []
            while True:
                while len(pending) < self.prefetch and (part := next(parts, None)) is not None:
                    part.views, part.jobs = self.source.fetch(pool, part.rows, part.draws, self.transform)
                    pending.append(part)
                if not pending:
                    return
                step.append(pending.popleft())
                if step[-1].last:
                    yield Step(
                        step[-1].batch.number,
                        step[-1].batch.count,
                        [self._finish(part) for part in step],
                        step[-1].batch.rows,
                    )
                    step = []
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _split(self, batch: PlannedBatch) -> Iterator[_Pending]:
        size = len(batch.rows)
        for start in range(0, size, self.micro_batch):
            part = slice(start, start + self.micro_batch)
            rows, copies = batch.rows[part], batch.copies[part]
            draws = Draws(self.seed, self.epoch, self.keys[rows], copies) if self.augment else None
            yield _Pending(batch, rows, batch.valid[part], draws, start + self.micro_batch >= size)

    def _finish(self, part: _Pending) -> Batch:
        started = time.perf_counter()
        for job in part.jobs:
            job.result()
        self.waited += time.perf_counter() - started
        rows = part.rows
        present, concepts = self.index.sizes[rows] > 0, self.index.concept_scores[rows]
        if self.augment and part.draws:
            present, concepts = hide(part.draws, self.augment, present, concepts)
        clinical, dermoscopic = self.source.finish(part.views, self.device, part.draws, self.transform)

        def move(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

        return Batch(
            lesion_ids=[str(name) for name in self.index.lesion_ids[rows]],
            clinical=clinical,
            dermoscopic=dermoscopic,
            view_present=move(present),
            concepts=move(concepts),
            metadata=move(self.index.metadata[rows]),
            labels=move(self.index.labels[rows]),
            valid=move(part.valid),
        )


@dataclass
class _Pending:
    """A micro-batch whose photos are being decoded."""

    batch: PlannedBatch
    rows: np.ndarray
    valid: np.ndarray
    draws: Draws | None
    last: bool
    views: list[torch.Tensor] = None  # type: ignore[assignment]
    jobs: list[Future[None]] = None  # type: ignore[assignment]


def _decode(data: bytes, index: ShardIndex, row: int, view: int) -> np.ndarray:
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError as error:
        shard = index.folder / index.shards[index.shard[row]].url
        raise DataError(
            f"{shard}: the {VIEWS[view]} photo of lesion {index.lesion_ids[row]} does not decode ({error}); "
            "run shards.verify, then pack again"
        ) from None


def _cover(photo: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(photo), (width, height), Image.Resampling.BILINEAR))
