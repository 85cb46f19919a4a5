"""Photos of lesions with label and prediction, as small JPEG files inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from triderm_dist.data.shards.index import ShardIndex, read_photo_bytes
from triderm_dist.report.content import Content, DoubtfulLesion
from triderm_dist.schema import VIEWS, InputError

SHOWN = 12
"""Lesions of a list whose photos are shown."""
SIDE = 220
"""Longer side of a photo in the page, in pixels: it is shown at half of it, sharp on a screen of double density."""
_QUALITY = 72


@dataclass(frozen=True)
class Photo:
    """A photo of a view. source: a data URI.  width, height: in pixels."""

    view: str
    source: str
    width: int
    height: int


@dataclass(frozen=True)
class LesionPhotos:
    """A lesion with its photos, in the order of the task's views; a missing one is left out."""

    lesion: DoubtfulLesion
    photos: tuple[Photo, ...]

    @property
    def is_correct(self) -> bool:
        return self.lesion.predicted == self.lesion.label


@dataclass(frozen=True)
class Gallery:
    """Lesions with their photos, or none, and `why` not."""

    lesions: tuple[LesionPhotos, ...] = ()
    why: str = ""


def gallery_of(content: Content, lesions: Sequence[DoubtfulLesion]) -> Gallery:
    """Return lesions of the training set with their photos from its packed shards."""
    if not content.shows_photos:
        return Gallery(why="Photos are left out (report.photos=false).")
    if content.packed is None:
        return Gallery(why="The packed photos of the run are not at hand, so none are shown.")
    row_of = content.packed_rows
    try:
        found = [LesionPhotos(each, _photos(content, content.packed, row_of[each.lesion_id])) for each in lesions]
    except (InputError, OSError, KeyError) as error:
        return Gallery(why=f"The packed photos cannot be read, so none are shown ({error}).")
    return Gallery(tuple(found))


def _photos(content: Content, index: ShardIndex, row: int) -> tuple[Photo, ...]:
    titles = {view.name: view.title or view.name for view in content.task.views}
    views = [view for view in VIEWS if view in titles and index.sizes[row, VIEWS.index(view)] > 0]
    return tuple(_thumbnail(titles[view], read_photo_bytes(index, row, view)) for view in views)


def _thumbnail(view: str, data: bytes) -> Photo:
    """Reduce a photo to `SIDE`, without metadata."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        opened.draft("RGB", (SIDE, SIDE))
        image = opened.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return Photo(view, f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", *image.size)
