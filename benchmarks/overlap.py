"""Measure how well thumbnails tell copies of a photo from other photos, and what comparing two sets costs.

python -m benchmarks.overlap shards=RUN/shards/train other=HAM/shards/train

The similarity of photos of different lesions, within the first set and between both, must stay below
`triderm_dist.data.overlap.SIMILAR`; that of changed copies of photos of the first set should reach it. Photos with
equal bytes are left out. The last line is one JSON object.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.data.overlap import SIMILAR, Thumbnails, edges, thumbnail
from triderm_dist.data.shards.index import ShardIndex, read_index, read_photo_bytes
from triderm_dist.schema import VIEWS
from triderm_dist.settings import PathText, Section

BLOCK = 2048


class OverlapBenchmark(Section):
    shards: PathText = Field(description="packed set whose photos are copied")
    other: PathText = Field(description="packed set that shares no photo with it")
    copies: int = Field(1000, ge=1, description="photos to copy")


def resized(factor: float, quality: int) -> Callable[[Image.Image], bytes]:
    def change(photo: Image.Image) -> bytes:
        size = (round(photo.width * factor), round(photo.height * factor))
        return encoded(photo.resize(size, Image.Resampling.LANCZOS), quality)

    return change


def cropped(share: float) -> Callable[[Image.Image], bytes]:
    def change(photo: Image.Image) -> bytes:
        left, top = photo.width * (1 - share) / 2, photo.height * (1 - share) / 2
        return encoded(photo.crop((round(left), round(top), round(photo.width - left), round(photo.height - top))))

    return change


def encoded(photo: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return file.getvalue()


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG quality 75": lambda photo: encoded(photo, 75),
    "JPEG quality 50": lambda photo: encoded(photo, 50),
    "JPEG quality 30": lambda photo: encoded(photo, 30),
    "squashed to 224 x 224": lambda photo: encoded(photo.resize((224, 224))),
    "half size, quality 75": resized(0.5, 75),
    "double size": resized(2, 90),
    "brightness 1.1": lambda photo: encoded(ImageEnhance.Brightness(photo).enhance(1.1)),
    "contrast 0.9": lambda photo: encoded(ImageEnhance.Contrast(photo).enhance(0.9)),
    "center of 99% of each side": cropped(0.99),
    "center of 98%": cropped(0.98),
    "center of 95%": cropped(0.95),
}


def main(config: OverlapBenchmark) -> None:
    index, other = read_index(config.shards), read_index(config.other)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        own, others = (Photos(each, Path(folder)) for each in (index, other))
        seconds = time.process_time() - started
        number = len(own.digests) + len(others.digests)
    result: dict[str, float] = {"photos": number, "thumbnails_ms": round(1000 * seconds / number, 3)}
    started = time.process_time()
    between, pairs = largest(own, others)
    result |= {"compare_s": round(time.process_time() - started, 2), "pairs_between": pairs, "largest_between": between}
    result["largest_within"], result["pairs_within"] = largest(own, own)

    print(f"{'photos of different lesions':<32}{'pairs':>14}{'largest similarity':>20}")
    for name in ("within", "between"):
        title = {"within": "within the first set", "between": "between both sets"}[name]
        print(f"{title:<32}{result[f'pairs_{name}']:>14,.0f}{result[f'largest_{name}']:>20.4f}")
    print(f"\n{'changed copies':<32}{'found':>14}{'smallest similarity':>20}")
    chosen = np.random.default_rng(0).permutation(len(own.rows))[: config.copies]
    originals = [read_photo_bytes(index, int(own.rows[i]), VIEWS[own.views[i]]) for i in chosen]
    for name, change in CHANGES.items():
        made = [thumbnail(change(Image.open(io.BytesIO(data)))) for data in originals]
        similarity = (edges(np.stack(made)) * own.edges[torch.from_numpy(chosen)]).sum(1)
        result[name] = float((similarity >= SIMILAR).float().mean())
        print(f"{name:<32}{result[name]:>14.1%}{float(similarity.min()):>20.4f}")
    print(json.dumps(result))


class Photos:
    """The n photos of a set: row, view, digest, and the edges of the thumbnail."""

    def __init__(self, index: ShardIndex, folder: Path) -> None:
        cache = Thumbnails(index, folder)
        for number in cache.missing():
            cache.compute(number, 1)
        digests, thumbnails = cache.read()
        self.rows, self.views = np.nonzero(digests)
        self.digests, self.edges = digests[self.rows, self.views], edges(thumbnails[self.rows, self.views])


def largest(one: Photos, other: Photos) -> tuple[float, int]:
    """Return the largest similarity of two photos of different lesions and bytes, and the number of pairs."""
    most, pairs = -1.0, 0
    for start in range(0, len(one.rows), BLOCK):
        part = slice(start, start + BLOCK)
        similarity = (one.edges[part] @ other.edges.T).numpy()
        excluded = one.digests[part, None] == other.digests
        if one is other:
            excluded |= one.rows[part, None] >= other.rows  # each pair once
        similarity[excluded] = -1
        most, pairs = max(most, float(similarity.max())), pairs + int((~excluded).sum())
    return round(most, 4), pairs


if __name__ == "__main__":
    run(OverlapBenchmark, main, __doc__)
