"""Write index.json and samples.parquet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from triderm_dist.checksums import write_checked_json
from triderm_dist.data.problems import Problem, count_by_kind
from triderm_dist.data.shards.format import (
    FORMAT,
    INDEX,
    ROW_GROUP,
    SAMPLES,
    UNLABELED_KEY,
    VERSION,
    ShardFile,
    Text,
    samples_schema,
    to_array,
)
from triderm_dist.files import PATIENT_DATA, atomic_path, file_sha256
from triderm_dist.runtime.memory import return_freed_memory
from triderm_dist.schema import UNLABELED, VIEWS, Task


def write_index(
    folder: Path,
    tables: Iterable[pa.Table],
    shards: Sequence[ShardFile],
    task: Task,
    concepts: Sequence[str],
    problems: Sequence[Problem],
    about: Mapping[str, Any],
) -> None:
    """Write samples.parquet from tables of rows, then index.json, both atomically.

    tables: one after the other, with the columns of `rows_schema`. about: further entries of index.json.
    """
    found = _Statistics()
    schema = samples_schema(len(concepts), len(task.fields), bool(task.fine))
    with atomic_path(folder / SAMPLES, PATIENT_DATA) as temporary:
        with pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False) as file:
            for table in _regrouped(tables):
                file.write_table(table.drop_columns("photos"), row_group_size=ROW_GROUP)
                found.add(table)

        def names() -> tuple[Text, Text]:
            columns = pq.read_table(temporary, columns=["lesion_id", "group"])
            return Text(columns["lesion_id"]), Text(columns["group"])

        shared = shared_photos(found.take_digests(), names)
        samples = {
            "url": SAMPLES,
            "rows": found.rows,
            "bytes": temporary.stat().st_size,
            "sha256": file_sha256(temporary),
        }
    counts = {name: found.labels[label] for label, name in enumerate(task.diagnosis_names)}
    index = {
        "format": FORMAT,
        "version": VERSION,
        "task": task.to_mapping(),
        "concepts": list(concepts),
        "diagnoses": list(task.diagnosis_names),
        "metadata_fields": list(task.field_names),
        **about,
        "shards": [vars(shard) for shard in shards],
        "samples": samples,
        "counts": {**counts, UNLABELED_KEY: found.labels[UNLABELED]},
        "photo_sizes": {f"{width}x{height}": count for (width, height), count in sorted(found.sizes.items())},
        "shared_photos": shared,
        "dropped": count_by_kind(problems),
        "problems": [asdict(problem) for problem in problems],
    }
    write_checked_json(folder / INDEX, index)


class _Statistics:
    """What index.json says of all rows: how many, of each label, photos of each (width, height), and photo hashes."""

    def __init__(self) -> None:
        self.rows = 0
        self.labels: Counter[int] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self._digests: list[np.ndarray] = []

    def add(self, table: pa.Table) -> None:
        """Count the rows of a table."""
        self.rows += len(table)
        for entry in table["label"].value_counts().to_pylist():
            self.labels[entry["values"]] += entry["counts"]
        photos = to_array(table["photos"].combine_chunks().flatten()).reshape(-1, len(VIEWS), 3)
        self.sizes += count_sizes(photos)
        self._digests.append(labeled_digests(photos, to_array(table["label"])))

    def take_digests(self) -> np.ndarray:
        """Return the `labeled_digests` of all rows, and release their memory, which sorting them needs."""
        digests = np.concatenate(self._digests)
        self._digests.clear()
        return digests


def count_sizes(photos: np.ndarray) -> Counter[tuple[int, int]]:
    """Count the photos of each (width, height), given the `size_and_hash` (N, views, 3); missing ones do not count."""
    present = photos[photos[..., 2] > 0]
    sizes, counts = np.unique(present[:, 0] << np.uint64(32) | present[:, 1], return_counts=True)
    return Counter({divmod(size, 1 << 32): n for size, n in zip(sizes.tolist(), counts.tolist(), strict=True)})


def labeled_digests(photos: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the hashes (N, views) of the `size_and_hash` (N, views, 3); 0 where a lesion has no label and so no
    fold.
    """
    return np.where(labels[:, None] != UNLABELED, photos[..., 2], 0)


def shared_photos(digests: np.ndarray, names: Callable[[], tuple[Text, Text]]) -> list[tuple[str, str]]:
    """Return pairs of lesions of different groups that have the same photo.

    Of many lesions with one photo, each is paired with the first. digests: hashes (N, views) of the photos, 0 where
    there is none. names: reads the lesion ids and groups, if needed.
    """
    flat = np.sort(digests, axis=None)
    repeated = np.unique(flat[1:][(flat[1:] == flat[:-1]) & (flat[1:] > 0)])
    if not len(repeated):
        return []
    flat = digests.ravel()
    order = np.flatnonzero(np.isin(flat, repeated))
    order = order[np.argsort(flat[order], kind="stable")]
    ordered = flat[order]
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    lesion_ids, groups = names()
    first = order[np.searchsorted(ordered, ordered[repeated])] // digests.shape[1]
    rows = order[repeated] // digests.shape[1]
    other_group = groups[first] != groups[rows]
    pairs = sorted(set(zip(first[other_group].tolist(), rows[other_group].tolist(), strict=True)))
    return [(lesion_ids[one], lesion_ids[other]) for one, other in pairs]


def _regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the same rows in tables of `ROW_GROUP` rows, so that many small shards do not make small row groups."""
    waiting, rows = list[pa.Table](), 0
    for table in tables:
        waiting.append(table)
        rows += len(table)
        if rows >= ROW_GROUP:
            joined = pa.concat_tables(waiting)
            full = rows // ROW_GROUP * ROW_GROUP
            yield joined.slice(0, full)
            return_freed_memory()
            waiting, rows = [joined.slice(full)], rows - full
    if waiting:
        yield pa.concat_tables(waiting)
