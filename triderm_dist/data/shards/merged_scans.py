"""Join the scans of tars to one set, and describe what deviates in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from triderm_dist.data.group_hashes import GroupHashes
from triderm_dist.data.problems import Problem
from triderm_dist.data.readers.milk10k import CONCEPTS
from triderm_dist.data.shards.format import rows_schema, to_array
from triderm_dist.data.shards.scan_tar import MAX_NAMES, TarScan
from triderm_dist.runtime.messages import listed
from triderm_dist.schema import UNLABELED, Task


class MergedScans:
    """The scans of all tars as one set: a lesion that occurs twice, or has a concept that the set lacks, is left out.

    concepts: those of the task, else of the first sample that has any; where none has, those of the task's reader.
    """

    def __init__(self, task: Task, scans: Sequence[TarScan]) -> None:
        self.task, self.scans = task, scans
        sets = [names for scan in scans for names in scan.concept_sets if names]
        self._scored = bool(sets)
        chosen = task.concept_names or (sets[0] if sets else ())
        self._given, self.concepts = chosen, chosen or (CONCEPTS if task.reader == "milk10k" else ())
        self.unknown_labels = sum((Counter(scan.unknown_labels) for scan in scans), Counter[str]())
        self._unused = sum((Counter(scan.unused) for scan in scans), Counter[str]())
        extra: list[list[tuple[int, Problem]]] = [[] for _ in scans]
        self._keep = self._known_concepts(extra)
        self._drop_doubles(extra)
        self.problems = [
            problem
            for scan, own in zip(scans, extra, strict=True)
            for _, problem in sorted([*scan.problems, *own], key=lambda entry: entry[0])
        ]
        kept = [int(keep.sum()) for keep in self._keep]
        self.lesions = sum(kept)
        self.shards = [replace(scan.tar, samples=count) for scan, count in zip(scans, kept, strict=True) if count]
        self._empty = [scan.tar.url for scan, count in zip(scans, kept, strict=True) if not count]
        self.labeled = self._rotated = self._recolored = 0
        for rows in self._tables("label", "rotated", "recolored"):
            self.labeled += int((rows["label"].to_numpy() != UNLABELED).sum())
            self._rotated += int(rows["rotated"].to_numpy().sum())
            self._recolored += int(rows["recolored"].to_numpy().sum())

    def ids_and_groups(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """Return the id and the group of each lesion."""
        rows = pa.concat_tables(self._tables("lesion_id", "group"))
        return rows["lesion_id"], rows["group"]

    def tables(self, hashes: GroupHashes | None) -> Iterator[pa.Table]:
        """Yield the rows of each tar with a lesion, as `write_index` takes them."""
        schema = rows_schema(self.task, self.concepts)
        shard = 0
        for scan, rows in zip(self.scans, self._tables(), strict=True):
            if not len(rows):
                continue
            columns = {name: rows[name] for name in schema.names if name != "concepts"}
            columns["shard"] = pa.array(np.full(len(rows), shard, np.int32))
            if hashes:
                columns["group"] = pa.array(map(hashes.of, rows["group"].to_pylist()), pa.string())
            if self.concepts:
                scores = scan.scores(rows, self.concepts).ravel()
                columns["concepts"] = pa.FixedSizeListArray.from_arrays(scores, len(self.concepts))
            yield pa.table({name: columns[name] for name in schema.names}).cast(schema)
            shard += 1

    def unread(self) -> Iterator[str]:
        """Yield a line about tars without a lesion, and one about members that are not read."""
        if self._empty:
            yield f"no lesion in {listed(self._empty, MAX_NAMES)}; not in the index"
        if self._unused:
            counted = [f"{name} ({count} times)" if count > 1 else name for name, count in self._unused.most_common()]
            yield f"not used, as neither a record nor a photo of a view: {listed(counted, MAX_NAMES)}"

    def notes(self) -> Iterator[str]:
        """Yield a line for each tolerated deviation."""
        yield from self.unread()
        if not self._scored and (self._given or self.task.concepts.prefix):
            yield "no sample has concept scores; every score is missing"
        if self._rotated:
            yield (
                f"the EXIF of {self._rotated} photos asks for a rotation, which training ignores; triderm pack would "
                "apply it"
            )
        if self._recolored:
            yield (
                f"{self._recolored} photos have CMYK colors or a color profile other than sRGB, which training "
                "ignores; triderm pack would convert them"
            )
        if not self.labeled:
            yield "no sample has a label; these shards can be predicted, not trained on"
        elif self.labeled < self.lesions:
            yield f"{self.lesions - self.labeled} of {self.lesions} lesions have no label; they are not trained on"

    def _tables(self, *columns: str) -> Iterator[pa.Table]:
        """Yield the rows of each tar that are kept."""
        for scan, keep in zip(self.scans, self._keep, strict=True):
            rows = scan.rows(*columns)
            yield rows if keep.all() else rows.filter(pa.array(keep))

    def _known_concepts(self, extra: list[list[tuple[int, Problem]]]) -> list[np.ndarray]:
        """Return (n,) bool of each tar, whether its lesions have concepts of the set only; add the other problems."""
        keep, of = [], "the task" if self.task.concept_names else "the first lesion"
        for scan, problems in zip(self.scans, extra, strict=True):
            keep.append(np.ones(scan.tar.samples, bool))
            unknown = {
                number: next(name for name in names if name not in self._given)
                for number, names in enumerate(scan.concept_sets)
                if not {*names} <= {*self._given}
            }
            if not unknown:
                continue
            rows = scan.rows("lesion_id", "concept_set")
            numbers = rows["concept_set"].to_numpy()
            keep[-1] = ~np.isin(numbers, [*unknown])
            for row in np.flatnonzero(~keep[-1]).tolist():
                lesion = rows["lesion_id"][row].as_py()
                what = f"lesion {lesion} has a concept {unknown[int(numbers[row])]!r} that {of} lacks"
                problems.append((row, Problem(lesion, "record", scan.tar.url, what)))
        return keep

    def _drop_doubles(self, extra: list[list[tuple[int, Problem]]]) -> None:
        """Leave out lesions that have occurred before; add the problems."""
        ids = pa.chunked_array((rows["lesion_id"].combine_chunks() for rows in self._tables("lesion_id")), pa.string())
        codes = to_array(ids.dictionary_encode().combine_chunks().indices)
        first = np.maximum.accumulate(np.concatenate([[-1], codes]))[:-1] < codes  # numbers come in order
        if first.all():
            return
        starts = np.cumsum([0, *(int(keep.sum()) for keep in self._keep)])
        where = {}
        for at in np.flatnonzero(np.isin(codes, codes[~first])).tolist():
            tar = int(np.searchsorted(starts, at, "right")) - 1
            lesion = ids[at].as_py()
            if first[at]:
                where[lesion] = self.scans[tar].tar.url
                continue
            row = int(np.flatnonzero(self._keep[tar])[at - starts[tar]])
            what = f"lesion {lesion} occurs twice, first in {where[lesion]}"
            extra[tar].append((row, Problem(lesion, "duplicate lesion", self.scans[tar].tar.url, what)))
        ends = starts[1:]
        for keep, begin, end in zip(self._keep, starts, ends, strict=False):
            keep[np.flatnonzero(keep)[~first[begin:end]]] = False
