"""Checked lesions <-> plain WebDataset tars with an index, both ways.

A folder of shards holds

    shard-000000.tar ...   LESION.clinical.jpg, LESION.dermoscopic.jpg, LESION.json; any WebDataset reader reads it
    index.json             format and version, names of concepts and diagnoses, the shards with size and checksum
    samples.parquet        one row a lesion: ids, label, scores, and where its photos lie in which shard

`samples.parquet` gives random access without opening a tar: `pread(shard, size, offset)` is a JPEG.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from triderm_dist.data.milk10k import Dataset
from triderm_dist.data.photos import PhotoError, check_photo, prepare_photo
from triderm_dist.schema import (
    DIAGNOSES,
    METADATA_CATEGORIES,
    METADATA_FIELDS,
    UNLABELLED,
    VIEWS,
    DataError,
    Lesion,
)

FORMAT = "triderm-shards"
VERSION = 1
INDEX, SAMPLES = "index.json", "samples.parquet"
Progress = Callable[[int, int], None]
"""Called with (lesions done, lesions in all)."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ShardFile:
    """One tar: its name in the folder, the lesions in it, its size and the SHA-256 of its bytes."""

    url: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What a folder of shards holds, in the order in which the tars hold it; N lesions, K concepts, M metadata fields.

    lesion_ids, groups: (N,) str objects.  labels: (N,) int64, `UNLABELLED` where unknown.  shard: (N,) int32 into
    `shards`.  offsets, sizes: (N, 2) int64, where the JPEG of each of `VIEWS` lies in its tar, size 0 if missing.
    concept_scores: (N, K) float32, metadata: (N, M) float32, NaN where missing.  fingerprint: SHA-256 of index.json,
    which vouches for every other file.
    """

    folder: Path
    concepts: tuple[str, ...]
    diagnoses: tuple[str, ...]
    shards: tuple[ShardFile, ...]
    lesion_ids: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    shard: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    concept_scores: np.ndarray
    metadata: np.ndarray
    problems: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.lesion_ids)

    def path(self, shard: int) -> Path:
        return self.folder / self.shards[shard].url

    def counts(self) -> dict[str, int]:
        """Lesions of each diagnosis, and those without one."""
        counts = {name: int((self.labels == label).sum()) for label, name in enumerate(self.diagnoses)}
        return {**counts, "unlabelled": int((self.labels == UNLABELLED).sum())}


# --- packing ---------------------------------------------------------------------------------------------------------


def pack_shards(
    dataset: Dataset,
    output: str | os.PathLike[str],
    *,
    short_side: int | None,
    shard_samples: int = 512,
    invalid: Literal["refuse", "drop"] = "refuse",
    workers: int = 2,
    progress: Progress | None = None,
) -> ShardIndex:
    """Write the shards of a data set and return their index; the bytes do not depend on `workers`.

    Lesions come in a fixed pseudo-random order (by hash of the id), so that no shard holds one diagnosis only. Every
    photo is decoded on the way; an unreadable one refuses the whole folder, or drops its lesion and is counted under
    `problems`. Photos over `short_side` pixels are reduced to it, None keeps them. The folder appears when it is
    complete. Where it was packed before, from the same input with the same settings, it is returned as it is.

    Raises DataError for unreadable photos, an output that holds something else, or no lesion left.
    """
    folder = Path(output)
    source = _source_fingerprint(dataset, short_side, shard_samples, invalid)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _already_packed(folder, source)
    part = folder.with_name(folder.name + ".part")
    if part.exists():
        shutil.rmtree(part)  # left by a run that was killed
    part.mkdir(parents=True)
    try:
        _write_folder(part, dataset, source, short_side, shard_samples, invalid, workers, progress)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return read_index(folder)


def _source_fingerprint(dataset: Dataset, short_side: int | None, shard_samples: int, invalid: str) -> str:
    """SHA-256 over settings, tables and the size of each photo (not its bytes, which would mean reading everything)."""
    digest = hashlib.sha256()
    digest.update(json.dumps([FORMAT, VERSION, short_side, shard_samples, invalid, dataset.concepts]).encode())
    for lesion in sorted(dataset.lesions, key=lambda lesion: lesion.lesion_id):
        photos = [[os.path.basename(path), os.path.getsize(path)] if path else None for path in lesion.images.values()]
        row = [lesion.lesion_id, lesion.group, lesion.label, repr(lesion.concepts), repr(lesion.metadata), photos]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _already_packed(folder: Path, source: str) -> ShardIndex:
    advice = "choose another output folder or delete this one"
    if not (folder / INDEX).is_file():
        raise DataError(f"{folder}: exists and holds no packed shards; {advice}")
    if _read_json(folder / INDEX).get("source_fingerprint") != source:
        raise DataError(f"{folder}: exists and was packed from other data or with other settings; {advice}")
    return read_index(folder)


def _write_folder(
    folder: Path,
    dataset: Dataset,
    source: str,
    short_side: int | None,
    shard_samples: int,
    invalid: str,
    workers: int,
    progress: Progress | None,
) -> None:
    lesions = sorted(dataset.lesions, key=lambda lesion: hashlib.sha256(lesion.lesion_id.encode()).digest())
    shards: list[ShardFile] = []
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    writer: _TarWriter | None = None

    def prepare(lesion: Lesion) -> list[bytes] | str:
        try:
            return [_read_photo(lesion.images[view], short_side) for view in VIEWS]
        except PhotoError as error:
            return f"lesion {lesion.lesion_id}, {error}"

    for done, (lesion, photos) in enumerate(_in_order(prepare, lesions, workers), start=1):
        if isinstance(photos, str):
            problems.append(photos)
        elif not problems or invalid == "drop":
            if writer is None:
                writer = _TarWriter(folder / f"shard-{len(shards):06d}.tar")
            rows.append(_write_sample(writer, lesion, photos, dataset.concepts, len(shards)))
            if writer.samples == shard_samples:
                shards.append(writer.close())
                writer = None
        if progress:
            progress(done, len(lesions))
    if writer is not None:
        shards.append(writer.close())
    if problems and invalid == "refuse":
        raise DataError(
            f"{problems[0]} ({len(problems)} of {len(lesions)} lesions have an unreadable photo); "
            "replace the photo, or pack without these lesions by invalid=drop"
        )
    if not rows:
        raise DataError(
            f"no lesion is left to pack ({len(problems)} dropped, the first: {problems[0] if problems else '-'})"
        )

    pq.write_table(_samples_table(rows, len(dataset.concepts)), folder / SAMPLES)
    counts = Counter(DIAGNOSES[row["label"]] if row["label"] >= 0 else "unlabelled" for row in rows)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "concepts": list(dataset.concepts),
        "diagnoses": list(DIAGNOSES),
        "metadata_fields": list(METADATA_FIELDS),
        "short_side": short_side,
        "source_fingerprint": source,
        "shards": [vars(shard) for shard in shards],
        "samples": {
            "url": SAMPLES,
            "rows": len(rows),
            "bytes": (folder / SAMPLES).stat().st_size,
            "sha256": _file_sha256(folder / SAMPLES),
        },
        "counts": {name: counts[name] for name in (*DIAGNOSES, "unlabelled")},
        "problems": problems,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _read_photo(path: str | None, short_side: int | None) -> bytes:
    if path is None:
        return b""
    try:
        return prepare_photo(Path(path).read_bytes(), short_side)
    except OSError as error:
        raise PhotoError(f"{path}: {error.strerror or error}") from None
    except PhotoError as error:
        raise PhotoError(f"{path}: {error}") from None


def _in_order(
    work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Iterator[tuple[_Item, _Result]]:
    """(item, work(item)) in the order of the items, on threads, only a few items ahead of what is taken."""
    waiting: deque[tuple[_Item, Future[_Result]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > 4 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _write_sample(
    writer: _TarWriter, lesion: Lesion, photos: list[bytes], concepts: tuple[str, ...], shard: int
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "lesion_id": lesion.lesion_id,
        "group": lesion.group,
        "label": lesion.label,
        "shard": shard,
        "concepts": lesion.concepts,
        "metadata": lesion.metadata,
    }
    for view, data in zip(VIEWS, photos, strict=True):
        row[f"{view}_offset"] = writer.add(f"{lesion.lesion_id}.{view}.jpg", data) if data else 0
        row[f"{view}_size"] = len(data)
    writer.add(f"{lesion.lesion_id}.json", json.dumps(_describe(lesion, concepts)).encode())
    writer.samples += 1
    return row


def _describe(lesion: Lesion, concepts: tuple[str, ...]) -> dict[str, Any]:
    """The lesion in words, for readers of the tars who know nothing of the parquet file."""
    metadata: dict[str, Any] = {}
    for field, value in zip(METADATA_FIELDS, lesion.metadata, strict=True):
        known = not math.isnan(value)
        names = METADATA_CATEGORIES.get(field)
        metadata[field] = (names[int(value)] if names else value) if known else None
    return {
        "lesion_id": lesion.lesion_id,
        "label": None if lesion.label == UNLABELLED else DIAGNOSES[lesion.label],
        "group": lesion.group,
        "concepts": {
            name: None if math.isnan(score) else score for name, score in zip(concepts, lesion.concepts, strict=True)
        },
        "metadata": metadata,
    }


def _schema(concepts: int) -> pa.Schema:
    places = [
        (f"{view}_{what}", kind) for view in VIEWS for what, kind in (("offset", pa.int64()), ("size", pa.int32()))
    ]
    return pa.schema(
        [
            ("lesion_id", pa.string()),
            ("group", pa.string()),
            ("label", pa.int16()),
            ("shard", pa.int32()),
            *places,
            ("concepts", pa.list_(pa.float32(), concepts)),
            ("metadata", pa.list_(pa.float32(), len(METADATA_FIELDS))),
        ]
    )


def _samples_table(rows: list[dict[str, Any]], concepts: int) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=_schema(concepts))


class _TarWriter:
    """A tar whose bytes depend on its members alone, hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.samples = 0
        self._path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._position = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its data."""
        info = tarfile.TarInfo(name)  # its owner, time and mode are constants
        info.size = len(data)
        self._write(info.tobuf(tarfile.GNU_FORMAT))
        offset = self._position
        self._write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> ShardFile:
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._position % tarfile.RECORDSIZE))
        self._file.close()
        return ShardFile(self._path.name, self.samples, self._position, self._digest.hexdigest())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_index(folder: str | os.PathLike[str], verify: bool = False) -> ShardIndex:
    """The index of a folder of shards, checked against the sizes of its files; `verify` reads and hashes them too.

    Raises DataError for a folder without shards, another format or version, a shard that is missing or of another
    size, and, with `verify`, one whose checksum is off.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; pack a challenge folder by python -m shards.pack")
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"{folder}: no {INDEX} here; pack a challenge folder by python -m shards.pack")
    raw = _read_json(path)
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        found = f"{raw.get('format')!r} version {raw.get('version')!r}"
        raise DataError(f"{path}: {found}, this program reads {FORMAT!r} version {VERSION}; pack the data again")
    try:
        shards = tuple(
            ShardFile(**{name: entry[name] for name in ShardFile.__annotations__}) for entry in raw["shards"]
        )
        samples = raw["samples"]
        concepts, diagnoses = tuple(raw["concepts"]), tuple(raw["diagnoses"])
        problems = tuple(raw["problems"])
        expected = {"metadata_fields": list(METADATA_FIELDS), "diagnoses": list(DIAGNOSES)}
        rows, table_bytes, table_sha256 = samples["rows"], samples["bytes"], samples["sha256"]
        other = next((key for key, value in expected.items() if raw[key] != value), None)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: incomplete ({type(error).__name__}: {error}); pack the data again") from None
    if other:
        raise DataError(f"{path}: {other} are not those of this program; pack the data again")
    for shard in shards:
        _check_size(folder, shard.url, shard.bytes)
    _check_size(folder, SAMPLES, table_bytes)
    if verify:
        _check_sha256(folder / SAMPLES, table_sha256)

    table = _read_samples(folder / SAMPLES, len(concepts))
    index = ShardIndex(
        folder=folder,
        concepts=concepts,
        diagnoses=diagnoses,
        shards=shards,
        lesion_ids=table["lesion_id"].to_numpy(),
        groups=table["group"].to_numpy(),
        labels=table["label"].to_numpy().astype(np.int64),
        shard=table["shard"].to_numpy(),
        offsets=np.stack([table[f"{view}_offset"].to_numpy() for view in VIEWS], axis=1),
        sizes=np.stack([table[f"{view}_size"].to_numpy().astype(np.int64) for view in VIEWS], axis=1),
        concept_scores=_matrix(table["concepts"], len(concepts)),
        metadata=_matrix(table["metadata"], len(METADATA_FIELDS)),
        problems=problems,
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    _check_rows(index, rows)
    if verify:
        verify_shards(index)
    return index


def verify_shards(index: ShardIndex, progress: Progress | None = None) -> None:
    """Hash every shard; raises DataError naming the first whose bytes are not those that were packed."""
    done = 0
    for shard in index.shards:
        _check_sha256(index.folder / shard.url, shard.sha256)
        done += shard.samples
        if progress:
            progress(done, len(index))


def verify_samples(index: ShardIndex, workers: int = 2, progress: Progress | None = None) -> None:
    """Read every shard with `webdataset` and hold each sample against the index; decode each photo.

    Raises DataError naming the shard and the lesion that differ or whose photo does not decode.
    """

    def check(item: tuple[int, dict[str, Any]]) -> str | None:
        row, sample = item
        where = f"{index.path(int(index.shard[row]))}, lesion {index.lesion_ids[row]}"
        if sample["__key__"] != index.lesion_ids[row]:
            return f"{where}: webdataset reads {sample['__key__']} in its place"
        for view in VIEWS:
            data = sample.get(f"{view}.jpg", b"")
            if data != read_photo_bytes(index, row, view):
                return f"{where}: the {view} photo is not where {SAMPLES} says"
            try:
                if data:
                    check_photo(data)
            except PhotoError as error:
                return f"{where}: the {view} photo does not decode ({error})"
        return None

    done = 0
    for done, (_, problem) in enumerate(_in_order(check, enumerate(_webdataset(index)), workers), start=1):
        if problem:
            raise DataError(f"{problem}; pack the data again")
        if progress:
            progress(done, len(index))
    if done != len(index):
        raise DataError(
            f"{index.folder}: webdataset reads {done} samples, the index has {len(index)}; pack the data again"
        )


def read_photo_bytes(index: ShardIndex, row: int, view: str) -> bytes:
    """The JPEG of one view of one lesion, empty where the view is missing."""
    place = VIEWS.index(view)
    with index.path(int(index.shard[row])).open("rb") as file:
        file.seek(int(index.offsets[row, place]))
        return file.read(int(index.sizes[row, place]))


def _webdataset(index: ShardIndex) -> Iterator[dict[str, Any]]:
    import webdataset

    # All shards in this process, whatever RANK says; one at a time, so that rows follow the index.
    for number, shard in enumerate(index.shards):
        reader = webdataset.WebDataset(
            [str(index.path(number))], shardshuffle=False, nodesplitter=None, workersplitter=None
        )
        samples = list(reader)
        if len(samples) != shard.samples:
            raise DataError(
                f"{index.path(number)}: webdataset reads {len(samples)} samples, the index has {shard.samples}; "
                "pack the data again"
            )
        yield from samples


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({' '.join(str(error).split())}); pack the data again") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: not an index of shards; pack the data again")
    return raw


