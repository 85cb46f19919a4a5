"""Pack checked lesions into shards, on all cores and with few photos in memory.

The bytes do not depend on the number of threads or on interruptions. Shard k holds lesions k * n to (k + 1) * n in the
order of their hashes, without dropped ones, so a shard depends on its own lesions only. Until it is complete, a set is
written to OUTPUT.part:

    shards/shard-000000.tar       renamed to OUTPUT at the end
    rows/000000.parquet           rows of the finished shard; hash of its input and its checksum are in the schema

After an interruption, finished shards are kept if their input and checksum still match that record. So several
machines can each write a slice of the shards into one OUTPUT.part (`pack_slice`), or tasks on a cluster one shard each
(`Distribute`), before one process writes the index.

An output may be a folder behind a URL (`publish`): each finished shard is uploaded and removed from OUTPUT.part, which
is a local folder then, and after it the record, as OUTPUT/rows.part/000000.parquet. So any machine resumes, and no file
system in common is needed. index.json comes last.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from triderm_dist.checksums import write_checked_json
from triderm_dist.config import RemoteConfig
from triderm_dist.data.group_hashes import GroupHashes
from triderm_dist.data.photo_formats import describe_error, read_photo
from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.lesion_table import LesionTable
from triderm_dist.data.shards.format import FORMAT, INDEX, SAMPLES, VERSION, ShardFile, rows_schema
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.index_schema import read_json
from triderm_dist.data.shards.open import is_url, open_index
from triderm_dist.data.shards.photos import QUALITY, PhotoError, PreparedPhoto, prepare_photo, size_and_hash
from triderm_dist.data.shards.publish import RemoteFolder, local_name
from triderm_dist.data.shards.record import to_record
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.data.threads import Distribute, available_cores, map_in_order
from triderm_dist.files import PATIENT_DATA, atomic_path, exclusive_lock, file_sha256, naming_file, open_new
from triderm_dist.runtime.memory import return_freed_memory
from triderm_dist.schema import UNLABELED, VIEWS, DataError, Lesion, Task
from triderm_dist.tasks import check_packed_for, milk10k_task, recorded_task

Progress = Callable[[int, int], None]
"""Called with (lesions done, all lesions)."""

_RECORD = b"triderm-shard"
_ROWS = "rows.part"
"""The folder of the records of finished shards behind a URL, until the index is there."""


def pack_shards(
    dataset: Dataset,
    output: str | os.PathLike[str],
    *,
    short_side: int | None,
    shard_samples: int = 512,
    invalid: Literal["refuse", "drop"] = "refuse",
    workers: int | None = None,
    progress: Progress | None = None,
    group_hashes: GroupHashes | None = None,
    finish: bool = False,
    distribute: Distribute | None = None,
    release_lesions: bool = False,
) -> ShardIndex:
    """Write the shards of a data set and return their index; the bytes depend on the input and these settings only.

    Lesions are in a fixed pseudo-random order (by hash of the id), so that no shard holds a single diagnosis. Every
    photo is decoded; after all were checked, unreadable ones refuse the set, or drop their lesions, which the index
    lists under `problems`. Photos with a short side over `short_side` pixels are reduced to it; None keeps them. The
    folder appears when it is complete, and an interrupted run resumes from its finished shards. An output that was
    packed from the same input with the same settings is returned unchanged. workers: threads, None for one per core.
    group_hashes: where the groups of the data set are hashes (`hash_groups`), those.  finish: all shards were written
    by `pack_slice`; only their checksums are compared, and photos are not read again.  distribute: writes the shards,
    None for threads of this process.  release_lesions: the caller needs the lesions of the data set no more; a
    `LesionTable` is emptied before the index is written, which takes as much memory again.

    Raises InvalidLesions; Busy where another process packs the folder; DataError for an output that holds something
    else, for no valid lesion, a full disk, and with `finish` for shards that are missing.
    """
    folder, url = local_name(output), os.fspath(output) if is_url(output) else None
    _check_lesions(dataset, folder, invalid)
    packer = _Packer(dataset, short_side, shard_samples, workers or available_cores(), progress, group_hashes, url)
    if _exists(folder, url):
        return _read_packed(folder, packer)
    part = folder.with_name(folder.name + ".part")
    try:
        with exclusive_lock(part / "lock", _refusal(part)), ExitStack() as stack:
            for lock in sorted(part.glob("slice-*.lock")):
                stack.enter_context(exclusive_lock(lock, _refusal(part)))
            if _exists(folder, url):  # packed by another process in the meantime
                return _read_packed(folder, packer)
            if finish:
                shards, problems = packer.finish(part)
            elif distribute:
                shards, problems = packer.distribute(part, distribute)
            else:
                shards, problems = packer.write(part, range(len(packer.slices)))
            if problems and invalid == "refuse":
                packer.remove(part)
                raise InvalidLesions(problems, len(dataset.lesions))
            if not any(shard.file for shard in shards):
                packer.remove(part)
                raise DataError(
                    f"{folder}: no valid lesion to pack; {len(problems)} problems, the first: {problems[0]}"
                )
            if release_lesions and isinstance(dataset.lesions, LesionTable):
                dataset.lesions.clear()
                return_freed_memory()
            packer.write_index(part, shards, dataset.relative([*dataset.problems, *problems]))
            if url:
                _publish_index(part, RemoteFolder(url))
            else:
                (part / "shards").rename(folder)
            shutil.rmtree(part)
    except OSError as error:
        name = error.filename or part
        raise DataError(f"{name}: {error.strerror or error}; fix that and rerun the same command to resume") from None
    return open_index(url or folder, RemoteConfig())


def pack_slice(
    dataset: Dataset,
    output: str | os.PathLike[str],
    number: int,
    of: int,
    *,
    short_side: int | None,
    shard_samples: int = 512,
    invalid: Literal["refuse", "drop"] = "refuse",
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Problem]:
    """Write every `of`-th shard from the `number`-th on (1 to `of`) into OUTPUT.part, for `pack_shards` to finish.

    For processes on several machines with a file system in common, or with an output behind a URL; options as in
    `pack_shards`. Returns the problems of these shards. Raises InvalidLesions, after all of them were written; Busy
    where another process packs the slice, or the whole set; DataError for an output that exists, no valid lesion, or a
    full disk.
    """
    folder, url = local_name(output), os.fspath(output) if is_url(output) else None
    _check_lesions(dataset, folder, invalid)
    if _exists(folder, url):
        raise DataError(f"{folder}: exists; choose another output folder or delete this one")
    packer = _Packer(dataset, short_side, shard_samples, workers or available_cores(), progress, url=url)
    numbers = range(number - 1, len(packer.slices), of)
    packer.total = sum(map(packer.slices.size, numbers))
    part = folder.with_name(folder.name + ".part")
    with ExitStack() as stack:
        with exclusive_lock(part / "lock", _refusal(part)):  # `pack_shards` holds it, and waits for the slice's own
            stack.enter_context(exclusive_lock(part / f"slice-{number}-of-{of}.lock", _refusal(part)))
        _, problems = packer.write(part, numbers)
    if problems and invalid == "refuse":
        raise InvalidLesions(problems, packer.total)
    return problems


def _check_lesions(dataset: Dataset, folder: Path, invalid: str) -> None:
    """Raise InvalidLesions for problems of the tables where they refuse the set, DataError where no lesion is left."""
    if dataset.problems and invalid == "refuse":
        raise InvalidLesions(dataset.problems, len(dataset.lesions) + len({p.lesion_id for p in dataset.problems}))
    if not dataset.lesions:
        first = f"the first: {dataset.problems[0]}" if dataset.problems else "the data set is empty"
        raise DataError(f"{folder}: no valid lesion to pack; {len(dataset.problems)} problems, {first}")


def _refusal(part: Path) -> str:
    return f"{part}: another process is packing this folder; wait for it or end it"


def _exists(folder: Path, url: str | None) -> bool:
    if url:
        return RemoteFolder(url).size(INDEX) is not None
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _read_packed(folder: Path, packer: _Packer) -> ShardIndex:
    """Return the index of an output that exists. Raises DataError where its input or settings differ."""
    advice = "choose another output folder or delete this one"
    if packer.url:
        index = open_index(packer.url, RemoteConfig())
        folder = index.folder
    elif not (folder / INDEX).is_file():
        raise DataError(f"{folder}: exists and is not a packed set; {advice}")
    found, task = read_json(folder / INDEX), packer.task
    packed_for = recorded_task(found, str(folder / INDEX))
    check_packed_for(packed_for, task, str(folder), advice)
    if found.get("packed_with") != packer.settings or found.get("source") != packer.fingerprint():
        raise DataError(f"{folder}: was packed from other data, with other settings or by another version; {advice}")
    if packer.url:
        return index
    if packed_for != task:  # in titles, for example
        write_checked_json(folder / INDEX, {**found, "task": task.to_mapping()})
    part = folder.with_name(folder.name + ".part")
    if part.is_dir() and not (part / "shards").exists():
        shutil.rmtree(part)  # left by a run that was killed after the rename
    return read_index(folder)


@dataclass(frozen=True)
class _Prepared:
    """A lesion's photos with their `size_and_hash`, or the problem with them.

    source: hash of the input.  changes: what was converted, once for every photo.
    """

    source: bytes
    photos: list[bytes]
    sizes_and_hashes: list[int]
    changes: tuple[str, ...] = ()
    problem: Problem | None = None


@dataclass(frozen=True)
class _FinishedShard:
    """A finished shard.

    source: hash of its input.  settings: hash of those that it was packed with.  file: None where all its lesions were
    dropped.  converted: the number of photos by what was converted in them.
    """

    source: str
    settings: str
    file: ShardFile | None
    problems: tuple[Problem, ...]
    converted: Mapping[str, int]


@dataclass
class _OpenShard:
    """A shard that is being written. digest: hash object of its input."""

    tar: TarWriter
    digest: Any
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)


class _Slices(Sequence[list[Lesion]]):
    """The lesions of each shard, made when they are asked for: all in the order of the hashes of their ids."""

    def __init__(self, table: LesionTable, shard_samples: int) -> None:
        self._table, self._samples = table, shard_samples
        hashes = (hashlib.sha256(name.encode()).digest() for name in table.ids)
        keys = np.fromiter((int.from_bytes(digest[:4]) for digest in hashes), np.uint32, len(table))
        self._order = np.argsort(keys).astype(np.uint32 if len(keys) < 1 << 32 else np.int64)
        keys.sort()
        for first, last in _runs(keys):  # of hashes with the same first 4 bytes
            names = {row: table.ids[row].encode() for row in self._order[first:last].tolist()}
            self._order[first:last] = sorted(names, key=lambda row: hashlib.sha256(names[row]).digest())

    def __len__(self) -> int:
        return -(-len(self._table) // self._samples)

    def size(self, number: int) -> int:
        """Return the number of lesions of a shard."""
        return min(self._samples, len(self._table) - number * self._samples)

    @overload
    def __getitem__(self, number: int) -> list[Lesion]: ...
    @overload
    def __getitem__(self, number: slice) -> list[list[Lesion]]: ...
    def __getitem__(self, number: int | slice) -> list[Lesion] | list[list[Lesion]]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        start = range(len(self))[number] * self._samples
        return self._table.take(self._order[start : start + self._samples])


def _runs(keys: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, behind the last) of each run of equal keys, of sorted ones (N,)."""
    equal = np.flatnonzero(keys[1:] == keys[:-1]).tolist()
    runs: list[tuple[int, int]] = []
    for at in equal:
        if runs and runs[-1][1] == at + 1:
            runs[-1] = (runs[-1][0], at + 2)
        else:
            runs.append((at, at + 2))
    return runs


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards of lesions, in this process or one on another machine.

    settings: short_side, quality and so on.  url: of the folder that they are uploaded to, None where they stay.
    """

    task: Task
    concepts: tuple[str, ...]
    settings: Mapping[str, Any]
    workers: int
    url: str | None = None

    def keep_or_write(self, part: Path, number: int, lesions: list[Lesion]) -> None:
        """Write a shard and its record, unless an earlier process has. part: a folder that every machine sees, not used
        where the output is behind a URL: then the files pass through a temporary folder of this machine.
        """
        with ExitStack() as stack:
            if self.url:
                part = Path(stack.enter_context(TemporaryDirectory(prefix="triderm-pack-")))
            for name in ("shards", "rows"):
                (part / name).mkdir(parents=True, exist_ok=True)
            if not self.is_valid(part, number, lesions, self.read_record(part, number)):
                # A process that was given up may still write the file of this name.
                _tar_path(part, number).unlink(missing_ok=True)
                self.write(part, [(number, lesions)])

    def is_valid(self, part: Path, number: int, lesions: Sequence[Lesion], record: _FinishedShard | None) -> bool:
        """Return whether the file has the recorded checksum and its input is unchanged."""
        return record is not None and self.is_intact(part, number, record) and self.source(lesions) == record.source

    def is_intact(self, part: Path, number: int, record: _FinishedShard) -> bool:
        """Return whether the file has the recorded checksum; behind a URL, the recorded size."""
        if self.url and record.file:
            return RemoteFolder(self.url).size(record.file.url) == record.file.bytes
        return _is_intact(part, number, record)

    def read_record(self, part: Path, number: int) -> _FinishedShard | None:
        """Return what is known of a finished shard; behind a URL, also of one that another machine has written."""
        if self.url:
            path = _rows_path(part, number)
            if (content := RemoteFolder(self.url).read(f"{_ROWS}/{path.name}")) is None:
                return None
            with atomic_path(path, PATIENT_DATA) as temporary:
                temporary.write_bytes(content)
        return _read_record(part, number)

    def write(
        self,
        part: Path,
        shards: Iterable[tuple[int, list[Lesion]]],
        advance: Callable[[int], None] = lambda lesions: None,
    ) -> dict[int, _FinishedShard]:
        """Write shards of (number, lesions), and return them by number. advance: called with lesions that are done."""
        finished: dict[int, _FinishedShard] = {}
        jobs = ((number, len(lesions), lesion) for number, lesions in shards for lesion in lesions)
        current: _OpenShard | None = None
        done = 0
        for (number, count, lesion), prepared in map_in_order(lambda job: self._prepare(job[2]), jobs, self.workers):
            if current is None:
                current, done = _OpenShard(TarWriter(_tar_path(part, number)), self.digest()), 0
            done += 1
            current.digest.update(prepared.source)
            if prepared.problem:
                current.problems.append(prepared.problem)
            else:
                current.converted.update(prepared.changes)
                current.rows.append(self._write_lesion(current.tar, lesion, prepared))
            if done == count:
                finished[number] = self._close(part, number, current)
                current = None
            advance(1)
        return finished

    def _write_lesion(self, tar: TarWriter, lesion: Lesion, prepared: _Prepared) -> dict[str, Any]:
        row: dict[str, Any] = {
            "lesion_id": lesion.lesion_id,
            "group": lesion.group,
            "label": lesion.label,
            "fine": lesion.fine,
            "shard": -1,  # set by write_index, which leaves out empty shards
            "concepts": lesion.concepts,
            "metadata": lesion.metadata,
            "photos": prepared.sizes_and_hashes,
        }
        for view, data in zip(VIEWS, prepared.photos, strict=True):
            row[f"{view}_offset"] = tar.add(f"{lesion.lesion_id}.{view}.jpg", data) if data else 0
            row[f"{view}_size"] = len(data)
        tar.add(f"{lesion.lesion_id}.json", json.dumps(to_record(lesion, self.task, self.concepts)).encode())
        return row

    def _close(self, part: Path, number: int, shard: _OpenShard) -> _FinishedShard:
        size, sha256 = shard.tar.close()
        path = _tar_path(part, number)
        file = ShardFile(path.name, len(shard.rows), size, sha256) if shard.rows else None
        if file is None:
            path.unlink()
        settings = self.digest().hexdigest()
        finished = _FinishedShard(shard.digest.hexdigest(), settings, file, tuple(shard.problems), shard.converted)
        record = {
            "source": finished.source,
            "settings": settings,
            "file": vars(file) if file else None,
            "problems": [asdict(problem) for problem in shard.problems],
            "converted": dict(shard.converted),
        }
        schema = rows_schema(len(self.concepts), len(self.task.fields), bool(self.task.fine))
        schema = schema.with_metadata({_RECORD: json.dumps(record).encode()})
        with atomic_path(_rows_path(part, number), PATIENT_DATA) as temporary:
            pq.write_table(pa.Table.from_pylist(shard.rows, schema), temporary)
        if self.url:
            remote = RemoteFolder(self.url)
            if file:
                remote.put(path, file.url)
                path.unlink()
            remote.put(_rows_path(part, number), f"{_ROWS}/{_rows_path(part, number).name}")
        return finished

    def digest(self) -> Any:
        """Return a hash object of what the bytes of every shard depend on."""
        settings = {name: value for name, value in self.settings.items() if name != "shard_samples"}
        # Sets of MILK10k were packed before there were other tasks; their hashes do not change.
        task = [] if self.task.matches(milk10k_task()) else [self.task.meaning()]
        task += [[*self.task.fine.names]] if self.task.fine else []
        return hashlib.sha256(json.dumps([FORMAT, VERSION, settings, self.concepts, *task]).encode())

    def source(self, lesions: Sequence[Lesion]) -> str:
        """Return the hash of the input of a shard of these lesions."""
        digest = self.digest()
        for lesion in lesions:
            digest.update(_source_of(lesion, [_read(path) for path in _paths(lesion)]))
        return str(digest.hexdigest())

    def _prepare(self, lesion: Lesion) -> _Prepared:
        files = [_read(path) for path in _paths(lesion)]
        source = _source_of(lesion, files)
        photos, changes = list[bytes](), list[str]()
        for path, data in zip(_paths(lesion), files, strict=True):
            try:
                if isinstance(data, OSError):
                    raise PhotoError(describe_error(data))
                photo = prepare_photo(data, self.settings["short_side"]) if path else PreparedPhoto(b"")
            except PhotoError as error:
                problem = Problem(lesion.lesion_id, "unreadable photo", str(path), str(error))
                return _Prepared(source, [], [], problem=problem)
            photos.append(photo.data)
            changes += photo.changes
        sizes_and_hashes = [number for data in photos for number in size_and_hash(data)]
        return _Prepared(source, photos, sizes_and_hashes, tuple(changes))


class _Packer:
    """Packs one data set with given settings."""

    def __init__(
        self,
        dataset: Dataset,
        short_side: int | None,
        shard_samples: int,
        workers: int,
        progress: Progress | None,
        group_hashes: GroupHashes | None = None,
        url: str | None = None,
    ) -> None:
        return_freed_memory()  # of reading the tables
        self.slices = _Slices(LesionTable.of(dataset.lesions), shard_samples)
        return_freed_memory()  # of sorting
        self.settings = {"short_side": short_side, "quality": QUALITY, "shard_samples": shard_samples}
        self.writer = ShardWriter(dataset.task, dataset.concepts, self.settings, workers, url)
        self.url = url
        self.task, self.concepts, self.workers, self.progress = dataset.task, dataset.concepts, workers, progress
        self.done, self.total, self.group_hashes = 0, len(dataset.lesions), group_hashes

    def fingerprint(self) -> str:
        """Return the SHA-256 of the settings, the tables and the bytes of every photo."""
        return self._joined([source for _, source in map_in_order(self.writer.source, self.slices, self.workers)])

    def write(self, part: Path, numbers: Sequence[int]) -> tuple[list[_FinishedShard], list[Problem]]:
        """Write these shards to PART/shards and their records to PART/rows; keep valid ones of an interrupted run.

        Other files are removed, unless they are of other numbers.
        """
        for name in ("shards", "rows"):
            (part / name).mkdir(exist_ok=True)
        found = dict(self._records(part, numbers))
        kept: dict[int, _FinishedShard] = {}
        for number, valid in map_in_order(
            lambda number: self.writer.is_valid(part, number, self.slices[number], found[number]),
            [number for number, record in found.items() if record],
            self.workers,
        ):
            if valid and (shard := found[number]):
                kept[number] = shard
                self._advance(self.slices.size(number))
        others = set(range(len(self.slices))) - set(numbers)
        for path in _other_files(part, {*kept, *others}):
            if not others or path.suffix in (".tar", ".parquet"):  # a temporary file may be another slice's
                path.unlink()
        missing = ((number, self.slices[number]) for number in numbers if number not in kept)
        written = self.writer.write(part, missing, self._advance)
        shards = [shard for _, shard in sorted({**kept, **written}.items())]
        return shards, [problem for shard in shards for problem in shard.problems]

    def distribute(self, part: Path, distribute: Distribute) -> tuple[list[_FinishedShard], list[Problem]]:
        """Have all shards written by `distribute`; otherwise as `write`."""
        numbers = range(len(self.slices))
        for name in ("shards", "rows"):
            (part / name).mkdir(exist_ok=True)
        for path in _other_files(part, numbers):
            path.unlink()
        work = functools.partial(self.writer.keep_or_write, part.absolute())
        for number in distribute(work, ((number, self.slices[number]) for number in numbers)):
            self._advance(self.slices.size(number))
        shards = []
        for number, shard in self._records(part, numbers):
            if shard is None:
                raise DataError(
                    f"{_rows_path(part, number)}: missing, though its task has ended; give an output folder that every "
                    "machine of the cluster sees under this name"
                )
            shards.append(shard)
        return shards, [problem for shard in shards for problem in shard.problems]

    def finish(self, part: Path) -> tuple[list[_FinishedShard], list[Problem]]:
        """Return the shards that slices have written, after comparing their checksums. Raises DataError otherwise."""
        shards = []
        for number, shard in map_in_order(
            lambda number: self._written(part, number), range(len(self.slices)), self.workers
        ):
            shards.append(shard)
            self._advance(self.slices.size(number))
        for path in _other_files(part, range(len(self.slices))):
            path.unlink()
        return shards, [problem for shard in shards for problem in shard.problems]

    def write_index(self, part: Path, shards: Sequence[_FinishedShard], problems: Sequence[Problem]) -> None:
        """Write the index of all shards that hold a lesion."""
        files = [(number, shard.file) for number, shard in enumerate(shards) if shard.file]

        def tables() -> Iterator[pa.Table]:
            schema = rows_schema(len(self.concepts), len(self.task.fields), bool(self.task.fine))
            for shard, (number, _) in enumerate(files):
                rows = pq.read_table(_rows_path(part, number))
                shard_column = pa.array([shard] * len(rows), pa.int32())
                yield rows.set_column(schema.get_field_index("shard"), "shard", shard_column).cast(schema)

        about: dict[str, Any] = {
            "packed_with": self.settings,
            "source": self._joined([shard.source for shard in shards]),
        }
        if self.group_hashes:
            about["groups"] = {"salt": self.group_hashes.fingerprint}
            problems = self.group_hashes.without_ids(problems)
        if converted := sum((Counter(shard.converted) for shard in shards), Counter[str]()):
            about["converted"] = dict(sorted(converted.items()))
        write_index(part / "shards", tables(), [file for _, file in files], self.task, self.concepts, problems, about)

    def remove(self, part: Path) -> None:
        """Remove all that was written."""
        if self.url:
            remote = RemoteFolder(self.url)
            for _ in map_in_order(
                lambda number: remote.remove(_tar_path(part, number).name), range(len(self.slices)), self.workers
            ):
                pass
            remote.remove(_ROWS)
        shutil.rmtree(part)

    # --- shards of an interrupted run ---

    def _records(self, part: Path, numbers: Sequence[int]) -> Iterator[tuple[int, _FinishedShard | None]]:
        return map_in_order(lambda number: self.writer.read_record(part, number), numbers, self.workers)

    def _written(self, part: Path, number: int) -> _FinishedShard:
        """Return a shard of a slice. Raises DataError unless it holds the lesions of this number."""
        record = self.writer.read_record(part, number)
        if record is None or not self.writer.is_intact(part, number, record):
            raise DataError(
                f"{_tar_path(part, number)}: missing or damaged; run its slice again, as slice={number + 1}/"
                f"{len(self.slices)}"
            )
        ids = pq.read_table(_rows_path(part, number), columns=["lesion_id"])["lesion_id"].to_pylist()
        dropped = {problem.lesion_id for problem in record.problems}
        expected = [lesion.lesion_id for lesion in self.slices[number] if lesion.lesion_id not in dropped]
        if ids != expected or record.settings != self.writer.digest().hexdigest():
            raise DataError(
                f"{_tar_path(part, number)}: holds other lesions or was packed with other settings; run slice="
                f"{number + 1}/{len(self.slices)} with these tables and settings"
            )
        return record

    def _joined(self, sources: Sequence[str]) -> str:
        return hashlib.sha256("".join(sources).encode()).hexdigest()

    def _advance(self, lesions: int) -> None:
        self.done += lesions
        if self.progress:
            self.progress(self.done, self.total)


def _publish_index(part: Path, remote: RemoteFolder) -> None:
    """Upload the index, which makes the set complete, and remove the records of the shards."""
    for name in (SAMPLES, INDEX):
        remote.put(part / "shards" / name, name)
    remote.remove(_ROWS)


def _read_record(part: Path, number: int) -> _FinishedShard | None:
    try:
        schema = pq.read_schema(_rows_path(part, number))
        record = json.loads(schema.metadata[_RECORD])
        file = ShardFile(**record["file"]) if record["file"] else None
        problems = tuple(Problem(**entry) for entry in record["problems"])
        # Shards of versions that did not count conversions lack the key, and are written again.
        return _FinishedShard(record["source"], record.get("settings", ""), file, problems, record["converted"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def _paths(lesion: Lesion) -> list[str | None]:
    return [lesion.images[view] for view in VIEWS]


def _read(path: str | None) -> bytes | OSError:
    try:
        return read_photo(path) if path else b""
    except OSError as error:
        return error


def _source_of(lesion: Lesion, files: Sequence[bytes | OSError]) -> bytes:
    """Hash a lesion's row and photo files."""
    photos = [hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else describe_error(data) for data in files]
    row = [lesion.lesion_id, lesion.group, lesion.label, repr(lesion.concepts), repr(lesion.metadata), photos]
    row += [lesion.fine] if lesion.fine != UNLABELED else []
    return hashlib.sha256(json.dumps(row).encode()).digest()


