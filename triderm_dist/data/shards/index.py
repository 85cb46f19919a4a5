"""Plain WebDataset tars with an index.

A folder of shards holds

    *.tar              LESION.clinical.jpg, LESION.dermoscopic.jpg, LESION.json; any WebDataset reader reads it
    index.json         format and version, names of concepts and diagnoses, the shards with size and checksum, how many
                       photos have which size, which lesions share one
    samples.parquet    one row a lesion: ids, label, scores, and where its photos lie in which shard

`samples.parquet` gives random access without opening a tar: `pread(shard, size, offset)` is a JPEG. The index is made
for 10 million lesions: a column is read when it is first used, and no Python object is built a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from triderm_dist.data.problems import Problem
from triderm_dist.data.shards.format import (
    EXTENSIONS,
    FORMAT,
    INDEX,
    ROW_GROUP,
    SAMPLES,
    VERSION,
    ShardFile,
    Text,
    samples_schema,
)
from triderm_dist.data.threads import available_cores, in_order
from triderm_dist.files import file_sha256
from triderm_dist.schema import DIAGNOSES, METADATA_FIELDS, UNLABELED, VIEWS, DataError, one_line

if TYPE_CHECKING:
    from triderm_dist.data.shards.cache import Cache

NAMED = 5
"""Pairs of lesions that a note names."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What a folder of shards holds, in the order in which the tars hold it; N lesions, K concepts, M metadata fields.

    problems: what was wrong with lesions that were left out.  extensions: how a view's photo is named in the tars.
    fingerprint: SHA-256 of index.json, which vouches for every other file.  The columns are read when first used, from
    `samples`, the open samples.parquet: they stay those of this index if the folder is made anew or removed.
    """

    folder: Path
    concepts: tuple[str, ...]
    diagnoses: tuple[str, ...]
    stored_fields: tuple[str, ...]
    """The metadata fields that samples.parquet holds, in its order."""
    shards: tuple[ShardFile, ...]
    rows: int
    samples: pa.NativeFile
    problems: tuple[Problem, ...]
    fingerprint: str
    photo_sizes: Mapping[tuple[int, int], int]
    """How many photos have which (width, height)."""
    shared_photos: tuple[tuple[str, str], ...]
    """Lesions with a label, of two groups, that hold the same photo: their folds may differ."""
    extensions: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: EXTENSIONS)
    remote: Cache | None = None
    """Where the shards of a URL come through (`cache.open_index`); None: all of them lie in `folder`."""

    def __len__(self) -> int:
        return self.rows

    @cached_property
    def lesion_ids(self) -> Text:
        return Text(self._columns("lesion_id")["lesion_id"])

    @cached_property
    def groups(self) -> Text:
        return Text(self._columns("group")["group"])

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64, `UNLABELED` where unknown."""
        return self._columns("label")["label"].to_numpy().astype(np.int64)

    @cached_property
    def shard(self) -> np.ndarray:
        """(N,) int32 into `shards`."""
        return self._columns("shard")["shard"].to_numpy()

    @cached_property
    def offsets(self) -> np.ndarray:
        """(N, 2) int64, where the JPEG of each of `VIEWS` begins in its tar."""
        return self._of_views("offset")

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) int64, bytes of the JPEG of each of `VIEWS`, 0 if missing."""
        return self._of_views("size")

    @cached_property
    def concept_scores(self) -> np.ndarray:
        """(N, K) float32, NaN where missing."""
        return _matrix(self._columns("concepts")["concepts"], len(self.concepts))

    @cached_property
    def metadata(self) -> np.ndarray:
        """(N, M) float32 in the order of `METADATA_FIELDS`, NaN where missing, as are fields that the shards lack."""
        stored = _matrix(self._columns("metadata")["metadata"], len(self.stored_fields))
        if self.stored_fields == tuple(METADATA_FIELDS):
            return stored
        matrix = np.full((len(self), len(METADATA_FIELDS)), np.nan, np.float32)
        for column, name in enumerate(METADATA_FIELDS):
            if name in self.stored_fields:
                matrix[:, column] = stored[:, self.stored_fields.index(name)]
        return matrix

    @property
    def canvas(self) -> tuple[int, int]:
        """(width, height) of the most photos, to which the loader fits the others; of equal ones the largest, then the
        widest.
        """
        return max(self.photo_sizes, key=lambda size: (self.photo_sizes[size], size[0] * size[1], size))

    def notes(self) -> list[str]:
        """What a user should know of the photos before training on them, a line each."""
        return [*_note_on_sizes(self), *_note_on_shared(self), *_note_on_fields(self)]

    def path(self, shard: int) -> Path:
        return self.folder / self.shards[shard].url

    def counts(self) -> dict[str, int]:
        """Lesions of each diagnosis, and those without one."""
        counts = np.bincount(self.labels - UNLABELED, minlength=len(self.diagnoses) + 1).tolist()
        return {**dict(zip(self.diagnoses, counts[1:], strict=True)), "unlabeled": counts[0]}

    def _of_views(self, what: str) -> np.ndarray:
        table = self._columns(*(f"{view}_{what}" for view in VIEWS))
        matrix = np.empty((len(self), len(VIEWS)), np.int64)
        for place, view in enumerate(VIEWS):
            matrix[:, place] = table[f"{view}_{what}"]
        return matrix

    def _columns(self, *names: str) -> pa.Table:
        path = self.folder / SAMPLES
        try:
            return pq.ParquetFile(self.samples).read(list(names), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from None


def _note_on_sizes(index: ShardIndex) -> Iterator[str]:
    width, height = index.canvas
    photos = sum(index.photo_sizes.values())
    if other := photos - index.photo_sizes[index.canvas]:
        yield (
            f"{other:,} of {photos:,} photos are not {width}x{height}: they are turned by a quarter where they stand "
            f"the other way, scaled to its short side, and cropped or mirrored at both ends to its long side"
        )


def _note_on_shared(index: ShardIndex) -> Iterator[str]:
    if pairs := index.shared_photos:
        named = ", ".join(f"{one} and {other}" for one, other in pairs[:NAMED])
        more = f", and {len(pairs) - NAMED} more pairs in {INDEX}" if len(pairs) > NAMED else ""
        yield (
            f"the same photo under lesions of two groups, which may come into two folds: {named}{more}; give them one "
            "patient_id, or leave one out"
        )


def _note_on_fields(index: ShardIndex) -> Iterator[str]:
    for name in index.stored_fields:
        if name not in METADATA_FIELDS:
            yield f"metadata field {name!r} of these shards is not used: no plugin of this run defines it"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_index(folder: str | os.PathLike[str], verify: bool = False, shards_here: bool = True) -> ShardIndex:
    """The index of a folder of shards, checked against the sizes of its files; `verify` reads and hashes them too.

    shards_here False: the tars may still be elsewhere, only their names are checked.

    Raises DataError for a folder without shards, another format or version, a shard that is missing or of another
    size, and, with `verify`, one whose checksum is off.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; pack a challenge folder by triderm pack")
    path = folder / INDEX
    if not path.is_file():
        raise DataError(
            f"{folder}: no {INDEX} here; pack a challenge folder by triderm pack, or make the index of "
            "other WebDataset shards by triderm index"
        )
    raw = read_raw_index(path)
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        found = f"{raw.get('format')!r} version {raw.get('version')!r}"
        raise DataError(
            f"{path}: {found}, this program reads {FORMAT!r} version {VERSION}; pack the data again by triderm pack, "
            "or index other WebDataset shards again by triderm index"
        )
    try:
        about = raw["samples"]
        rows, table_bytes, table_sha256 = about["rows"], about["bytes"], about["sha256"]
        concepts, diagnoses = tuple(raw["concepts"]), tuple(raw["diagnoses"])
        shards = tuple(ShardFile(**entry) for entry in raw["shards"])
        problems = tuple(Problem(**entry) for entry in raw["problems"])
        sizes = {_size(text): int(count) for text, count in raw["photo_sizes"].items()}
        shared = tuple((str(one), str(other)) for one, other in raw["shared_photos"])
        if not sizes:
            raise ValueError("photo_sizes is empty")
        extensions = {view: tuple(names) for view, names in raw.get("extensions", EXTENSIONS).items()}
        fields = tuple(map(str, raw["metadata_fields"]))
        categories = {name: tuple(values) for name, values in raw.get("metadata_categories", {}).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: incomplete ({type(error).__name__}: {error}); pack or index the data again") from None
    if diagnoses != DIAGNOSES:
        raise DataError(f"{path}: diagnoses are not those of this program; pack the data again")
    for name, values in categories.items():
        if name in METADATA_FIELDS and METADATA_FIELDS[name].categories != values:
            raise DataError(
                f"{path}: metadata field {name!r} was packed with categories {', '.join(values)}, this program has "
                f"{', '.join(METADATA_FIELDS[name].categories)}; pack the data again"
            )
    for shard in shards:
        _check_name(folder, shard.url)
        if shards_here:
            _check_size(folder, shard.url, shard.bytes)
    _check_size(folder, SAMPLES, table_bytes)
    if verify:
        _check_sha256(folder / SAMPLES, table_sha256)
    try:
        samples = pa.OSFile(str(folder / SAMPLES))
    except OSError as error:
        raise _unreadable(folder / SAMPLES, error) from None
    fingerprint = file_sha256(path)
    index = ShardIndex(
        folder, concepts, diagnoses, fields, shards, rows, samples, problems, fingerprint, sizes, shared, extensions
    )
    _check_rows(index)
    if verify:
        verify_shards(index)
    return index


def verify_shards(index: ShardIndex) -> None:
    """Hash every shard, on all cores; raises DataError naming the first whose bytes are not those that were packed."""
    for _ in in_order(
        lambda shard: _check_sha256(index.folder / shard.url, shard.sha256), index.shards, available_cores()
    ):
        pass


def read_photo_bytes(index: ShardIndex, row: int, view: str) -> bytes:
    """The JPEG of one view of one lesion, empty where the view is missing."""
    place = VIEWS.index(view)
    with index.path(int(index.shard[row])).open("rb") as file:
        file.seek(int(index.offsets[row, place]))
        return file.read(int(index.sizes[row, place]))


def read_raw_index(path: Path) -> dict[str, Any]:
    """The content of an index.json. Raises DataError if it is no JSON mapping."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({one_line(error)}); pack the data again") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: not an index of shards; pack the data again")
    return raw


def _size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    if min(width, height) < 1:
        raise ValueError(f"photo size {text!r}")
    return width, height


def _check_name(folder: Path, url: Any) -> None:
    # `pipe:` would run a command out of a data file; other schemes and ways out of the folder are no shard of it.
    if not isinstance(url, str) or ":" in url or os.path.basename(url) != url or url in ("", ".", ".."):
        raise DataError(f"{folder / INDEX}: shard url {url!r} is not a file name; only files of this folder are read")


def _check_size(folder: Path, url: str, size: Any) -> None:
    path = folder / url
    try:
        actual = path.stat().st_size
    except OSError:
        raise DataError(
            f"{path}: missing, but {INDEX} lists it; copy the whole folder or pack the data again"
        ) from None
    if actual != size:
        raise DataError(f"{path}: {actual} bytes, {INDEX} says {size}; copy it again or pack the data again")


def _check_sha256(path: Path, expected: str) -> None:
    actual = file_sha256(path)
    if actual != expected:
        raise DataError(
            f"{path}: checksum {actual[:16]}... is not the {str(expected)[:16]}... of {INDEX}, the file was changed or "
            "damaged; copy it again or pack the data again"
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not readable ({str(error).splitlines()[0]}); pack the data again")


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """(N, width) float32, filled piece by piece: these are the widest columns, and a second copy is never whole."""
    matrix = np.empty((len(column), width), np.float32)
    at = 0
    for chunk in column.chunks:
        matrix[at : at + len(chunk)] = chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        at += len(chunk)
    pa.default_memory_pool().release_unused()
    return matrix


def _check_rows(index: ShardIndex) -> None:
    """Rows, shards and offsets fit together, so that no reader needs to look again; read in pieces, to stay small."""
    path = index.folder / SAMPLES
    room = np.array([shard.bytes for shard in index.shards], np.int64)
    held = np.zeros(len(index.shards), np.int64)
    outside = f"{path}: a shard number, an offset or a label is out of range; pack the data again"
    try:
        file = pq.ParquetFile(index.samples)
        if not file.schema_arrow.equals(samples_schema(len(index.concepts), len(index.stored_fields))):
            raise DataError(f"{path}: its columns are not those of version {VERSION}; pack the data again")
        places = [f"{view}_{what}" for view in VIEWS for what in ("offset", "size")]
        for batch in file.iter_batches(ROW_GROUP, columns=["shard", "label", *places]):
            shard, label, *rest = (batch[name].to_numpy() for name in ("shard", "label", *places))
            if shard.min(initial=0) < 0 or shard.max(initial=0) >= len(room):
                raise DataError(outside)
            held += np.bincount(shard, minlength=len(room))
            wrong = (label < UNLABELED) | (label >= len(index.diagnoses))
            for offset, size in zip(rest[::2], rest[1::2], strict=True):
                wrong |= (offset < 0) | (size < 0) | (offset + size > room[shard])
            if wrong.any():
                raise DataError(outside)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None
    if held.tolist() != [shard.samples for shard in index.shards] or held.sum() != index.rows:
        raise DataError(f"{path}: its rows are not those that {INDEX} counts; pack the data again")
