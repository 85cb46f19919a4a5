"""Join packed sets of one task, or take part of one, without decoding or copying photos.

The tars of the new set are hard links to those of the sets, or copies where the file system has no links; those behind
a URL are fetched through the cache. Its index
holds the rows that are kept, in their order; a tar may hold lesions that it does not list (`ShardIndex.selected`).

Part of a set whose photos have one size is taken without reading them: its index lists the lesions that share a photo.
Otherwise of most photos the first `PROBE` bytes are read: they hold the size in pixels, and where they differ, or the
number of bytes does, two photos differ. Photos that are alike in both are read whole and compared by their hashes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg

from triderm_dist.data.progress import Progress, no_progress
from triderm_dist.data.shards.format import ShardFile, rows_schema, to_array
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.index_schema import MAX_SELECTED
from triderm_dist.data.shards.photos import PROBE, size_and_hash, start_hash
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.data.threads import available_cores, map_in_order
from triderm_dist.files import copy_file, follow_link, new_folder
from triderm_dist.runtime.redact import redact
from triderm_dist.schema import VIEWS, DataError


def join_sets(
    sets: Sequence[ShardIndex],
    keep: Sequence[np.ndarray],
    output: Path,
    selected: str | None = None,
    progress: Progress = no_progress,
) -> ShardIndex:
    """Write the set `output` of the kept lesions of several sets, and return its index.

    keep: (N,) bool of each set.  selected: the condition by which they are kept, for the record.  progress: called with
    (tars read, all tars).  The folder appears when it is complete.

    Raises Busy where another process writes the folder; DataError where it exists, nothing is kept, a lesion occurs
    twice, or tasks, concepts, file extensions or the salts of the groups differ.
    """
    if output.exists():
        raise DataError(f"{output}: exists; choose another output folder or delete this one")
    output = follow_link(output)
    _check_alike(sets)
    _check_distinct(sets, keep)
    try:
        with new_folder(output) as folder:
            if output.exists():  # joined by another process in the meantime
                raise DataError(f"{output}: exists; choose another output folder or delete this one")
            _write(sets, list(_tars(sets, keep)), folder, selected, progress)
            folder.rename(output)
    except OSError as error:
        raise DataError(
            f"{error.filename or output}: {error.strerror or error}; fix that and rerun the same command"
        ) from None
    return read_index(output)


def _write(
    sets: Sequence[ShardIndex],
    tars: Sequence[_Tar],
    folder: Path,
    selected: str | None,
    progress: Progress,
) -> None:
    """Write the tars and the index of the new set into an empty folder."""
    files, tables = [tar.file for tar in tars], _tables(tars, sets[0].concepts, _photos(tars, folder, progress))
    problems = [problem for index in sets for problem in index.problems]
    write_index(folder, tables, files, sets[0].task, sets[0].concepts, problems, _about(sets, selected))


def _check_alike(sets: Sequence[ShardIndex]) -> None:
    first = sets[0]
    for index in sets[1:]:
        where = f"{_place(index)} and {_place(first)} cannot be joined"
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
                f"pack one again with salt={_place(first)}"
            )


def _place(index: ShardIndex) -> str:
    """Return the folder or the URL of a set, for messages."""
    return redact(index.remote.store.url) if index.remote else str(index.folder)


def _check_distinct(sets: Sequence[ShardIndex], keep: Sequence[np.ndarray]) -> None:
    """Raise DataError where no lesion is kept, or one is in two sets."""
    kept = [(each, mask) for each, mask in zip(sets, keep, strict=True) if mask.any()]
    if not kept:
        raise DataError("no lesion is kept; change select")
    ids = [index.lesion_ids.column.filter(pa.array(mask)) for index, mask in kept]
    chunks = pa.chunked_array(ids).dictionary_encode().chunks  # of one dictionary: first come, first numbered
    seen = 0
    for (index, _), chunk in zip(kept, chunks, strict=True):
        codes = to_array(chunk.indices)
        if len(again := np.flatnonzero(codes < seen)):
            twice = chunk[int(again[0])].as_py()
            first = next(
                each for (each, _), names in zip(kept, ids, strict=True) if pc.index(names, twice).as_py() >= 0
            )
            raise DataError(f"lesion {twice} is in {_place(first)} and {_place(index)}; leave it out of one")
        seen = max(seen, int(codes.max()) + 1)


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


def _link(tar: _Tar, target: Path) -> None:
    """Link a tar of a set, or copy it; one behind a URL after it was fetched."""
    index, source = tar.index, tar.index.path(tar.number)
    with closing(index.remote.open(index.shards[tar.number])) if index.remote else nullcontext():
        try:
            os.link(source.resolve(), target)
        except OSError:  # another file system, or one without links
            copy_file(source, target)


def _tables(tars: Sequence[_Tar], concepts: tuple[str, ...], photos: Sequence[np.ndarray]) -> Iterator[pa.Table]:
    """Yield the rows of each tar.  photos: of each tar, see `_photos`."""
    scores = {id(tar.index): tar.index.with_concepts(concepts) for tar in tars}
    for position, (tar, found) in enumerate(zip(tars, photos, strict=True)):
        index, rows = tar.index, tar.rows
        schema = rows_schema(index.task, concepts)
        columns: dict[str, Any] = {
            "lesion_id": index.lesion_ids[rows].tolist(),
            "group": index.groups[rows].tolist(),
            "label": index.labels[rows],
            "fine": index.fine[rows],
            "shard": np.full(len(rows), position),
            "photos": _lists(found.reshape(len(rows), -1)),
            "concepts": _lists(scores[id(index)].concept_scores[rows]),
            "metadata": _lists(index.metadata[rows]),
        }
        for view, name in enumerate(VIEWS):
            columns |= {f"{name}_offset": index.offsets[rows, view], f"{name}_size": index.sizes[rows, view]}
        yield pa.table({name: columns[name] for name in schema.names}).cast(schema)


def _photos(tars: Sequence[_Tar], folder: Path, progress: Progress) -> list[np.ndarray]:
    """Link the tars into a folder, and return the width, height and a 64-bit number (n, views, 3) of the photos of the
    kept lesions of each tar, zeros where one is missing; the numbers are equal where the bytes are.
    """
    for index in {id(tar.index): tar.index for tar in tars}.values():  # read the columns before the threads start
        index.offsets, index.sizes  # noqa: B018
    first, sets, found = tars[0].index, {id(tar.index) for tar in tars}, []
    is_known = len(sets) == 1 and len(first.photo_sizes) == 1
    sharing = pa.array({lesion for pair in first.shared_photos for lesion in pair}, pa.large_string())

    def probes_of(tar: _Tar) -> np.ndarray:
        path = folder / tar.file.url
        _link(tar, path)
        if not is_known:
            return _probes(path, tar, np.ones(len(tar.rows), bool))
        ids = tar.index.lesion_ids.column.take(pa.array(tar.rows))
        return _probes(path, tar, pc.is_in(ids, sharing).to_numpy(zero_copy_only=False))

    downloads = (tar.index.remote.store.remote.downloads for tar in tars if tar.index.remote)
    workers = max(available_cores(), *downloads, 1)
    for done, (_, probes) in enumerate(map_in_order(probes_of, tars, workers), start=1):
        found.append(probes)
        progress(done, len(tars))
    numbers = np.sort(np.concatenate([probes[..., 2].ravel() for probes in found]))
    repeated = np.unique(numbers[1:][numbers[1:] == numbers[:-1]])
    for tar, probes in zip(tars, found, strict=True):
        for at, view in np.argwhere(np.isin(probes[..., 2], repeated) & (probes[..., 2] > 0)).tolist():
            with (folder / tar.file.url).open("rb") as file:
                probes[at, view] = size_and_hash(_read(file, tar, at, view))
    return found


def _probes(path: Path, tar: _Tar, read: np.ndarray) -> np.ndarray:
    """Return width, height and a hash of the first bytes (n, views, 3) of the photos of the kept lesions.

    read: (n,) bool; the photos of the other lesions are known to have the size of the set, and to differ from all
    others: their numbers are counted.
    """
    sizes = tar.index.sizes[tar.rows]
    result = np.zeros((*sizes.shape, 3), np.uint64)
    others = (sizes > 0) & ~read[:, None]
    result[others, :2] = tar.index.canvas
    result[others, 2] = (tar.rows[:, None] * len(VIEWS) + np.arange(1, len(VIEWS) + 1))[others]
    if not read.any():
        return result
    with path.open("rb", buffering=0) as file:
        for at, view in np.argwhere((sizes > 0) & read[:, None]).tolist():
            data = _read(file, tar, at, view, PROBE)
            try:
                height, width = simplejpeg.decode_jpeg_header(data)[:2]
            except ValueError:  # its header is longer
                width, height, _ = size_and_hash(_read(file, tar, at, view))
            result[at, view] = width, height, start_hash(data, int(sizes[at, view]))
    return result


def _read(file: IO[bytes], tar: _Tar, at: int, view: int, most: int | None = None) -> bytes:
    """Return the first bytes of a photo of one of the kept lesions."""
    row = tar.rows[at]
    size = int(tar.index.sizes[row, view])
    file.seek(int(tar.index.offsets[row, view]))
    return file.read(size if most is None else min(most, size))


def _lists(matrix: np.ndarray) -> pa.Array | None:
    width = matrix.shape[1]
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), width) if width else None


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
