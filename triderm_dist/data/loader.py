"""Load the batches of a plan: read, decode, move to the device, augment and normalize.

Threads decode to uint8 into a ring of reused host buffers: decoders release the GIL, and moving photos between
processes costs more than decoding them. Geometry, color and normalization run batched on the device; on a CPU with
OpenCV, in the same threads, photo by photo. The loader is not prepared by Accelerate: the plan has already given each
rank its part.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from simplejpeg import decode_jpeg

from triderm_dist.config import AugmentConfig, Frame
from triderm_dist.data.augment import (
    Crops,
    LesionRng,
    PhotoTransform,
    dihedral,
    drop_inputs,
    lesion_keys,
    normalize,
    to_device,
)
from triderm_dist.data.host_augment import HostTransform, opencv
from triderm_dist.data.lesions import Lesions
from triderm_dist.data.plan import EpochPlan, PlannedBatch, RankBatches, Samples, Sampling
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.reader import FolderShards, RemoteShards
from triderm_dist.data.threads import Decoders
from triderm_dist.data.token_cache import JoinedCache, TokenCache
from triderm_dist.data.upload import DataWait, Upload
from triderm_dist.runtime.usage import add_data_wait
from triderm_dist.schema import VIEWS, Batch, DataError

JOB_LESIONS = 16
"""Most lesions of a job of a decoder thread: enough to make scheduling cheap."""

PREPARED_LESIONS = 512
"""Lesions whose ids, metadata and random draws are looked up together, before their photos are read."""

SPARE_BUFFERS = 2
"""Host buffers of a GPU's loader beside those that are being filled: the oldest has been copied by the time that it is
filled again, so that the host does not wait for its copy.
"""


@dataclass
class Fetched:
    """Host tensors (B, ...) of the views, which are filled when the jobs are done.

    memory: the source's own record of their position.
    """

    views: list[torch.Tensor]
    jobs: list[Future[None]]
    memory: Any = None


class ViewSource(Protocol):
    """The source of the task's views of a lesion: photos in shards, or cached tokens of a frozen tower."""

    def read_ahead(self, rows: np.ndarray, batch: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Prepare for reads of rows (n,) by all ranks in this order, `batch` rows per step; row -1 is not read here.

        Yields a function to call with the number of steps read so far.
        """

    def fetch(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, device: torch.device) -> Fetched:
        """Start to read the views of rows (B,), for `finish` on this device with these random numbers."""

    def finish(self, fetched: Fetched, device: torch.device, rng: LesionRng | None) -> dict[str, torch.Tensor]:
        """Return the network's input on the device by view, and release the host tensors for reuse."""

    def transformed(self, batch: Batch, rows: np.ndarray, transform: int) -> Batch:
        """Return the batch of these index rows (B,), loaded without augmentation, under one of the 8 transforms of the
        dihedral group.
        """


class CanvasSource:
    """Photos (B, 3, size, size), normalized for a tower, and augmented if there is an rng.

    Every photo is fitted to `canvas` (width, height) by `fit_to_canvas`. A subclass tells where photos are and decodes
    them.
    """

    def __init__(
        self,
        canvas: tuple[int, int],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        views: Sequence[str],
        augment: AugmentConfig | None = None,
        frame: Frame = "square",
    ) -> None:
        """views: to read, a black photo where a lesion has none.  frame: see `TowerConfig`."""
        self.canvas, self.views, self.mean, self.std = canvas, views, mean, std
        self.transform = PhotoTransform(image_size, augment or AugmentConfig(), frame)
        self._free: deque[_Buffers] = deque()
        self._upload = Upload()
        self._lesions = 0  # that a buffer holds: of the largest request
        self._host_transform: HostTransform | None = None
        self._scratch = threading.local()

    def locate(self, rows: np.ndarray) -> list[Any]:
        """Return what `decode` needs to find the photos of each of these rows (B,)."""
        raise NotImplementedError

    def decode(self, out: Sequence[np.ndarray], row: int, location: Any) -> None:
        """Decode a row's photo of each view into the array (H, W, 3) of the view; black where missing."""
        raise NotImplementedError

    def close(self) -> None:
        self.free_buffers()

    def free_buffers(self) -> None:
        """Free the host tensors, which are as large as the largest request so far."""
        self._free.clear()
        self._upload.clear()
        self._lesions = 0

    def read_ahead(self, rows: np.ndarray, batch: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        return contextlib.nullcontext(lambda steps: None)

    def fetch(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, device: torch.device) -> Fetched:
        if device.type == "cpu" and (host := self._host()) and host.supports(rng):
            return self._fetch_crops(pool, rows, rng, host)
        if len(rows) > self._lesions:
            self._lesions = len(rows)
            self._free.clear()
        spare = SPARE_BUFFERS if device.type == "cuda" else 0
        if len(self._free) > spare:
            buffers = self._free.popleft()
        else:
            buffers = _Buffers.new(self._lesions, len(self.views), self.canvas)
        buffers.wait()
        numbers, locations = rows.tolist(), self.locate(rows)
        jobs = []
        for part in pool.jobs(len(rows), JOB_LESIONS):
            out = [array[part] for array in buffers.arrays]
            jobs.append(pool.submit(self._read, numbers[part], locations[part], out))
        views = buffers.views if len(rows) == self._lesions else [view[: len(rows)] for view in buffers.views]
        return Fetched(views, jobs, buffers)

    def finish(self, fetched: Fetched, device: torch.device, rng: LesionRng | None) -> dict[str, torch.Tensor]:
        if fetched.memory is None:
            return {
                name: self._finish_crops(view.permute(0, 3, 1, 2), name, rng)
                for name, view in zip(self.views, fetched.views, strict=True)
            }
        pixels = {}
        with self.uploaded(fetched, device) as photos:
            for name, photo in zip(self.views, photos, strict=True):
                crops = self.transform(photo, name, rng)
                pixels[name] = normalize(crops.contiguous(memory_format=torch.channels_last), self.mean, self.std)
        return pixels

    @contextlib.contextmanager
    def uploaded(self, fetched: Fetched, device: torch.device) -> Iterator[list[torch.Tensor]]:
        """Yield the photos of `fetch` (B, H, W, 3) uint8 on the device, for what is queued inside the block, and reuse
        the host tensors afterwards.
        """
        with self._upload(fetched.views, device) as (photos, copied):
            yield photos
        self.release(fetched, copied)

    def _fetch_crops(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, host: HostTransform) -> Fetched:
        """Start to read the views of rows (B,) as crops (B, size, size, 3) float32.

        They are normalized, or in [0, 1] where augmentations of plugins follow.
        """
        size = self.transform.size
        views = [torch.empty((len(rows), size, size, 3)) for _ in self.views]
        crops = [host.crops(len(rows), name, rng) for name in self.views]
        arrays, locations = [view.numpy() for view in views], self.locate(rows)
        jobs = []
        for part in pool.jobs(len(rows), JOB_LESIONS):
            numbers = range(part.start, part.stop)
            jobs.append(pool.submit(self._read_crops, host, crops, numbers, rows, locations, arrays))
        return Fetched(views, jobs)

    def _finish_crops(self, crops: torch.Tensor, view: str, rng: LesionRng | None) -> torch.Tensor:
        """Apply what follows to crops (B, 3, size, size) of `_fetch_crops`."""
        if not self.transform.extra:
            return crops
        augmented = self.transform.finish(crops, view, rng)
        return normalize(augmented.contiguous(memory_format=torch.channels_last), self.mean, self.std)

    def _host(self) -> HostTransform | None:
        """Return the transform for single photos on the CPU; None without OpenCV."""
        if self._host_transform is None and (cv2 := opencv()):
            width, height = self.canvas
            mean, std = ((0.0,) * 3, (1.0,) * 3) if self.transform.extra else (self.mean, self.std)
            self._host_transform = HostTransform(self.transform, height, width, mean, std, cv2)
        return self._host_transform

    def transformed(self, batch: Batch, rows: np.ndarray, transform: int) -> Batch:
        if transform == 0:
            return batch
        pixels: dict[str, Any] = {
            view: dihedral(getattr(batch, view), transform).contiguous(memory_format=torch.channels_last)
            for view in self.views
        }
        return replace(batch, **pixels)

    def release(self, fetched: Fetched, copied: torch.cuda.Event | None = None) -> None:
        """Reuse the host tensors of `fetch`, as soon as this event has happened."""
        buffers: _Buffers = fetched.memory
        buffers.copied = copied
        if len(buffers.views[0]) == self._lesions:
            self._free.append(buffers)

    def _read(self, rows: list[int], locations: list[Any], arrays: list[np.ndarray]) -> None:
        """Decode the photos of some lesions of a batch: the work of one job.

        arrays: their part (n, H, W, 3) of the batch, by view.
        """
        for row, location, out in zip(rows, locations, zip(*arrays, strict=True), strict=True):
            self.decode(out, row, location)

    def _read_crops(
        self,
        host: HostTransform,
        crops: list[Crops],
        numbers: Iterable[int],
        rows: np.ndarray,
        locations: list[Any],
        arrays: list[np.ndarray],
    ) -> None:
        """Decode the photos of the lesions of these numbers in the batch, and write their crops to `arrays`."""
        if not hasattr(self._scratch, "photos"):
            self._scratch.photos = [array[0] for array in _Buffers.new(1, len(self.views), self.canvas).arrays]
        photos = self._scratch.photos
        for number in numbers:
            self.decode(photos, int(rows[number]), locations[number])
            for photo, view_crops, out in zip(photos, crops, arrays, strict=True):
                host(photo, view_crops, number, out[number])


class PhotoSource(CanvasSource):
    """Photos of a packed set, fitted to its canvas (`ShardIndex.canvas`)."""

    def __init__(
        self,
        index: ShardIndex,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: AugmentConfig | None = None,
        views: Sequence[str] | None = None,
        cache_share: float = 1.0,
        frame: Frame = "square",
    ) -> None:
        """views: to read, a black photo where the set has none; default those of its task.  cache_share: see
        `RemoteShards`.  frame: see `TowerConfig`.
        """
        super().__init__(index.canvas, image_size, mean, std, views or index.signature.views, augment, frame)
        self.index = index
        self.shards = RemoteShards(index, cache_share) if index.remote else FolderShards(index)

    def close(self) -> None:
        self.shards.close()
        super().close()

    def read_ahead(self, rows: np.ndarray, batch: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        return self.shards.read_ahead(np.where(rows < 0, -1, self.index.shard[rows]), batch)

    def locate(self, rows: np.ndarray) -> list[_Location]:
        index, at = self.index, [VIEWS.index(view) for view in self.views]
        columns = (index.shard[rows], index.offsets[rows][:, at], index.sizes[rows][:, at])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def decode(self, out: Sequence[np.ndarray], row: int, location: _Location) -> None:
        shard, offsets, sizes = location
        ends = list(map(operator.add, offsets, sizes))
        # The photos of a lesion are neighbors in their tar; if there is none, the size is 0.
        start = min(itertools.compress(offsets, sizes), default=0)
        data = memoryview(self.shards.read(shard, start, max(ends) - start) if any(sizes) else b"")
        for number, canvas in enumerate(out):
            photo = data[offsets[number] - start : ends[number] - start]
            if not sizes[number]:
                canvas[:] = 0
                continue
            try:
                decode_into(canvas, photo)
            except ValueError as error:
                index = self.index
                raise DataError(
                    f"{index.path(shard)}: the {self.views[number]} photo of lesion {index.lesion_ids[row]} does not "
                    f"decode ({error}); run triderm verify, then pack again"
                ) from None


_Location = tuple[int, list[int], list[int]]
"""The shard of a lesion, and offset and size of the photo of each view in it: Python numbers, since threads should do
little under the GIL.
"""


@dataclass
class _Buffers:
    """Host tensors of the views (B, H, W, 3) uint8, pinned if there is a GPU, the same as arrays, and the end of the
    copy that still reads them.
    """

    views: list[torch.Tensor]
    arrays: list[np.ndarray]
    copied: torch.cuda.Event | None = None

    @classmethod
    def new(cls, lesions: int, views: int, canvas: tuple[int, int]) -> _Buffers:
        width, height = canvas
        photos = [_empty_photos(lesions, height, width) for _ in range(views)]
        return cls(photos, [view.numpy() for view in photos])

    def wait(self) -> None:
        if self.copied:
            self.copied.synchronize()


class TokenSource:
    """Cached tokens (B, L, D) of a frozen tower, or what frozen blocks return (B, ...).

    An rng picks one of the cached `variants` for each lesion and view; `transforms` are the cached versions under the
    transforms of the dihedral group, the plain one first.

    views: names of the cache's views, in its order.
    """

    def __init__(
        self,
        cache: TokenCache | JoinedCache,
        variants: Sequence[str],
        transforms: Sequence[str],
        views: Sequence[str] = VIEWS,
    ) -> None:
        self.cache, self.variants, self.transforms, self.views = cache, variants, transforms, views
        self._upload = Upload()

    @contextlib.contextmanager
    def read_ahead(self, rows: np.ndarray, batch: int) -> Iterator[Callable[[int], None]]:
        yield lambda steps: None

    def fetch(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, device: torch.device) -> Fetched:
        buffers = [self._buffer(rows) for _ in self.views]
        jobs = []
        for v, name in enumerate(self.views):
            if rng is None:
                chosen = [self.transforms[0]] * len(rows)
            else:
                pick = np.floor(rng.uniform(f"{name}/variant") * len(self.variants)).astype(int)
                chosen = [self.variants[i] for i in pick]
            records, size = buffers[v].numpy(), max(JOB_LESIONS, -(-len(rows) // pool.workers))
            for part in (slice(start, start + size) for start in range(0, len(rows), size)):
                jobs.append(pool.submit(self.cache.read, rows[part], v, chosen[part], records[part]))
        return Fetched(buffers, jobs)

    def finish(self, fetched: Fetched, device: torch.device, rng: LesionRng | None) -> dict[str, torch.Tensor]:
        with self._upload(fetched.views, device) as (on_device, copied):
            # Copied also if they are float32: the next batch overwrites what has been uploaded.
            floats = [self.cache.decode(records, copy=copied is not None) for records in on_device]
        return dict(zip(self.views, floats, strict=True))

    def transformed(self, batch: Batch, rows: np.ndarray, transform: int) -> Batch:
        if transform == 0:
            return batch
        views = [self._buffer(rows) for _ in self.views]
        for v, tokens in enumerate(views):
            self.cache.read(rows, v, [self.transforms[transform]] * len(rows), tokens.numpy())
        tokens_of: dict[str, Any] = self.finish(Fetched(views, []), batch.labels.device, None)
        return replace(batch, **tokens_of)

    def _buffer(self, rows: np.ndarray) -> torch.Tensor:
        """Return memory for the records of rows (B,), pinned if there is a GPU: PyTorch reuses it once it is copied."""
        return torch.empty((len(rows), self.cache.record_size), dtype=torch.uint8, pin_memory=torch.cuda.is_available())


class JointSource:
    """The views of one set from several caches, each of which has some of them."""

    def __init__(self, sources: Sequence[TokenSource]) -> None:
        self.sources = sources

    def read_ahead(self, rows: np.ndarray, batch: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        return contextlib.nullcontext(lambda steps: None)

    def fetch(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, device: torch.device) -> Fetched:
        parts = [source.fetch(pool, rows, rng, device) for source in self.sources]
        views, jobs = ([each for part in parts for each in getattr(part, name)] for name in ("views", "jobs"))
        return Fetched(views, jobs, parts)

    def finish(self, fetched: Fetched, device: torch.device, rng: LesionRng | None) -> dict[str, torch.Tensor]:
        parts = zip(self.sources, fetched.memory, strict=True)
        return {view: tokens for source, part in parts for view, tokens in source.finish(part, device, rng).items()}

    def transformed(self, batch: Batch, rows: np.ndarray, transform: int) -> Batch:
        for source in self.sources:
            batch = source.transformed(batch, rows, transform)
        return batch


@dataclass
class Step:
    """One rank's part of a global batch, in micro-batches. count: valid lesions of the global batch on all ranks."""

    number: int
    count: int
    micro_batches: list[Batch]
    rows: np.ndarray


class Loader:
    """Iterates over the steps of a plan for one rank, decoding `prefetch` micro-batches ahead in `workers` threads.

    augment: augment photos and drop views and concepts, with random numbers of (seed, epoch, lesion, copy).  `wait`:
    how long the device had to wait for data.
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
                pending: deque[_Pending] = deque()
                parts = self._parts()
                ready: list[Batch] = []
                steps = 0
                while True:
                    with self.wait():
                        while len(pending) < self.prefetch and (part := next(parts, None)) is not None:
                            part.fetched = self.source.fetch(pool, part.rows, part.rng, self.device)
                            pending.append(part)
                        if not pending:
                            return
                        part = pending.popleft()
                        part.await_photos()
                    ready.append(self._finish(part))
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

    def _parts(self) -> Iterator[_Pending]:
        """Yield the micro-batches of the plan. What needs no photo is prepared for `PREPARED_LESIONS` at a time: it is
        done under the GIL, which the decoders need, and on a GPU each copy is a call.
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
                    own = {name: tensor[part] for name, tensor in tensors.items()}
                    yield _Pending(batch, rows[part], ids[part], own, rng and rng.take(part), part.stop == end)

    def _finish(self, part: _Pending) -> Batch:
        assert part.fetched is not None
        views = self.source.finish(part.fetched, self.device, part.rng)
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


@dataclass
class _Pending:
    """A micro-batch whose photos are being decoded.  inputs: the other tensors of the `Batch`, on the device."""

    batch: PlannedBatch
    rows: np.ndarray
    lesion_ids: list[str]
    inputs: dict[str, torch.Tensor]
    rng: LesionRng | None
    last: bool
    fetched: Fetched | None = None

    def await_photos(self) -> None:
        """Wait until the photos are decoded. Raises what a decoder raised."""
        assert self.fetched is not None
        started = time.perf_counter()
        for job in reversed(self.fetched.jobs):
            job.exception()  # waits for the last job first, so that this thread is woken once
        for job in self.fetched.jobs:
            job.result()
        add_data_wait(time.perf_counter() - started)


def _empty_photos(number: int, height: int, width: int) -> torch.Tensor:
    """Return photos (number, height, width, 3) uint8, pinned if there is a GPU, for a decoder to fill.

    They begin 16 bytes past a multiple of 32: libjpeg-turbo writes past the caches to rows at such a multiple, which
    costs 10 of 280 microseconds a photo of 384x288, where the next reader finds it in memory only.
    """
    shape, offset = (number, height, width, 3), 16
    memory = torch.empty(offset + math.prod(shape), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return memory[offset:].view(shape)


def decode_into(out: np.ndarray, data: bytes | memoryview) -> None:
    """Decode a JPEG into `out` (H, W, 3), without a copy where it has that size. Raises ValueError if it fails."""
    try:
        photo = decode_jpeg(data, "RGB", buffer=out)
        if photo.shape == out.shape:
            return
        photo = photo.copy()  # it is in the memory of `out`
    except ValueError:  # larger than `out`, or damaged
        photo = decode_jpeg(data, "RGB")
    out[:] = fit_to_canvas(photo, *out.shape[:2])


def fit_to_canvas(photo: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fit a photo (h, w, 3) uint8 to (height, width, 3), such that its centered square becomes that of the canvas.

    A photo whose orientation (portrait or landscape) differs from the canvas is rotated by 90 degrees, since lesions
    have no upright orientation. It is scaled to the short side of the canvas; then its long side is cropped, or
    mirrored at both ends, to that of the canvas.
    """
    if (height, photo.shape[0]) > (width, photo.shape[1]):  # a portrait canvas: fit the transposed photo
        return fit_to_canvas(photo.swapaxes(0, 1), width, height).swapaxes(0, 1)
    if photo.shape[0] > photo.shape[1]:
        photo = np.rot90(photo)
    from PIL import Image

    short, long = photo.shape[:2]
    scale = height / short
    border = max(0, round((width - long * scale) / 2))
    kept = width - 2 * border
    outside = max(0.0, (long - kept / scale) / 2)
    scaled = Image.fromarray(np.ascontiguousarray(photo)).resize(
        (kept, height), Image.Resampling.BILINEAR, box=(outside, 0, long - outside, short)
    )
    return np.pad(np.asarray(scaled), ((0, 0), (border, border), (0, 0)), mode="symmetric")
