"""Checked lesions -> shards: on all cores, a few photos in memory, the same bytes however it is run or interrupted.

Shard k holds lesions k * n to (k + 1) * n in the order of their hashes, less those that are dropped; so a shard depends
on its own lesions alone. While it is made, a set lives in OUTPUT.part:

    shards/shard-000000.tar       becomes OUTPUT when all is done
    rows/000000.parquet           the finished shard's rows; what it was made from, and its checksum, in the schema

A run that was killed keeps every shard whose input and checksum are still those of its record.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.milk10k import Dataset
from triderm_dist.data.shards.format import FORMAT, INDEX, VERSION, ShardFile, rows_schema
from triderm_dist.data.shards.index import ShardIndex, read_index, read_raw_index
from triderm_dist.data.shards.photos import QUALITY, PhotoError, photo_facts, prepare_photo
from triderm_dist.data.shards.record import describe
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.data.threads import available_cores, in_order
from triderm_dist.files import atomic_path, exclusive_lock, file_sha256
from triderm_dist.schema import VIEWS, DataError, Lesion

Progress = Callable[[int, int], None]
"""Called with (lesions done, lesions in all)."""

_RECORD = b"triderm-shard"


def pack_shards(
    dataset: Dataset,
    output: str | os.PathLike[str],
    *,
    short_side: int | None,
    shard_samples: int = 512,
    invalid: Literal["refuse", "drop"] = "refuse",
    workers: int | None = None,
    progress: Progress | None = None,
) -> ShardIndex:
    """Write the shards of a data set and return their index; the bytes depend on the input and these settings alone.

    Lesions come in a fixed pseudo-random order (by hash of the id), so that no shard holds one diagnosis only. Every
    photo is decoded on the way; unreadable ones refuse the whole set once all were seen, or drop their lesions, which
    the index lists under `problems`. Photos over `short_side` pixels are reduced to it, None keeps them. The folder
    appears when it is complete; a killed run goes on from its finished shards. Where it was packed before, from the
    same input with the same settings, it is returned as it is. `workers` threads, None for one a core.

    Raises InvalidLesions, or DataError for an output that holds something else, one that another process is making, no
    lesion left, or a full disk.
    """
    folder = Path(output)
    if dataset.problems and invalid == "refuse":
        raise InvalidLesions(dataset.problems, len(dataset.lesions) + len({p.lesion_id for p in dataset.problems}))
    if not dataset.lesions:
        raise DataError(f"{folder}: no lesion is left to pack; {len(dataset.problems)} problems, {_first(dataset)}")
    packing = _Packing(dataset, short_side, shard_samples, workers or available_cores(), progress)
    if _occupied(folder):
        return _already_packed(folder, packing)
    part = folder.with_name(folder.name + ".part")
    try:
        refusal = DataError(f"{part}: another process is packing here; wait for it or end it")
        with exclusive_lock(part / "lock", refusal):
            if _occupied(folder):  # made by another process in the meantime
                return _already_packed(folder, packing)
            shards, problems = packing.write(part)
            if problems and invalid == "refuse":
                shutil.rmtree(part)
                raise InvalidLesions(problems, len(dataset.lesions))
            if not any(shard.file for shard in shards):
                shutil.rmtree(part)
                raise DataError(f"{folder}: no lesion is left to pack; {len(problems)} problems, first {problems[0]}")
            packing.finish(part, shards, [*dataset.problems, *problems])
            (part / "shards").rename(folder)
            shutil.rmtree(part)
    except OSError as error:
        name = error.filename or part
        raise DataError(
            f"{name}: {error.strerror or error}; correct that, and the same command goes on where it stopped"
        ) from None
    return read_index(folder)


def _first(dataset: Dataset) -> str:
    return f"the first: {dataset.problems[0]}" if dataset.problems else "the data set is empty"


def _occupied(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _already_packed(folder: Path, packing: _Packing) -> ShardIndex:
    advice = "choose another output folder or delete this one"
    if not (folder / INDEX).is_file():
        raise DataError(f"{folder}: exists and holds no packed shards; {advice}")
    found = read_raw_index(folder / INDEX)
    same = found.get("packed_with") == packing.settings and found.get("source") == packing.fingerprint()
    if not same:
        made = "from other data, with other settings or by another version"
        raise DataError(f"{folder}: exists and was packed {made}; {advice}")
    left_over = folder.with_name(folder.name + ".part")
    if left_over.is_dir() and not (left_over / "shards").exists():
        shutil.rmtree(left_over)  # killed between its last two steps
    return read_index(folder)


@dataclass(frozen=True)
class _Prepared:
    """A lesion's photos, or what is wrong with them; and a hash of all that went in."""

    source: bytes
    photos: list[bytes]
    facts: list[int]
    problem: Problem | None = None


