"""Read the photos of lesions: decode, move to the device, augment and normalize.

Threads decode to uint8 into a ring of reused host buffers: decoders release the GIL, and moving photos between
processes costs more than decoding them. Geometry, color and normalization run batched on the device; on a CPU with
OpenCV, they run in the same threads, photo by photo.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from triderm_dist.config import AugmentConfig, Frame
from triderm_dist.data.augment import LesionRng, PhotoTransform, dihedral, normalize
from triderm_dist.data.canvas import decode_into, empty_photos
from triderm_dist.data.host_augment import HostTransform, opencv
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.reader import open_shards
from triderm_dist.data.threads import Decoders
from triderm_dist.data.upload import Upload
from triderm_dist.data.view_source import JOB_LESIONS, Fetched, ViewSource
from triderm_dist.schema import VIEWS, Batch, DataError

SPARE_BUFFERS = 2
"""Additional host buffers for a GPU, so that a buffer's copy to the device has finished when it is filled again."""


class CanvasSource(ViewSource):
    """Photos (B, 3, size, size), normalized for a tower, and augmented if there is an rng.

    Every photo is fitted to `canvas` (width, height) by `fit_to_canvas`. Subclasses locate and decode photos.
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
        """views: to read; a missing photo is black.  frame: see `TowerConfig`."""
        self.canvas, self.views, self.mean, self.std = canvas, views, mean, std
        self.transform = PhotoTransform(image_size, augment or AugmentConfig(), frame)
        self._free: deque[_Buffers] = deque()
        self._upload = Upload()
        self._lesions = 0  # per buffer: those of the largest request so far
        self._host_transform: HostTransform | None = None
        self._scratch = threading.local()

    def locate(self, rows: np.ndarray) -> list[Any]:
        """Return the location of the photos of each of these rows (B,), for `decode`."""
        raise NotImplementedError

    def decode(self, out: Sequence[np.ndarray], row: int, location: Any) -> None:
        """Decode a row's photos into one array (H, W, 3) per view; a missing photo is black."""
        raise NotImplementedError

    def close(self) -> None:
        self.free_buffers()

    def free_buffers(self) -> None:
        """Free the host tensors, which are as large as the largest request so far."""
        self._free.clear()
        self._upload.clear()
        self._lesions = 0

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

        def read(part: slice) -> None:
            for at in range(part.start, part.stop):
                self.decode([array[at] for array in buffers.arrays], numbers[at], locations[at])

        jobs = [pool.submit(read, part) for part in pool.jobs(len(rows), JOB_LESIONS)]
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
        """Yield the photos of `fetch` (B, H, W, 3) uint8 on the device, for work that the block queues.

        The host tensors are reused afterwards.
        """
        with self._upload(fetched.views, device) as (photos, copied):
            yield photos
        self.release(fetched, copied)

    def _fetch_crops(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, host: HostTransform) -> Fetched:
        """Start to read the views of rows (B,) as crops (B, size, size, 3) float32.

        They are normalized, or in [0, 1] if augmentations of plugins follow.
        """
        size = self.transform.size
        views = [torch.empty((len(rows), size, size, 3)) for _ in self.views]
        crops = [host.crops(len(rows), name, rng) for name in self.views]
        arrays, numbers, locations = [view.numpy() for view in views], rows.tolist(), self.locate(rows)

        def read(part: slice) -> None:
            photos = self._photos_of_thread()
            for at in range(part.start, part.stop):
                self.decode(photos, numbers[at], locations[at])
                for photo, view_crops, out in zip(photos, crops, arrays, strict=True):
                    host(photo, view_crops, at, out[at])

        return Fetched(views, [pool.submit(read, part) for part in pool.jobs(len(rows), JOB_LESIONS)])

    def _finish_crops(self, crops: torch.Tensor, view: str, rng: LesionRng | None) -> torch.Tensor:
        """Apply the remaining transforms to crops (B, 3, size, size) of `_fetch_crops`."""
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
        """Reuse the host tensors of `fetch` after the event `copied`."""
        buffers: _Buffers = fetched.memory
        buffers.copied = copied
        if len(buffers.views[0]) == self._lesions:
            self._free.append(buffers)

    def _photos_of_thread(self) -> list[np.ndarray]:
        """Return this thread's memory for the photos of a lesion, one (H, W, 3) for each view."""
        if not hasattr(self._scratch, "photos"):
            self._scratch.photos = [array[0] for array in _Buffers.new(1, len(self.views), self.canvas).arrays]
        photos: list[np.ndarray] = self._scratch.photos
        return photos


class PhotoSource(CanvasSource):
    """Photos of a packed set, fitted to its canvas (`ShardIndex.canvas`)."""

    def __init__(
        self,
        index: ShardIndex,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: AugmentConfig | None = None,
        *,
        views: Sequence[str] | None = None,
        cache_share: float = 1.0,
        frame: Frame = "square",
    ) -> None:
        """views: to read, default those of the task; a missing photo is black.  cache_share: see `RemoteShards`.
        frame: see `TowerConfig`.
        """
        super().__init__(index.canvas, image_size, mean, std, views or index.signature.views, augment, frame)
        self.index = index
        self.shards = open_shards(index, cache_share)

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
"""Shard of a lesion, and offset and size of its photo in each view. Python numbers, since NumPy indexing in the threads
would hold the GIL longer.
"""


@dataclass
class _Buffers:
    """Host tensors of the views (B, H, W, 3) uint8, pinned if there is a GPU.

    arrays: the same memory.  copied: event at the end of the last copy to the device.
    """

    views: list[torch.Tensor]
    arrays: list[np.ndarray]
    copied: torch.cuda.Event | None = None

    @classmethod
    def new(cls, lesions: int, views: int, canvas: tuple[int, int]) -> _Buffers:
        width, height = canvas
        photos = [empty_photos(lesions, height, width) for _ in range(views)]
        return cls(photos, [view.numpy() for view in photos])

    def wait(self) -> None:
        if self.copied:
            self.copied.synchronize()
