"""Find lesions of two packed sets that share a photo: by the bytes of its JPEG, and by thumbnails.

Two photos are similar if the edges of their thumbnails correlate by at least `SIMILAR`. Edges are the differences of
neighboring pixels of 16 x 16 thumbnails, which dHash (Krawetz 2013) reduces to bits. This finds copies that were
encoded again, resized, squashed or brightened, but none that were rotated, mirrored or cropped by several percent.
docs/benchmarks.md has the measurement behind the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.photos import PROBE, size_and_hash, start_hash
from triderm_dist.data.shards.reader import FolderShards, open_shards
from triderm_dist.data.threads import available_cores, map_in_order
from triderm_dist.files import PATIENT_DATA, atomic_path
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import VIEWS, DataError

SIDE = 16
"""Pixels of a side of a thumbnail."""
SIMILAR = 0.955
"""Least correlation of the edges of two thumbnails of the same photo."""
CHUNK = 1024
"""Lesions per file."""
BLOCK = 4096
"""Photos of one set that are compared at a time."""
COMPONENTS = 32
"""Principal components of edges that bound a correlation, which takes a 44th of the multiplications."""
SAMPLED = 512
"""Photos whose edges the components are of."""
ROUNDING = 0.005
"""More than the rounding error of a bound, also of one that a GPU multiplies in TF32."""
MOST_READ = 100_000
"""Photos that `rows_with_equal_photo` reads at most: seconds on a local disk."""


@dataclass(frozen=True)
class Shared:
    """Two lesions with the same photo. similarity: of the thumbnails; None if the files are equal."""

    row: int
    main_row: int
    similarity: float | None


class Thumbnails:
    """Digests and thumbnails of the photos of a packed set, cached in a folder in files of `CHUNK` lesions.

    A file is written atomically, so that an interrupted run resumes at the next one and ranks share the work.
    """

    def __init__(self, index: ShardIndex, folder: Path) -> None:
        self.index = index
        self.folder = folder / f"thumbnails-{index.fingerprint[:16]}"

    def missing(self) -> list[int]:
        """List the files that are not on disk yet, by number."""
        return [number for number in self._numbers if not self._path(number).exists()]

    def compute(self, number: int, workers: int) -> None:
        """Write one file, decoding in threads. Raises DataError for a photo that does not decode."""
        rows = np.arange(number * CHUNK, min((number + 1) * CHUNK, len(self.index)))
        shard, offsets, sizes = (column[rows] for column in (self.index.shard, self.index.offsets, self.index.sizes))
        digests = np.zeros((len(rows), len(VIEWS)), np.uint64)
        thumbnails = np.zeros((len(rows), len(VIEWS), SIDE, SIDE, 3), np.uint8)

        def read(i: int) -> None:
            for view in np.flatnonzero(sizes[i]):
                data = shards.read(int(shard[i]), int(offsets[i, view]), int(sizes[i, view]))
                try:
                    digests[i, view] = size_and_hash(data)[2]
                    thumbnails[i, view] = thumbnail(data)
                except ValueError as error:
                    raise DataError(
                        f"{self.index.path(int(shard[i]))}: the {VIEWS[view]} photo of lesion "
                        f"{self.index.lesion_ids[int(rows[i])]} does not decode ({one_line(error)}); run triderm verify"
                    ) from None

        with closing(open_shards(self.index)) as shards:
            for _ in map_in_order(read, range(len(rows)), workers):
                pass
        with atomic_path(self._path(number), PATIENT_DATA) as temporary, temporary.open("wb") as file:
            np.savez(file, digests=digests, thumbnails=thumbnails)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Return digests (N, 2) uint64, 0 if a view is missing, and thumbnails (N, 2, SIDE, SIDE, 3) uint8."""
        digests, thumbnails = (np.concatenate(arrays) for arrays in zip(*map(self._read, self._numbers), strict=True))
        return digests, thumbnails

    def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        path, rows = self._path(number), min(CHUNK, len(self.index) - number * CHUNK)
        try:
            with np.load(path, allow_pickle=False) as file:  # a zip, which has a CRC of each array
                digests, thumbnails = file["digests"], file["thumbnails"]
        except FileNotFoundError:
            raise
        except Exception as error:  # of zipfile, zlib, or of the header, which is parsed as Python
            text = one_line(error, 160)
            raise DataError(f"{path}: not readable ({text}); delete it, and the next run computes it") from None
        expected = ((np.uint64, (rows, len(VIEWS))), (np.uint8, (rows, len(VIEWS), SIDE, SIDE, 3)))
        if [(each.dtype, each.shape) for each in (digests, thumbnails)] != [(np.dtype(d), s) for d, s in expected]:
            raise DataError(f"{path}: changed or damaged; delete it, and the next run computes it again")
        return digests, thumbnails

    @property
    def _numbers(self) -> range:
        """The numbers of all files."""
        return range(-(-len(self.index) // CHUNK))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"


def thumbnail(data: bytes) -> np.ndarray:
    """Return the thumbnail (SIDE, SIDE, 3) uint8 of a JPEG, squashed to a square. Raises ValueError for other bytes."""
    photo = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", min_height=4 * SIDE, min_width=4 * SIDE))
    return np.array(photo.resize((SIDE, SIDE), Image.Resampling.BOX))


def edges(thumbnails: np.ndarray) -> torch.Tensor:
    """Return the differences of neighboring pixels of (n, SIDE, SIDE, 3), scaled to length 1: (n, D) float32.

    They are zeros for a photo of one color or a missing one, which then correlates with none.
    """
    pixels = torch.from_numpy(thumbnails).float()
    differences = torch.cat([pixels.diff(dim=1).flatten(1), pixels.diff(dim=2).flatten(1)], 1)
    return torch.nn.functional.normalize(differences)


def find_shared(extra: Thumbnails, main: Thumbnails, rows: np.ndarray, device: torch.device) -> list[Shared]:
    """Return the lesions among `rows` (n,) of `extra` that share a photo with `main`, each with the nearest."""
    main_digests, main_thumbnails = main.read()
    digests, thumbnails = (array[rows] for array in extra.read())
    found = {row: Shared(row, main_row, None) for row, main_row in _same_files(digests, rows, main_digests)}
    main_rows, main_views = np.nonzero(main_digests)
    for i, main_at, similarity in _similar(thumbnails, digests > 0, main_thumbnails[main_rows, main_views], device):
        shared = Shared(int(rows[i]), int(main_rows[main_at]), similarity)
        known = found.get(shared.row)
        if known is None or (known.similarity is not None and known.similarity < similarity):
            found[shared.row] = shared
    return [found[row] for row in sorted(found)]


def rows_with_equal_photo(index: ShardIndex, other: ShardIndex) -> np.ndarray:
    """Return the rows (n,) of a packed set with a photo whose bytes are those of a photo of another set.

    An index holds no hashes of photos, but their sizes: the first bytes are read where a size occurs in both sets, and
    all bytes where these are equal. Returns no rows for a set behind a URL, whose shards would have to be fetched, and
    where more than `MOST_READ` photos would be read.
    """
    sets = index, other
    if index.remote or other.remote:
        return np.empty(0, np.int64)
    common = np.intersect1d(index.sizes, other.sizes)
    equal = [np.isin(each.sizes, common[common > 0]) for each in sets]
    if sum(int(mask.sum()) for mask in equal) > MOST_READ:
        return np.empty(0, np.int64)
    for most in (PROBE, None):
        first, second = (_digests(each, mask, most) for each, mask in zip(sets, equal, strict=True))
        common = np.intersect1d(first, second)
        equal = [np.isin(each, common[common > 0]) for each in (first, second)]
    return np.flatnonzero(equal[0].any(axis=1))


def _digests(index: ShardIndex, chosen: np.ndarray, most: int | None) -> np.ndarray:
    """Return the `start_hash` (N, views) uint64 of the first `most` bytes, None: all, of the chosen photos (N, views)
    bool; 0 for the others.
    """
    result, shards = np.zeros(chosen.shape, np.uint64), FolderShards(index)

    def digest(place: tuple[int, ...]) -> int:
        size = int(index.sizes[place])
        data = shards.read(int(index.shard[place[0]]), int(index.offsets[place]), min(size, most or size))
        return start_hash(data, size)

    with closing(shards):
        for (row, view), value in map_in_order(digest, map(tuple, np.argwhere(chosen).tolist()), available_cores()):
            result[row, view] = value
    return result


def _same_files(digests: np.ndarray, rows: np.ndarray, main: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (row, main row) of lesions that have a photo with the same digest."""
    flat = main.ravel()
    order = np.argsort(flat, kind="stable")
    at = np.searchsorted(flat, digests, sorter=order).clip(max=len(flat) - 1)
    same = (flat[order[at]] == digests) & (digests > 0)
    for i, view in zip(*np.nonzero(same), strict=True):
        yield int(rows[i]), int(order[at[i, view]]) // main.shape[1]


def _similar(
    thumbnails: np.ndarray, present: np.ndarray, main: np.ndarray, device: torch.device
) -> Iterator[tuple[int, int, float]]:
    """Yield (lesion, photo of `main`, similarity) of similar photos, of each photo the most similar one.

    A correlation is computed only where its bound (`_bounding`) reaches `SIMILAR`, which the bounds of few pairs do.
    thumbnails: (n, views, ...), present: (n, views), main: (m, ...).
    """
    lesions, views = np.nonzero(present)
    photos = thumbnails[lesions, views]
    if not len(main):
        return
    sample = edges(main[:: -(-len(main) // SAMPLED)]).to(device)
    components = torch.linalg.svd(sample, full_matrices=False).Vh[:COMPONENTS]
    parts = (main[first : first + BLOCK] for first in range(0, len(main), BLOCK))
    bounding = torch.cat([_bounding(edges(part).to(device), components) for part in parts])
    for start in range(0, len(photos), BLOCK):
        own = edges(photos[start : start + BLOCK]).to(device)
        own_bounding = _bounding(own, components)
        best = torch.full((len(own),), -1.0, device=device)
        at = torch.zeros(len(own), dtype=torch.int64, device=device)
        for first in range(0, len(main), BLOCK):
            near = own_bounding @ bounding[first : first + BLOCK].T >= SIMILAR - ROUNDING
            rows, columns = near.any(1).nonzero().flatten(), near.any(0).nonzero().flatten()
            if not len(rows):
                continue
            others = edges(main[first + columns.cpu().numpy()]).to(device)
            most, where = (own[rows] @ others.T).max(1)
            better = most > best[rows]
            rows = rows[better]
            best[rows], at[rows] = most[better], first + columns[where[better]]
        for i in torch.nonzero(best >= SIMILAR).flatten().tolist():
            yield int(lesions[start + i]), int(at[i]), float(best[i])


def _bounding(edges: torch.Tensor, components: torch.Tensor) -> torch.Tensor:
    """Return (n, k + 1) vectors whose products are at least those of the edges (n, D), by Cauchy-Schwarz.

    They are the products with the orthonormal components (k, D), and the length of the remainder.
    """
    own = edges @ components.T
    return torch.cat([own, (edges - own @ components).norm(dim=1, keepdim=True)], 1)