def _check_size(folder: Path, url: Any, size: Any) -> None:
    # `pipe:` would run a command out of a data file; other schemes and ways out of the folder are no shard of it.
    if not isinstance(url, str) or ":" in url or os.path.basename(url) != url or url in ("", ".", ".."):
        raise DataError(f"{folder / INDEX}: shard url {url!r} is not a file name; only files of this folder are read")
    path = folder / url
    if not path.is_file():
        raise DataError(f"{path}: missing, but {INDEX} lists it; copy the whole folder or pack the data again")
    if path.stat().st_size != size:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, {INDEX} says {size}; copy it again or pack the data again"
        )


def _check_sha256(path: Path, expected: str) -> None:
    actual = _file_sha256(path)
    if actual != expected:
        raise DataError(
            f"{path}: checksum {actual[:16]}... is not the {str(expected)[:16]}... of {INDEX}, the file was changed or "
            "damaged; copy it again or pack the data again"
        )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_samples(path: Path, concepts: int) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable ({str(error).splitlines()[0]}); pack the data again") from None
    if not table.schema.equals(_schema(concepts)):
        raise DataError(f"{path}: its columns are not those of version {VERSION}; pack the data again")
    return table


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    return np.ascontiguousarray(column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width))


def _check_rows(index: ShardIndex, rows: int) -> None:
    """Rows, shards and offsets fit together, so that no reader needs to look again."""
    path = index.folder / SAMPLES
    held = np.bincount(index.shard, minlength=len(index.shards)).tolist()
    if len(index) != rows or held != [shard.samples for shard in index.shards]:
        raise DataError(f"{path}: its rows are not those that {INDEX} counts; pack the data again")
    room = np.array([shard.bytes for shard in index.shards])[index.shard]
    outside = (index.offsets < 0) | (index.sizes < 0) | (index.offsets + index.sizes > room[:, None])
    if outside.any() or not ((index.labels >= UNLABELLED) & (index.labels < len(index.diagnoses))).all():
        raise DataError(f"{path}: an offset or a label is out of range; pack the data again")
