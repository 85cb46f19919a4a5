"""Verify a packed set: checksums, counts, every sample as plain `webdataset` reads it, every photo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from triderm_dist.data.group_hashes import GroupHashes, groups_file, read_salt
from triderm_dist.data.problems import Problem
from triderm_dist.data.progress import Progress, no_progress
from triderm_dist.data.shards.format import INDEX, SAMPLES, UNLABELED_KEY
from triderm_dist.data.shards.index import ShardIndex, read_photo_bytes
from triderm_dist.data.shards.index_schema import read_index_json
from triderm_dist.data.shards.photos import PhotoError, check_photo, size_and_hash
from triderm_dist.data.shards.record import Record, belongs_to_lesion, parse_record, split_name
from triderm_dist.data.shards.tar_members import DamagedTar, check_tar_end
from triderm_dist.data.shards.write_index import count_sizes, labeled_digests, shared_photos
from triderm_dist.data.threads import available_cores, map_in_order
from triderm_dist.files import file_sha256
from triderm_dist.runtime.messages import one_line, printable
from triderm_dist.schema import VIEWS, DataError

AHEAD = 2
"""Threads that fetch and hash tars before they are checked."""


def verify(
    index: ShardIndex,
    folds: int,
    fold_seed: int,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> list[Problem]:
    """Return all problems of a packed set, an empty list if it is valid.

    Tars behind a URL are fetched for the time of their check, not taken from the cache. folds, fold_seed: also check
    that folds can be assigned. progress: called with (lesions checked, all lesions). Raises DataError for a tar that
    cannot be fetched.
    """
    checksums, samples = list[Problem](), list[Problem]()
    photos = np.zeros((len(index), len(VIEWS), 3), np.uint64)
    with TemporaryDirectory(prefix="triderm-verify-") as scratch:
        for tar in _tars(index, Path(scratch)):
            if tar.sha256 != (expected := index.shards[tar.number].sha256):
                what = f"checksum {tar.sha256[:16]}... is not the {expected[:16]}... of {INDEX}: damaged; copy it again"
                checksums.append(Problem("", "checksum", tar.name, what))
            samples += _samples(index, tar, photos, workers or available_cores(), progress)
            if index.remote:
                tar.path.unlink()
    return [
        *checksums,
        *_counts(index),
        *(samples or _photos(index, photos)),
        *_duplicates(index),
        *_folds(index, folds, fold_seed),
    ]


@dataclass(frozen=True)
class _Tar:
    """A tar on a local disk. name: path or URL, for messages.  rows: of the index that it holds."""

    number: int
    path: Path
    name: str
    sha256: str
    rows: range


def _tars(index: ShardIndex, scratch: Path) -> Iterator[_Tar]:
    """Yield the tars of a set, hashed; of one behind a URL each is a file in `scratch`, a few ahead."""
    ends = np.cumsum([shard.samples for shard in index.shards]).tolist()

    def read(number: int) -> _Tar:
        shard, path, name = index.shards[number], index.path(number), str(index.path(number))
        if index.remote:
            path, name = scratch / shard.url, index.remote.store.shown(shard.url)
            index.remote.store.fetch(replace(shard, bytes=-1), path)  # of any size and checksum
        return _Tar(number, path, name, file_sha256(path), range(ends[number] - shard.samples, ends[number]))

    for _, tar in map_in_order(read, range(len(index.shards)), AHEAD):
        yield tar


def _counts(index: ShardIndex) -> Iterator[Problem]:
    path = index.folder / INDEX
    counts = {**index.counts(), UNLABELED_KEY: index.unlabeled}
    for name, count in read_index_json(path).get("counts", {}).items():
        if count != counts.get(name):
            what = f"{count} lesions of {name}, {SAMPLES} has {counts.get(name)}"
            yield Problem("", "count", str(path), what)


def _samples(index: ShardIndex, tar: _Tar, photos: np.ndarray, workers: int, progress: Progress) -> list[Problem]:
    """Compare every sample of a tar that webdataset reads with its row of the index, and set the rows of `photos`
    (N, V, 3).
    """
    same_group = _same_group(index)

    def check(pair: tuple[int, dict[str, Any]]) -> Problem | None:
        row, sample = pair
        try:
            photos[row] = _check_sample(index, tar.path, row, sample, same_group)
        except (PhotoError, ValueError) as error:
            name = index.lesion_ids[row]
            return Problem(name, "sample", f"{tar.name}, lesion {name}", str(error))
        return None

    # Read the columns before the threads start.
    index.lesion_ids, index.groups, index.labels, index.fine, index.concept_scores, index.metadata  # noqa: B018
    problems: list[Problem] = []
    for (row, _), problem in map_in_order(check, _pairs(index, tar, problems.append), workers):
        if problem:
            problems.append(problem)
        progress(row + 1, len(index))
    return problems


def _photos(index: ShardIndex, photos: np.ndarray) -> Iterator[Problem]:
    shared = shared_photos(labeled_digests(photos, index.labels), lambda: (index.lesion_ids, index.groups))
    expected = {"photo_sizes": count_sizes(photos), "shared_photos": tuple(shared)}
    for name, value in expected.items():
        if getattr(index, name) != value:
            yield Problem("", "count", str(index.folder / INDEX), f"{name} does not match the photos in the tars")


def _pairs(
    index: ShardIndex, tar: _Tar, on_problem: Callable[[Problem], object]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, sample) of every row of a tar, in order; `on_problem` gets every other sample that webdataset reads,
    and the tar if it cannot be read to its end, unless the index was made of such a tar and lists it. Lesions that a
    selection left out are skipped.
    """
    dropped = {problem.lesion_id for problem in index.problems}
    known = tar.path.name in {Path(problem.where).name for problem in index.problems if problem.kind == "tar"}
    row, end = tar.rows.start, tar.rows.stop
    if not known:
        try:
            check_tar_end(tar.path)
        except (DamagedTar, OSError) as error:
            on_problem(Problem("", "tar", tar.name, f"{one_line(error)}; copy or make it again"))
            return
    try:
        for sample in _webdataset(str(tar.path)):
            if not belongs_to_lesion(sample, index.extensions):
                continue
            name = _lesion_id(index, sample)
            if row < end and name == index.lesion_ids[row]:
                yield row, sample
                row += 1
                if row == end and known:
                    break
            elif name not in dropped and index.selected is None:
                wanted = f"lesion {index.lesion_ids[row]}" if row < end else "the end"
                on_problem(Problem(name, "order", tar.name, f"webdataset reads lesion {name} instead of {wanted}"))
                break
    except Exception as error:  # a damaged tar may raise anything
        on_problem(Problem("", "tar", tar.name, f"webdataset cannot read it ({one_line(error)})"))
    if row < end:
        first = index.lesion_ids[row]
        what = f"webdataset does not read {end - row} of the lesions that the index lists, the first {first}"
        on_problem(Problem(first, "missing", tar.name, what))


