"""Lesions whose photos are not packed: in files, or in memory as bytes, images or arrays.

Every photo is prepared when it is read, exactly as packing and then loading do it, so that a network sees the same
pixels as those of a packed set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from triderm_dist.config import AugmentConfig
from triderm_dist.data.canvas import fit_to_canvas
from triderm_dist.data.lesions import LesionInputs
from triderm_dist.data.photo_formats import describe_error, read_photo
from triderm_dist.data.photo_source import CanvasSource
from triderm_dist.data.problems import Problem
from triderm_dist.data.shards.photos import PhotoError, prepare_pixels
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import UNLABELED, VIEWS, DataError, Signature, Task

Photo = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""A photo: path of a photo file, its bytes, a Pillow image, or pixels (H, W, 3) or (H, W) uint8 in sRGB; a fourth
channel is alpha and put on white."""
_Held = str | os.PathLike[str] | bytes | Image.Image


class PhotoSet:
    """N lesions with photos in files or in memory, K concepts and M metadata fields.

    lesion_ids, groups (N,) str; labels (N,) int64, `UNLABELED` where unknown; concept_scores (N, K) and metadata (N, M)
    float32, NaN where missing.  canvas: (width, height) to which photos are fitted, and short_side: to which larger
    ones are reduced, both those of the packed set that the networks were trained on.
    """

    def __init__(
        self,
        task: Task,
        concepts: Sequence[str],
        photos: Mapping[str, Sequence[Photo | None]],
        *,
        canvas: tuple[int, int],
        short_side: int | None,
        lesion_ids: Sequence[str] | np.ndarray | None = None,
        groups: Sequence[str] | np.ndarray | None = None,
        labels: np.ndarray | None = None,
        concept_scores: np.ndarray | None = None,
        metadata: np.ndarray | None = None,
    ) -> None:
        """photos: {view: one photo per lesion, None where missing}; other views are missing for all lesions.

        By default all scores, metadata and labels are missing, ids are row numbers, and lesions have no groups.
        Raises DataError for a view that the task lacks, and for a photo in memory that cannot be used.
        """
        if unknown := [view for view in photos if view not in task.view_names]:
            raise DataError(
                f"task {task.name!r} has no {unknown[0]} photos, its views are {', '.join(task.view_names)}"
            )
        number = len(next(iter(photos.values()))) if lesion_ids is None else len(lesion_ids)
        self.task, self.concepts, self.canvas, self.short_side = task, tuple(concepts), canvas, short_side
        self.lesion_ids = np.array([*map(str, range(number))] if lesion_ids is None else [*lesion_ids], object)
        self.groups = self.lesion_ids if groups is None else np.array([*groups], object)
        self.labels = np.full(number, UNLABELED) if labels is None else labels
        self.concept_scores = _floats(concept_scores, number, len(self.concepts))
        self.metadata = _floats(metadata, number, len(task.fields))
        self.photos: dict[str, list[_Held | None]] = {view: [] for view in task.view_names}
        for view, column in self.photos.items():
            for lesion, photo in zip(self.lesion_ids, photos.get(view, [None] * number), strict=True):
                try:
                    column.append(_held(photo))
                except (OSError, SyntaxError, ValueError) as error:
                    raise DataError(f"{_photo_title(view, lesion)}: {one_line(error)}") from None

    def __len__(self) -> int:
        return len(self.lesion_ids)

    @property
    def signature(self) -> Signature:
        """The inputs and outputs of a network for these lesions."""
        return self.task.signature(self.concepts)

    @property
    def diagnoses(self) -> tuple[str, ...]:
        return self.task.diagnosis_names

    @cached_property
    def shard(self) -> np.ndarray:
        """(N,) zeros: no photo is in a shard."""
        return np.zeros(len(self), np.int64)

    @cached_property
    def view_present(self) -> np.ndarray:
        """(N, 2) bool, in the order of `VIEWS`."""
        none = [None] * len(self)
        return np.array([[photo is not None for photo in self.photos.get(view, none)] for view in VIEWS]).T.copy()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines results; of a file its path, size and time of change, not its bytes."""
        digest = hashlib.sha256()
        about = [self.task.meaning(), self.concepts, self.canvas, self.short_side, [*self.lesion_ids], [*self.groups]]
        digest.update(json.dumps(about).encode())
        for array in (self.labels, self.concept_scores, self.metadata):
            digest.update(array.tobytes())
        for column in self.photos.values():
            for photo in column:
                digest.update(hashlib.sha256(_content(photo)).digest())
        return digest.hexdigest()

    def inputs(self, rows: np.ndarray) -> LesionInputs:
        """Return the lesions in these rows (B,)."""
        return LesionInputs(
            self.lesion_ids[rows].tolist(), self.view_present[rows], self.concept_scores[rows], self.metadata[rows],
            self.labels[rows],
        )  # fmt: skip

    def take(self, rows: np.ndarray | slice) -> PhotoSet:
        """Return the set of the lesions in these rows (n,)."""
        chosen = np.arange(len(self))[rows]
        return PhotoSet(
            self.task, self.concepts, {view: [own[row] for row in chosen] for view, own in self.photos.items()},
            canvas=self.canvas, short_side=self.short_side, lesion_ids=self.lesion_ids[rows], groups=self.groups[rows],
            labels=self.labels[rows], concept_scores=self.concept_scores[rows], metadata=self.metadata[rows],
        )  # fmt: skip

    def name_photo(self, row: int, view: str) -> str:
        """Return the path of a photo, else its view and lesion, for messages."""
        photo = self.photos[view][row]
        return os.fspath(photo) if isinstance(photo, str | os.PathLike) else _photo_title(view, self.lesion_ids[row])

    def pixels(self, row: int, view: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the prepared pixels (H, W, 3) uint8 of a photo, of its own size, and what was converted.

        Raises PhotoError.
        """
        photo = self.photos[view][row]
        assert photo is not None
        if isinstance(photo, bytes | Image.Image):
            return prepare_pixels(photo, self.short_side)
        try:
            return prepare_pixels(read_photo(photo), self.short_side)
        except OSError as error:
            raise PhotoError(describe_error(error)) from None