def _is_intact(part: Path, number: int, record: _FinishedShard) -> bool:
    """Return whether the tar has the recorded checksum."""
    path = _tar_path(part, number)
    return record.file is None or (path.is_file() and file_sha256(path) == record.file.sha256)


def _other_files(part: Path, numbers: Iterable[int]) -> set[Path]:
    """Return the files in PART that are not of the shards `numbers`."""
    own = {path(part, number) for number in numbers for path in (_tar_path, _rows_path)}
    return {*(part / "shards").iterdir(), *(part / "rows").iterdir()} - own


def _tar_path(part: Path, number: int) -> Path:
    return part / "shards" / f"shard-{number:06d}.tar"


def _rows_path(part: Path, number: int) -> Path:
    return part / "rows" / f"{number:06d}.parquet"


class TarWriter:
    """Writes a tar whose bytes depend on its members only, and hashes it."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open_new(path, PATIENT_DATA)
        self._digest = hashlib.sha256()
        self._position = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its data."""
        info = tarfile.TarInfo(name)  # owner, time and mode are constants
        info.size = len(data)
        self._write(info.tobuf(tarfile.GNU_FORMAT))
        offset = self._position
        self._write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> tuple[int, str]:
        """Close the file and return its (bytes, SHA-256)."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._position % tarfile.RECORDSIZE))
        with naming_file(self._path):
            self._file.close()
        return self._position, self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        with naming_file(self._path):
            self._file.write(data)
        self._digest.update(data)
        self._position += len(data)
