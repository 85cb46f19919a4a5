"""Pack checked lesions into shards, on all cores and with few photos in memory.

The bytes do not depend on the number of threads or on interruptions. Shard k holds lesions k * n to (k + 1) * n in the
order of their hashes, without dropped ones, so a shard depends on its own lesions only. Until it is complete, a set is
written to OUTPUT.part (`part_folder`), whose folder of tars is renamed to OUTPUT at the end.

After an interruption, finished shards are kept if their input and checksum still match their record. So several
machines can each write a slice of the shards into one OUTPUT.part (`pack_slice`), or tasks on a cluster one shard each
(`Distribute`), before one process writes the index.

An output may be a folder behind a URL (`publish`): finished shards and their records are uploaded, and index.json comes
last. So any machine resumes, and no file system in common is needed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from triderm_dist.checksums import write_checked_json
from triderm_dist.config import RemoteConfig
from triderm_dist.data.group_hashes import GroupHashes
from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.progress import Progress, no_progress
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.lesion_table import LesionTable
from triderm_dist.data.shards.format import INDEX, rows_schema
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.index_schema import read_index_json
from triderm_dist.data.shards.open import is_url, open_index
from triderm_dist.data.shards.part_folder import FinishedShard, PartFolder
from triderm_dist.data.shards.photos import QUALITY
from triderm_dist.data.shards.publish import RemoteFolder, local_name
from triderm_dist.data.shards.shard_lesions import ShardLesions
from triderm_dist.data.shards.shard_writer import ShardWriter
from triderm_dist.data.shards.slice_locks import lock_all, lock_slice
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.data.threads import Distribute, available_cores, map_in_order
from triderm_dist.files import PART_LOCK, check_no_mount, follow_link
from triderm_dist.runtime.memory import return_freed_memory
from triderm_dist.schema import DataError
from triderm_dist.tasks import check_packed_for, recorded_task


def pack_shards(
    dataset: Dataset,
    output: str | os.PathLike[str],
    *,
    short_side: int | None,
    shard_samples: int = 512,
    invalid: Literal["refuse", "drop"] = "refuse",
    workers: int | None = None,
    progress: Progress = no_progress,
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
    packer = _Packer(dataset, output, short_side, shard_samples, invalid, workers, progress)
    part = packer.part.path
    if packer.output_exists():
        return packer.read_output()
    try:
        with lock_all(part, _refusal(part)):
            if packer.output_exists():  # packed by another process in the meantime
                return packer.read_output()
            if finish:
                shards = packer.finish()
            elif distribute:
                shards = packer.distribute(distribute)
            else:
                shards = packer.write(range(len(packer.lesions)))
            packer.check(shards)
            if release_lesions and isinstance(dataset.lesions, LesionTable):
                dataset.lesions.clear()
                return_freed_memory()
            packer.write_index(shards, group_hashes)
            packer.part.complete(packer.folder)
    except OSError as error:
        name = error.filename or part
        raise DataError(f"{name}: {error.strerror or error}; fix that and rerun the same command to resume") from None
    return_freed_memory()  # of writing the index
    return open_index(packer.url or packer.folder, RemoteConfig())


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
    progress: Progress = no_progress,
) -> list[Problem]:
    """Write every `of`-th shard from the `number`-th on (1 to `of`) into OUTPUT.part, for `pack_shards` to finish.

    For processes on several machines with a file system in common, or with an output behind a URL; options as in
    `pack_shards`. Returns the problems of these shards. Raises InvalidLesions, after all of them were written; Busy
    where another process packs the slice, or the whole set; DataError for an output that exists, no valid lesion, or a
    full disk.
    """
    packer = _Packer(dataset, output, short_side, shard_samples, invalid, workers, progress)
    exists = f"{packer.folder}: exists; choose another output folder or delete this one"
    if packer.output_exists():
        raise DataError(exists)
    numbers = range(number - 1, len(packer.lesions), of)
    packer.total = sum(map(packer.lesions.size, numbers))
    part = packer.part.path
    with lock_slice(part, number, of, _refusal(part)):
        if packer.output_exists():  # completed by another process in the meantime
            packer.remove_empty_part()
            raise DataError(exists)
        shards = packer.write(numbers)
    if (problems := _problems_of(shards)) and invalid == "refuse":
        raise InvalidLesions(problems, _valid_lesions(shards))
    return problems


def _refusal(part: Path) -> str:
    return f"{part}: another process is packing this folder; wait for it or end it"


def _problems_of(shards: Sequence[FinishedShard]) -> list[Problem]:
    return [problem for shard in shards for problem in shard.problems]


def _valid_lesions(shards: Sequence[FinishedShard]) -> int:
    """Return the number of lesions that shards hold."""
    return sum(shard.file.samples for shard in shards if shard.file)


class _Packer:
    """Packs one data set with given settings into an output: a folder, or behind a URL.

    folder: the output; for a URL the local name of it.  lesions: of each shard.  done, total: lesions, for `progress`.

    Raises InvalidLesions for problems of the tables where they refuse the set, DataError where no lesion is left.
    """

    def __init__(
        self,
        dataset: Dataset,
        output: str | os.PathLike[str],
        short_side: int | None,
        shard_samples: int,
        invalid: str,
        workers: int | None,
        progress: Progress,
    ) -> None:
        self.dataset, self.task, self.invalid, self.progress = dataset, dataset.task, invalid, progress
        self.folder, self.url = follow_link(local_name(output)), os.fspath(output) if is_url(output) else None
        if not self.url:
            check_no_mount(self.folder)
        self.part = PartFolder(self.folder.with_name(self.folder.name + ".part"), self.url)
        self._check_tables()
        return_freed_memory()  # of reading the tables
        self.lesions = ShardLesions(LesionTable.of(dataset.lesions), shard_samples)
        return_freed_memory()  # of sorting
        self.done, self.total = 0, len(dataset.lesions)
        self.settings = {"short_side": short_side, "quality": QUALITY, "shard_samples": shard_samples}
        self.workers = workers or available_cores()
        self.writer = ShardWriter(dataset.task, dataset.concepts, self.settings, self.workers)

    def _check_tables(self) -> None:
        lesions, problems = self.dataset.lesions, self.dataset.problems
        if problems and self.invalid == "refuse":
            raise InvalidLesions(problems, len(lesions))
        if not lesions:
            first = f"the first: {problems[0]}" if problems else "the data set is empty"
            raise DataError(f"{self.folder}: no valid lesion to pack; {len(problems)} problems, {first}")

    # --- an output that exists ---

    def output_exists(self) -> bool:
        if self.url:
            return RemoteFolder(self.url).size(INDEX) is not None
        return self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))

    def read_output(self) -> ShardIndex:
        """Return the index of an output that exists. Raises DataError where its input or settings differ."""
        folder, advice = self.folder, "choose another output folder or delete this one"
        if self.url:
            index = open_index(self.url, RemoteConfig())
            folder = index.folder
        elif not (folder / INDEX).is_file():
            raise DataError(f"{folder}: exists and is not a packed set; {advice}")
        found = read_index_json(folder / INDEX)
        packed_for = recorded_task(found, str(folder / INDEX))
        check_packed_for(packed_for, self.task, str(folder), advice)
        if found.get("packed_with") != self.settings or found.get("source") != self._fingerprint():
            raise DataError(
                f"{folder}: was packed from other data, with other settings or by another version; {advice}"
            )
        if self.url:
            return index
        if packed_for != self.task:  # in titles, for example
            write_checked_json(folder / INDEX, {**found, "task": self.task.to_mapping()})
        self.remove_empty_part()
        return read_index(folder)

    def remove_empty_part(self) -> None:
        """Remove the folder OUTPUT.part without shards: of a run that was killed after the rename, or waited for it."""
        if (self.part.path / PART_LOCK).exists() and not (self.part.path / "shards").exists():
            shutil.rmtree(self.part.path)

    def _fingerprint(self) -> str:
        """Return the SHA-256 of the settings, the tables and the bytes of every photo."""
        return _joined([source for _, source in map_in_order(self.writer.source, self.lesions, self.workers)])

    # --- the shards ---

    def write(self, numbers: Sequence[int]) -> list[FinishedShard]:
        """Write these shards and their records; keep valid ones of an interrupted run.

        Other files are removed, unless they are of other numbers.
        """
        part = self.part
        part.create()
        finished = {number: shard for number, shard in self._read_finished(numbers) if shard}
        kept: dict[int, FinishedShard] = {}
        for number, valid in map_in_order(
            lambda number: self.writer.is_valid(part, number, self.lesions[number], finished[number]),
            finished,
            self.workers,
        ):
            if valid:
                kept[number] = finished[number]
                self._advance(self.lesions.size(number))
        others = set(range(len(self.lesions))) - set(numbers)
        for path in part.files_except({*kept, *others}):
            if not others or path.suffix in (".tar", ".parquet"):  # a temporary file may be another slice's
                path.unlink()
        missing = ((number, self.lesions[number]) for number in numbers if number not in kept)
        written = self.writer.write(part, missing, self._advance)
        return [shard for _, shard in sorted({**kept, **written}.items())]

    def distribute(self, distribute: Distribute) -> list[FinishedShard]:
        """Have all shards written by `distribute`; otherwise as `write`."""
        part, numbers = self.part, range(len(self.lesions))
        part.create()
        for path in part.files_except(numbers):
            path.unlink()
        work = functools.partial(self.writer.keep_or_write, PartFolder(part.path.absolute(), part.url))
        for number in distribute(work, ((number, self.lesions[number]) for number in numbers)):
            self._advance(self.lesions.size(number))
        shards = []
        for number, shard in self._read_finished(numbers):
            if shard is None:
                raise DataError(
                    f"{part.rows(number)}: missing, though its task has ended; give an output folder that every "
                    "machine of the cluster sees under this name"
                )
            shards.append(shard)
        return shards

    def finish(self) -> list[FinishedShard]:
        """Return the shards that slices have written, after comparing their checksums. Raises DataError otherwise."""
        shards, numbers = [], range(len(self.lesions))
        for number, shard in map_in_order(self._read_checked, numbers, self.workers):
            shards.append(shard)
            self._advance(self.lesions.size(number))
        for path in self.part.files_except(numbers):
            path.unlink()
        return shards

    def _read_finished(self, numbers: Sequence[int]) -> Iterator[tuple[int, FinishedShard | None]]:
        return map_in_order(self.part.read, numbers, self.workers)

    def _read_checked(self, number: int) -> FinishedShard:
        """Return a shard of a slice. Raises DataError unless it holds the lesions of this number."""
        part, shard = self.part, self.part.read(number)
        if shard is None or not part.is_intact(number, shard):
            raise DataError(
                f"{part.tar(number)}: missing or damaged; run its slice again, as slice={number + 1}/"
                f"{len(self.lesions)}"
            )
        ids = pq.read_table(part.rows(number), columns=["lesion_id"])["lesion_id"].to_pylist()
        dropped = {problem.lesion_id for problem in shard.problems}
        expected = [lesion.lesion_id for lesion in self.lesions[number] if lesion.lesion_id not in dropped]
        if ids != expected or shard.settings != self.writer.digest().hexdigest():
            raise DataError(
                f"{part.tar(number)}: holds other lesions or was packed with other settings; run slice="
                f"{number + 1}/{len(self.lesions)} with these tables and settings"
            )
        return shard

    def _advance(self, lesions: int) -> None:
        self.done += lesions
        self.progress(self.done, self.total)

    # --- the index ---

    def check(self, shards: Sequence[FinishedShard]) -> None:
        """Remove all shards and raise InvalidLesions where their problems refuse the set, DataError where no lesion is
        left.
        """
        problems, valid = _problems_of(shards), _valid_lesions(shards)
        if problems and self.invalid == "refuse":
            self.part.remove(len(self.lesions), self.workers)
            raise InvalidLesions(problems, valid)
        if not valid:
            self.part.remove(len(self.lesions), self.workers)
            raise DataError(
                f"{self.folder}: no valid lesion to pack; {len(problems)} problems, the first: {problems[0]}"
            )

    def write_index(self, shards: Sequence[FinishedShard], group_hashes: GroupHashes | None) -> None:
        """Write the index of all shards that hold a lesion."""
        files = [(number, shard.file) for number, shard in enumerate(shards) if shard.file]
        task, concepts = self.task, self.dataset.concepts

        def tables() -> Iterator[pa.Table]:
            schema = rows_schema(task, concepts)
            for shard, (number, _) in enumerate(files):
                rows = pq.read_table(self.part.rows(number))
                shard_column = pa.array([shard] * len(rows), pa.int32())
                yield rows.set_column(schema.get_field_index("shard"), "shard", shard_column).cast(schema)

        about: dict[str, Any] = {"packed_with": self.settings, "source": _joined([shard.source for shard in shards])}
        problems: Sequence[Problem] = self.dataset.relative([*self.dataset.problems, *_problems_of(shards)])
        if group_hashes:
            about["groups"] = {"salt": group_hashes.fingerprint}
            problems = group_hashes.without_ids(problems)
        if converted := sum((Counter(shard.converted) for shard in shards), Counter[str]()):
            about["converted"] = dict(sorted(converted.items()))
        write_index(self.part.path / "shards", tables(), [file for _, file in files], task, concepts, problems, about)


def _joined(sources: Sequence[str]) -> str:
    """Return the hash of a set of shards from those of their inputs."""
    return hashlib.sha256("".join(sources).encode()).hexdigest()