@dataclass(frozen=True)
class _Shard:
    """A finished shard: what it was made from; its file, None where all its lesions were dropped; their problems."""

    source: str
    file: ShardFile | None
    problems: tuple[Problem, ...]


@dataclass
class _Open:
    """A shard that is being written."""

    tar: TarWriter
    digest: Any
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class _Packing:
    """One data set with one group of settings on its way into shards."""

    def __init__(
        self, dataset: Dataset, short_side: int | None, shard_samples: int, workers: int, progress: Progress | None
    ) -> None:
        order = sorted(dataset.lesions, key=lambda lesion: hashlib.sha256(lesion.lesion_id.encode()).digest())
        self.slices = [order[start : start + shard_samples] for start in range(0, len(order), shard_samples)]
        self.concepts, self.short_side, self.workers, self.progress = dataset.concepts, short_side, workers, progress
        self.settings = {"short_side": short_side, "quality": QUALITY, "shard_samples": shard_samples}
        self.done, self.total = 0, len(order)

    def fingerprint(self) -> str:
        """SHA-256 of the settings, the tables and the bytes of every photo."""
        return self._joined([source for _, source in in_order(self._source, self.slices, self.workers)])

    def write(self, part: Path) -> tuple[list[_Shard], list[Problem]]:
        """Every shard into PART/shards with its record in PART/rows; those of an earlier run that fit are kept."""
        for name in ("shards", "rows"):
            (part / name).mkdir(exist_ok=True)
        found = {number: self._record(part, number) for number in range(len(self.slices))}
        kept: dict[int, _Shard] = {}
        for number, fits in in_order(
            lambda number: self._fits(part, number, found[number]),
            [number for number, record in found.items() if record],
            self.workers,
        ):
            if fits and (shard := found[number]):
                kept[number] = shard
                self._advance(len(self.slices[number]))
        keep = {path(part, number) for number in kept for path in (_tar_path, _rows_path)}
        for path in {*(part / "shards").iterdir(), *(part / "rows").iterdir()} - keep:
            path.unlink()
        made = self._make(part, [number for number in range(len(self.slices)) if number not in kept])
        shards = [shard for _, shard in sorted({**kept, **made}.items())]
        return shards, [problem for shard in shards for problem in shard.problems]

    def finish(self, part: Path, shards: Sequence[_Shard], problems: Sequence[Problem]) -> None:
        """Write the index of all shards."""
        files = [(number, shard.file) for number, shard in enumerate(shards) if shard.file]

        def tables() -> Iterator[pa.Table]:
            schema = rows_schema(len(self.concepts))
            for place, (number, _) in enumerate(files):
                rows = pq.read_table(_rows_path(part, number))
                number_column = pa.array([place] * len(rows), pa.int32())
                yield rows.set_column(schema.get_field_index("shard"), "shard", number_column).cast(schema)

        about = {"packed_with": self.settings, "source": self._joined([shard.source for shard in shards])}
        write_index(part / "shards", tables(), [file for _, file in files], self.concepts, problems, about)

    # --- shards of an earlier run ---

    def _record(self, part: Path, number: int) -> _Shard | None:
        try:
            schema = pq.read_schema(_rows_path(part, number))
            record = json.loads(schema.metadata[_RECORD])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return None
        file = ShardFile(**record["file"]) if record["file"] else None
        return _Shard(record["source"], file, tuple(Problem(**entry) for entry in record["problems"]))

    def _fits(self, part: Path, number: int, record: _Shard | None) -> bool:
        if record is None:
            return False
        path = _tar_path(part, number)
        whole_file = record.file is None or (path.is_file() and file_sha256(path) == record.file.sha256)
        return whole_file and self._source(self.slices[number]) == record.source

    # --- new shards ---

    def _make(self, part: Path, numbers: Sequence[int]) -> dict[int, _Shard]:
        made: dict[int, _Shard] = {}
        jobs = ((number, lesion) for number in numbers for lesion in self.slices[number])
        current: _Open | None = None
        seen = 0
        for (number, lesion), prepared in in_order(lambda job: self._prepare(job[1]), jobs, self.workers):
            if current is None:
                current, seen = _Open(TarWriter(_tar_path(part, number)), self._digest()), 0
            seen += 1
            current.digest.update(prepared.source)
            if prepared.problem:
                current.problems.append(prepared.problem)
            else:
                current.rows.append(self._write(current.tar, lesion, prepared))
            if seen == len(self.slices[number]):
                made[number] = self._close(part, number, current)
                current = None
            self._advance(1)
        return made

    def _write(self, tar: TarWriter, lesion: Lesion, prepared: _Prepared) -> dict[str, Any]:
        row: dict[str, Any] = {
            "lesion_id": lesion.lesion_id,
            "group": lesion.group,
            "label": lesion.label,
            "shard": -1,  # known when it is known which shards hold anything
            "concepts": lesion.concepts,
            "metadata": lesion.metadata,
            "photos": prepared.facts,
        }
        for view, data in zip(VIEWS, prepared.photos, strict=True):
            row[f"{view}_offset"] = tar.add(f"{lesion.lesion_id}.{view}.jpg", data) if data else 0
            row[f"{view}_size"] = len(data)
        tar.add(f"{lesion.lesion_id}.json", json.dumps(describe(lesion, self.concepts)).encode())
        return row

    def _close(self, part: Path, number: int, shard: _Open) -> _Shard:
        size, sha256 = shard.tar.close()
        path = _tar_path(part, number)
        file = ShardFile(path.name, len(shard.rows), size, sha256) if shard.rows else None
        if file is None:
            path.unlink()
        finished = _Shard(shard.digest.hexdigest(), file, tuple(shard.problems))
        record = {
            "source": finished.source,
            "file": vars(file) if file else None,
            "problems": [asdict(problem) for problem in shard.problems],
        }
        schema = rows_schema(len(self.concepts)).with_metadata({_RECORD: json.dumps(record).encode()})
        with atomic_path(_rows_path(part, number)) as beside:
            pq.write_table(pa.Table.from_pylist(shard.rows, schema), beside)
        return finished

    # --- what goes in ---

    def _digest(self) -> Any:
        settings = {name: value for name, value in self.settings.items() if name != "shard_samples"}
        return hashlib.sha256(json.dumps([FORMAT, VERSION, settings, self.concepts]).encode())

    def _source(self, lesions: Sequence[Lesion]) -> str:
        """Hash of all that goes into a shard of these lesions."""
        digest = self._digest()
        for lesion in lesions:
            digest.update(_source_of(lesion, [_read(path) for path in _paths(lesion)]))
        return str(digest.hexdigest())

    def _joined(self, sources: Sequence[str]) -> str:
        return hashlib.sha256("".join(sources).encode()).hexdigest()

    def _prepare(self, lesion: Lesion) -> _Prepared:
        files = [_read(path) for path in _paths(lesion)]
        source = _source_of(lesion, files)
        photos = []
        for path, data in zip(_paths(lesion), files, strict=True):
            try:
                if isinstance(data, OSError):
                    raise PhotoError(data.strerror or str(data))
                photos.append(prepare_photo(data, self.short_side) if path else b"")
            except PhotoError as error:
                return _Prepared(source, [], [], Problem(lesion.lesion_id, "unreadable photo", str(path), str(error)))
        return _Prepared(source, photos, [fact for data in photos for fact in photo_facts(data)])

    def _advance(self, lesions: int) -> None:
        self.done += lesions
        if self.progress:
            self.progress(self.done, self.total)


def _paths(lesion: Lesion) -> list[str | None]:
    return [lesion.images[view] for view in VIEWS]


def _read(path: str | None) -> bytes | OSError:
    try:
        return Path(path).read_bytes() if path else b""
    except OSError as error:
        return error


def _source_of(lesion: Lesion, files: Sequence[bytes | OSError]) -> bytes:
    photos = [hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else str(data) for data in files]
    row = [lesion.lesion_id, lesion.group, lesion.label, repr(lesion.concepts), repr(lesion.metadata), photos]
    return hashlib.sha256(json.dumps(row).encode()).digest()


def _tar_path(part: Path, number: int) -> Path:
    return part / "shards" / f"shard-{number:06d}.tar"


def _rows_path(part: Path, number: int) -> Path:
    return part / "rows" / f"{number:06d}.parquet"


class TarWriter:
    """A tar whose bytes depend on its members alone, hashed as it is written."""

    def __init__(self, path: Path) -> None:
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

    def close(self) -> tuple[int, str]:
        """(bytes, SHA-256) of the file."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._position % tarfile.RECORDSIZE))
        self._file.close()
        return self._position, self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)
