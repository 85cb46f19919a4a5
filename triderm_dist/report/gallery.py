"""Photos of lesions with label, prediction and attention, as small JPEG files inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from triderm_dist.data.shards.index import ShardIndex, read_photo_bytes
from triderm_dist.predictions import rows_of
from triderm_dist.report.attention import overlay
from triderm_dist.report.content import Content
from triderm_dist.report.lesion_lists import DoubtfulLesion
from triderm_dist.schema import VIEWS, InputError

if TYPE_CHECKING:
    from PIL import Image

SIDE = 220
"""Longer side of a photo in the page, in pixels: it is shown at half of it, sharp on a screen of double density."""
_QUALITY = 72


@dataclass(frozen=True)
class Photo:
    """A photo of a view. source: a data URI.  width, height: in pixels.

    strongest: of a photo under its attention, the attention of the strongest patch as a multiple of the even share.
    """

    view: str
    source: str
    width: int
    height: int
    strongest: float | None = None


@dataclass(frozen=True)
class LesionPhotos:
    """A lesion with its photos, in the order of the task's views; a missing one is left out.

    attention: the crops that the network sees, in gray under its attention; without views that nothing attends to.
    """

    lesion: DoubtfulLesion
    photos: tuple[Photo, ...]
    attention: tuple[Photo, ...] = ()

    @property
    def is_correct(self) -> bool:
        return self.lesion.predicted == self.lesion.label


@dataclass(frozen=True)
class Gallery:
    """Lesions with their photos, or none, and `why` not.  why_unattended: why attention is not shown, where it was
    asked for.
    """

    lesions: tuple[LesionPhotos, ...] = ()
    why: str = ""
    why_unattended: str = ""

    @property
    def shows_attention(self) -> bool:
        return any(each.attention for each in self.lesions)


def gallery_of(content: Content, lesions: Sequence[DoubtfulLesion]) -> Gallery:
    """Return lesions of the training set with their photos from its packed shards."""
    if not content.shows_photos:
        return Gallery(why="Photos are left out (report.photos=false).")
    if content.packed is None:
        return Gallery(why="The packed photos of the run are not at hand, so none are shown.")
    rows = rows_of([each.lesion_id for each in lesions], content.packed.lesion_ids.column).tolist()
    if -1 in rows:
        return Gallery(why="The packed photos are of other lesions than the run's, so none are shown.")
    try:
        photos = {each: _photos(content, content.packed, row) for each, row in zip(lesions, rows, strict=True)}
    except (InputError, OSError) as error:
        return Gallery(why=f"The packed photos cannot be read, so none are shown ({error}).")
    attention, why = _attention(content)
    return Gallery(
        tuple(LesionPhotos(each, of_it, attention.get(each.lesion_id, ())) for each, of_it in photos.items()),
        why_unattended=why,
    )


def _attention(content: Content) -> tuple[dict[str, tuple[Photo, ...]], str]:
    """Return by lesion its photos under the attention of a network, and why there are none where they cannot be had."""
    titles = view_titles(content)
    try:
        maps = content.attention
    except (InputError, OSError) as error:
        return {}, f"The attention of the network cannot be shown ({error})."
    return {
        lesion: tuple(
            _under_attention(titles[view], each.photos[view], each.attention[view]) for view in each.attention
        )
        for lesion, each in maps.items()
    }, ""


def _photos(content: Content, index: ShardIndex, row: int) -> tuple[Photo, ...]:
    titles = view_titles(content)
    views = [view for view in VIEWS if view in titles and index.sizes[row, VIEWS.index(view)] > 0]
    return tuple(_thumbnail(titles[view], read_photo_bytes(index, row, view)) for view in views)


def _thumbnail(view: str, data: bytes) -> Photo:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        opened.draft("RGB", (SIDE, SIDE))
        image = opened.convert("RGB")
    return _encoded(view, image)


def _under_attention(view: str, crop: np.ndarray, attention: np.ndarray) -> Photo:
    """Draw attention (L,) over a network's crop (S, S, 3) in [0, 1]."""
    from PIL import Image

    picture, _ = overlay(crop, attention)
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    return replace(_encoded(view, image), strongest=float(attention.max()) * len(attention))


def _encoded(view: str, image: Image.Image) -> Photo:
    """Resize a picture to `SIDE`, and return it as a JPEG file without metadata."""
    from PIL import Image, ImageOps

    image = ImageOps.contain(image, (SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return Photo(view, f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", *image.size)


def view_titles(content: Content) -> dict[str, str]:
    return {view.name: view.label for view in content.task.views}