def _webdataset(path: str) -> Iterator[dict[str, Any]]:
    import webdataset

    # All samples in this process, also where RANK is set.
    yield from webdataset.WebDataset(
        [path],
        shardshuffle=False,
        nodesplitter=None,
        workersplitter=None,
        select_files=lambda name: split_name(name) != ("", ""),
    )


def _record(index: ShardIndex, sample: dict[str, Any]) -> Record:
    return parse_record(sample["__key__"], sample.get("json"), sample.get("cls"), index.task, index.label_words)


def _lesion_id(index: ShardIndex, sample: dict[str, Any]) -> str:
    try:
        return _record(index, sample).lesion_id
    except ValueError:
        return printable(str(sample["__key__"]).rpartition("/")[2])


def _same_group(index: ShardIndex) -> Callable[[str, str], bool]:
    """Return whether the group in a sample's JSON is that in samples.parquet, as a function of both.

    Tars of other programs hold the groups whose hashes are in their index; they are not compared where the file with
    the salt is elsewhere. Raises DataError for a file with another salt.
    """
    file = groups_file(index.folder)
    if index.group_salt is None:
        return str.__eq__
    if not file.is_file():
        foreign = "packed_with" not in read_index_json(index.folder / INDEX)
        return lambda group, own: foreign or group == own
    hashes = GroupHashes(read_salt(file))
    if hashes.fingerprint != index.group_salt:
        raise DataError(f"{file}: its salt is not that of {index.folder / INDEX}; restore the right file")
    return lambda group, own: own in (group, hashes.of(group))


def _check_sample(
    index: ShardIndex, tar: Path, row: int, sample: dict[str, Any], same_group: Callable[[str, str], bool]
) -> list[tuple[int, int, int]]:
    """Return the `size_and_hash` of both views.

    Raises PhotoError or ValueError naming what differs from the index, or the photo that does not decode.
    """
    photos = []
    for view in VIEWS:
        names = index.extensions[view] if view in index.task.view_names else ()
        data = next((sample[name] for name in names if name in sample), b"")
        if data != read_photo_bytes(index, row, view, tar):
            raise ValueError(f"the {view} photo is not at the offset of {SAMPLES}")
        if data:
            try:
                check_photo(data)
            except PhotoError as error:
                raise PhotoError(f"the {view} photo does not decode ({error})") from None
        photos.append(size_and_hash(data))
    record = _record(index, sample)
    scores = [record.concepts.get(name, np.nan) for name in index.concepts]
    same = {
        "label": record.label == index.labels[row],
        "fine": record.fine == index.fine[row],
        "group": same_group(record.group, index.groups[row]),
        "concepts": np.array_equal(np.asarray(scores, np.float32), index.concept_scores[row], equal_nan=True),
        "metadata": np.array_equal(np.asarray(record.metadata, np.float32), index.metadata[row], equal_nan=True),
    }
    if wrong := [name for name, equal in same.items() if not equal]:
        raise ValueError(f"the {wrong[0]} of the sample's JSON differs from {SAMPLES}")
    return photos


def _duplicates(index: ShardIndex) -> Iterator[Problem]:
    distinct = int(index.lesion_ids.codes.max(initial=-1)) + 1
    if distinct != len(index):
        yield Problem(
            "", "duplicate lesion", str(index.folder / SAMPLES), f"{len(index) - distinct} lesions occur twice"
        )


def _folds(index: ShardIndex, folds: int, fold_seed: int) -> Iterator[Problem]:
    if not (index.labels >= 0).any():
        return
    try:
        index.folds(folds, fold_seed)
    except DataError as error:
        yield Problem("", "folds", str(index.folder), f"{error}; or verify with another folds=")