class PhotoSetSource(CanvasSource):
    """The photos of a set, prepared as packing does it, and fitted to its canvas.

    An unreadable photo raises DataError, which names it; with drop=True it is black instead, and `problems` has it by
    the row of its lesion.  changes: by row and view, what was converted in a photo.
    """

    def __init__(
        self,
        photos: PhotoSet,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: AugmentConfig | None = None,
        views: Sequence[str] | None = None,
        drop: bool = False,
    ) -> None:
        super().__init__(photos.canvas, image_size, mean, std, views or photos.signature.views, augment)
        self.set, self.drop = photos, drop
        self.problems: dict[int, Problem] = {}
        self.changes: dict[tuple[int, str], tuple[str, ...]] = {}

    def locate(self, rows: np.ndarray) -> list[Any]:
        return [None] * len(rows)

    def decode(self, out: Sequence[np.ndarray], row: int, location: Any) -> None:
        for canvas, view in zip(out, self.views, strict=True):
            self._decode_view(canvas, row, view)

    def _decode_view(self, out: np.ndarray, row: int, view: str) -> None:
        if view not in self.set.photos or self.set.photos[view][row] is None:
            out[:] = 0
            return
        try:
            pixels, changes = self.set.pixels(row, view)
        except PhotoError as error:
            where = self.set.name_photo(row, view)
            if not self.drop:
                raise DataError(
                    f"{where}: unreadable photo ({error}); replace it, or leave such lesions out by invalid=drop"
                ) from None
            self.problems[row] = Problem(str(self.set.lesion_ids[row]), "unreadable photo", where, str(error))
            out[:] = 0
            return
        if changes:
            self.changes[row, view] = changes
        out[:] = pixels if pixels.shape == out.shape else fit_to_canvas(pixels, *out.shape[:2])


def _held(photo: Photo | None) -> _Held | None:
    """Return a photo as a type that threads can read. Raises OSError, SyntaxError or ValueError if it is none."""
    if isinstance(photo, Image.Image):
        photo.load()  # loaded here, since two threads must not load one image
        return photo
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim not in (2, 3) or photo.shape[2:] not in ((), (1,), (3,), (4,)):
            raise ValueError(f"pixels must be (H, W), (H, W, 3) or (H, W, 4) uint8, got {photo.shape} {photo.dtype}")
        return Image.fromarray(photo[..., 0] if photo.shape[2:] == (1,) else photo)
    if photo is None or isinstance(photo, str | os.PathLike | bytes):
        return photo
    if isinstance(photo, bytearray | memoryview):
        return bytes(photo)
    raise ValueError(f"a photo is a path, bytes, an image or an array, not {type(photo).__name__}")


def _content(photo: _Held | None) -> bytes:
    """Return what identifies a photo."""
    if isinstance(photo, bytes):
        return photo
    if isinstance(photo, Image.Image):
        about = (
            photo.mode,
            photo.size,
            photo.getpalette(),
            photo.info.get("transparency"),
            photo.getexif().get(0x0112),
        )
        return repr(about).encode() + photo.tobytes() + (photo.info.get("icc_profile") or b"")
    if photo is None:
        return b""
    path = os.path.abspath(photo)
    try:
        status = os.stat(path)
    except OSError:
        return repr(path).encode()
    return repr((path, status.st_size, status.st_mtime_ns)).encode()


def _floats(values: np.ndarray | None, rows: int, columns: int) -> np.ndarray:
    if values is None:
        return np.full((rows, columns), np.nan, np.float32)
    return np.ascontiguousarray(values, np.float32).reshape(rows, columns)


def _photo_title(view: str, lesion_id: str) -> str:
    return f"the {view} photo of lesion {lesion_id}"
