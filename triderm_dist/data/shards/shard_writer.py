"""Write shards of lesions: decode and reduce their photos on threads, append them to a tar, record the finished shard.

The bytes do not depend on the number of threads, and those of a shard on its own lesions only.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from triderm_dist.data.photo_formats import describe_error, read_photo
from triderm_dist.data.problems import Problem
from triderm_dist.data.shards.format import FORMAT, VERSION, ShardFile, rows_schema
from triderm_dist.data.shards.part_folder import FinishedShard, PartFolder
from triderm_dist.data.shards.photos import PhotoError, PreparedPhoto, prepare_photo, size_and_hash
from triderm_dist.data.shards.record import to_record, to_row
from triderm_dist.data.shards.tar_writer import TarWriter
from triderm_dist.data.threads import map_in_order
from triderm_dist.schema import UNLABELED, VIEWS, Lesion, Task
from triderm_dist.tasks import milk10k_task


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards of lesions, in this process or one on another machine.

    settings: short_side, quality and so on.  workers: threads.
    """

    task: Task
    concepts: tuple[str, ...]
    settings: Mapping[str, Any]
    workers: int

    def keep_or_write(self, part: PartFolder, number: int, lesions: list[Lesion]) -> None:
        """Write a shard and its record, unless an earlier process has.

        part: in a folder that every machine sees; behind a URL, the files pass through a temporary folder of this
        machine instead.
        """
        with ExitStack() as stack:
            if part.url:
                part = replace(part, path=Path(stack.enter_context(TemporaryDirectory(prefix="triderm-pack-"))))
            part.create()
            if not self.is_valid(part, number, lesions, part.read(number)):
                # A process that was given up may still write the file of this name.
                part.tar(number).unlink(missing_ok=True)
                self.write(part, [(number, lesions)])

    def is_valid(self, part: PartFolder, number: int, lesions: Sequence[Lesion], shard: FinishedShard | None) -> bool:
        """Return whether a shard is finished, its file is intact and its input is unchanged."""
        return shard is not None and part.is_intact(number, shard) and self.source(lesions) == shard.source

    def write(
        self,
        part: PartFolder,
        shards: Iterable[tuple[int, list[Lesion]]],
        advance: Callable[[int], None] = lambda lesions: None,
    ) -> dict[int, FinishedShard]:
        """Write shards of (number, lesions), and return them by number. advance: called with lesions that are done."""
        finished: dict[int, FinishedShard] = {}
        jobs = ((number, len(lesions), lesion) for number, lesions in shards for lesion in lesions)
        current: _OpenShard | None = None
        done = 0
        for (number, count, lesion), prepared in map_in_order(lambda job: self._prepare(job[2]), jobs, self.workers):
            if current is None:
                current, done = _OpenShard(TarWriter(part.tar(number)), self.digest()), 0
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

    def _prepare(self, lesion: Lesion) -> _PreparedLesion:
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
                return _PreparedLesion(source, [], [], problem=problem)
            photos.append(photo.data)
            changes += photo.changes
        return _PreparedLesion(source, photos, [*map(size_and_hash, photos)], tuple(changes))

    def _write_lesion(self, tar: TarWriter, lesion: Lesion, prepared: _PreparedLesion) -> dict[str, Any]:
        """Append the photos and the record of a lesion to a tar, and return its row."""
        locations = {
            view: (tar.add(f"{lesion.lesion_id}.{view}.jpg", data) if data else 0, len(data))
            for view, data in zip(VIEWS, prepared.photos, strict=True)
        }
        tar.add(f"{lesion.lesion_id}.json", json.dumps(to_record(lesion, self.task, self.concepts)).encode())
        return to_row(lesion, lesion.concepts, prepared.sizes_and_hashes, locations)

    def _close(self, part: PartFolder, number: int, shard: _OpenShard) -> FinishedShard:
        """Close the tar of a shard and record it; a tar without lesions is removed."""
        size, sha256 = shard.tar.close()
        path = part.tar(number)
        file = ShardFile(path.name, len(shard.rows), size, sha256) if shard.rows else None
        if file is None:
            path.unlink()
        settings = self.digest().hexdigest()
        finished = FinishedShard(shard.digest.hexdigest(), settings, file, tuple(shard.problems), shard.converted)
        schema = rows_schema(self.task, self.concepts)
        part.add(number, finished, pa.Table.from_pylist(shard.rows, schema))
        return finished


@dataclass(frozen=True)
class _PreparedLesion:
    """A lesion's photos with their `size_and_hash`, or the problem with them.

    source: hash of the input.  changes: what was converted, once for every photo.
    """

    source: bytes
    photos: list[bytes]
    sizes_and_hashes: list[tuple[int, int, int]]
    changes: tuple[str, ...] = ()
    problem: Problem | None = None


@dataclass
class _OpenShard:
    """A shard that is being written. digest: hash object of its input."""

    tar: TarWriter
    digest: Any
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)


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
