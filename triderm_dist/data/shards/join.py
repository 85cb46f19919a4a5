"""Join packed sets of one task, or take part of one, without decoding or copying photos.

The tars of the new set are hard links to those of the sets, or copies where the file system has no links. Its index
holds the rows that are kept, in their order; a tar may hold lesions that it does not list (`ShardIndex.selected`).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from triderm_dist.data.problems import Problem
from triderm_dist.data.shards.format import ShardFile, rows_schema
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.index_schema import MAX_SELECTED
from triderm_dist.data.shards.photos import size_and_hash
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.data.threads import available_cores, map_in_order
from triderm_dist.schema import VIEWS, DataError


def join_sets(
    sets: Sequence[ShardIndex],
    keep: Sequence[np.ndarray],
    output: Path,
    selected: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ShardIndex:
    """Write the set `output` of the kept lesions of several sets of local tars, and return its index.

    keep: (N,) bool of each set.  selected: the condition by which they are kept, for the record.  progress: called with
    (tars read, all tars).  The folder appears when it is complete.

    Raises DataError where it exists, nothing is kept, a lesion occurs twice, or tasks, concepts, file extensions or the
    salts of the groups differ.
    """
    if output.exists():
        raise DataError(f"{output}: exists; choose another output folder or delete this one")
    _check_alike(sets)
    _check_distinct(sets, keep)
    part = output.with_name(f"{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        tars = list(_tars(sets, keep))
        for tar in tars:
            _link(tar.index.path(tar.number), part / tar.file.url)
        files, tables = [tar.file for tar in tars], _tables(tars, sets[0].concepts, progress)
        write_index(part, tables, files, sets[0].task, sets[0].concepts, _problems(sets), _about(sets, selected))
        part.rename(output)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise DataError(f"{error.filename or output}: {error.strerror or error}; fix that and run it again") from None
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return read_index(output)


def _check_alike(sets: Sequence[ShardIndex]) -> None:
    first = sets[0]
    for index in sets[1:]:
        where = f"{index.folder} and {first.folder} cannot be joined"
        if not index.task.matches(first.task):
            other = first.task.named_other(index.task)
            raise DataError(f"{where}: the task of one is {other}; a training takes sets of other tasks by data.extra")
        if set(index.concepts) != set(first.concepts):
            raise DataError(f"{where}: their concepts differ")
        if index.extensions != first.extensions:
            raise DataError(f"{where}: the file extensions of their photos differ; pack one of them again")
        if index.group_salt != first.group_salt:
            raise DataError(
                f"{where}: their groups are hashed with other salts, so that patients in common would not be found; "
                f"pack one again with salt={first.folder}"
            )


def _check_distinct(sets: Sequence[ShardIndex], keep: Sequence[np.ndarray]) -> None:
    ids = [index.lesion_ids[mask] for index, mask in zip(sets, keep, strict=True)]
    if not sum(map(len, ids)):
        raise DataError("no lesion is kept; change select")
    folder_of: dict[str, Path] = {}
    for index, names in zip(sets, ids, strict=True):
        if twice := next((name for name in names.tolist() if name in folder_of), None):
            raise DataError(f"lesion {twice} is in {folder_of[twice]} and {index.folder}; leave it out of one")
        folder_of.update(dict.fromkeys(names.tolist(), index.folder))


@dataclass(frozen=True, eq=False)
class _Tar:
    """A tar of a set.  number: in its set.  rows: (n,) of the set that are kept.  file: its entry in the new set."""

    index: ShardIndex
    number: int
    rows: np.ndarray
    file: ShardFile


def _tars(sets: Sequence[ShardIndex], keep: Sequence[np.ndarray]) -> Iterator[_Tar]:
    """Yield the tars with a kept lesion. Their names begin with the number of the set, where there are several."""
    for position, (index, mask) in enumerate(zip(sets, keep, strict=True)):
        kept = np.flatnonzero(mask)
        starts = np.searchsorted(index.shard[kept], np.arange(len(index.shards) + 1))  # rows are in the order of tars
        for number, packed in enumerate(index.shards):
            rows = kept[starts[number] : starts[number + 1]]
            if len(rows):
                name = packed.url if len(sets) == 1 else f"set{position}-{packed.url}"
                yield _Tar(index, number, rows, ShardFile(name, len(rows), packed.bytes, packed.sha256))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _tables(
    tars: Sequence[_Tar], concepts: tuple[str, ...], progress: Callable[[int, int], None] | None
) -> Iterator[pa.Table]:
    """Yield the rows of each tar, whose photos are read for their sizes and hashes."""
    scores: dict[int, np.ndarray] = {}
    for index in {id(tar.index): tar.index for tar in tars}.values():  # read the columns before the threads start
        index.lesion_ids, index.groups, index.labels, index.offsets, index.sizes, index.metadata  # noqa: B018
        scores[id(index)] = index.with_concepts(concepts).concept_scores

    def table(entry: tuple[int, _Tar]) -> pa.Table:
        position, tar = entry
        index, rows = tar.index, tar.rows
        schema = rows_schema(len(concepts), len(index.task.fields))
        columns: dict[str, Any] = {
            "lesion_id": index.lesion_ids[rows].tolist(),
            "group": index.groups[rows].tolist(),
            "label": index.labels[rows],
            "shard": np.full(len(rows), position),
            "photos": _lists(_sizes_and_hashes(tar)),
            "concepts": _lists(scores[id(index)][rows]),
            "metadata": _lists(index.metadata[rows]),
        }
        for view, name in enumerate(VIEWS):
            columns |= {f"{name}_offset": index.offsets[rows, view], f"{name}_size": index.sizes[rows, view]}
        return pa.table({name: columns[name] for name in schema.names}).cast(schema)

    for done, (_, rows) in enumerate(map_in_order(table, list(enumerate(tars)), available_cores()), start=1):
        yield rows
        if progress:
            progress(done, len(tars))


def _sizes_and_hashes(tar: _Tar) -> np.ndarray:
    """Return the `size_and_hash` (n, views * 3) of the photos of the kept lesions."""
    result = np.zeros((len(tar.rows), len(VIEWS), 3), np.uint64)
    with tar.index.path(tar.number).open("rb") as file:
        for at, row in enumerate(tar.rows.tolist()):
            for view in range(len(VIEWS)):
                file.seek(int(tar.index.offsets[row, view]))
                result[at, view] = size_and_hash(file.read(int(tar.index.sizes[row, view])))
    return result.reshape(len(tar.rows), -1)


def _lists(matrix: np.ndarray) -> pa.Array | None:
    width = matrix.shape[1]
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), width) if width else None


def _problems(sets: Sequence[ShardIndex]) -> list[Problem]:
    return [problem for index in sets for problem in index.problems]


def _about(sets: Sequence[ShardIndex], selected: str | None) -> dict[str, Any]:
    """Return the further entries of index.json."""
    first = sets[0]
    about: dict[str, Any] = {
        "joined_from": [index.fingerprint for index in sets],
        "extensions": {view: list(names) for view, names in first.extensions.items()},
        "labels": {word: index.diagnoses[label] for index in sets for word, label in index.label_words.items()},
    }
    sides = {index.short_side for index in sets}
    if len(sides) == 1 and first.short_side is not None:
        about["packed_with"] = {"short_side": first.short_side}
    if first.group_salt is not None:
        about["groups"] = {"salt": first.group_salt}
    if converted := sum((Counter(index.converted) for index in sets), Counter[str]()):
        about["converted"] = dict(sorted(converted.items()))
    # Tars of a set that was selected before hold other lesions, too, whatever is kept of it now.
    if conditions := dict.fromkeys(each for each in (*(index.selected for index in sets), selected) if each):
        about["selected"] = "; ".join(conditions)[:MAX_SELECTED]
    return about
