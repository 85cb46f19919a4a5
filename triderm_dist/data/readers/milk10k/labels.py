"""Read the one-hot table of labels, and the finer labels of the supplement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.data.problems import Problem
from triderm_dist.data.readers.cells import is_missing, parse_number
from triderm_dist.data.readers.dataset import Spellings, why_no_lesion_id
from triderm_dist.data.readers.lesion_table import no_labels
from triderm_dist.data.readers.milk10k.row_checks import InvalidRow, Row, checked_lesion_id
from triderm_dist.data.readers.table import find_tables, read_table
from triderm_dist.data.shards.format import Text
from triderm_dist.runtime.messages import quoted
from triderm_dist.schema import UNLABELED, DataError, Task
from triderm_dist.tasks import milk10k_task


class LabelTable:
    """The labels of a one-hot table of N rows; a row whose cells are all empty is unlabeled.

    names: ids of the lesions.  codes: (N,) the lesion of each row.  labels: (N,).  valid: (N,) bool.
    problems: of the rows that are not valid.
    """

    def __init__(self, path: Path, task: Task) -> None:
        diagnoses = task.diagnosis_names
        self.table = read_table(path, task.table).named(("lesion_id", *diagnoses))
        self.table.require(("lesion_id", *diagnoses))
        if unknown := [name for name in self.table.header if name not in diagnoses and name != "lesion_id"]:
            raise DataError(f"{path}: unknown diagnosis {unknown[0]!r} in the header; known are {', '.join(diagnoses)}")
        self.codes, self.names = self.table.encoded("lesion_id")
        self.problems: list[Problem] = []
        self.labels, ones, zeros, empty = (np.zeros(len(self.table), np.int16) for _ in range(4))
        for label, name in enumerate(diagnoses):
            start = 0
            for (cells,) in self.table.parts(name):
                encoded = cells.dictionary_encode()
                texts, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
                values = np.array([parse_one_hot(text) for text in texts], np.float64)[codes]
                part = slice(start, start + len(codes))
                self.labels[part][values == 1] = label
                ones[part] += values == 1
                zeros[part] += values == 0
                empty[part] += np.array([is_missing(text, task.missing_words) for text in texts])[codes]
                start += len(codes)
        self.labels[empty == len(diagnoses)] = UNLABELED
        usual = (empty == len(diagnoses)) | ((ones == 1) & (zeros == len(diagnoses) - 1))
        wrong = np.array([why_no_lesion_id(name) is not None for name in self.names.to_pylist()], bool)
        wrong |= np.bincount(self.codes, minlength=len(wrong)) > 1
        usual &= ~wrong[self.codes]
        self.valid = usual.copy()
        first: dict[str, str] = {}
        for row, (where, cells) in zip(np.flatnonzero(~usual).tolist(), self.table.rows(~usual), strict=True):
            try:
                lesion_id = checked_lesion_id(Row(where, cells))
                if lesion_id in first:
                    what = f"lesion {lesion_id} occurs twice, first in {first[lesion_id]}; remove one"
                    raise InvalidRow(lesion_id, "duplicate label", where, what)
                first[lesion_id] = where
                self.labels[row] = parse_label(lesion_id, Row(where, cells), task)
                self.valid[row] = True
            except InvalidRow as error:
                self.problems.append(error.problem)

    def match(self, names: Text) -> tuple[np.ndarray, list[str]]:
        """Return the labels of these lesions (L,), `UNLABELED` for none, and the ids of other lesions with a label."""
        found = pc.index_in(self.names, names.column).fill_null(-1).to_numpy(zero_copy_only=False)[self.codes]
        labels = no_labels(len(names))
        known = self.valid & (found >= 0)
        labels[found[known]] = self.labels[known]
        others = self.names.take(pa.array(self.codes[self.valid & (found < 0)])).to_pylist()
        return labels, others

    @property
    def where(self) -> Callable[[str], str]:
        """A function that returns the file and row of a lesion."""
        names = self.names.to_pylist()
        rows = {names[code]: row for row, code in reversed([*enumerate(self.codes.tolist())])}
        return lambda lesion_id: self.table.where(rows[lesion_id])


def read_labels(path: Path, task: Task | None = None) -> dict[str, int]:
    """Read the label of each lesion from a one-hot table; a row whose cells are all empty is unlabeled.

    Raises DataError for an invalid row.
    """
    truth = LabelTable(path, task or milk10k_task())
    if truth.problems:
        raise DataError(str(truth.problems[0]))
    return dict(zip(truth.names.take(pa.array(truth.codes)).to_pylist(), truth.labels.tolist(), strict=True))


def read_finer_labels(metadata: Path, task: Task) -> dict[str, int]:
    """Return the number of the finer label of each photo that has one, from the supplement next to the metadata."""
    if task.fine is None:
        return {}
    found = {}
    for path in find_tables(metadata.parent):
        if path.stem.lower().endswith("supplement"):
            columns = ("isic_id", task.fine.column)
            table = read_table(path, task.table).named(columns)
            table.require(columns)
            for ids, words in table.parts(*columns):
                for isic_id, word in zip(ids.to_pylist(), words.to_pylist(), strict=True):
                    if (number := task.fine.label_of(word)) != UNLABELED:
                        found[isic_id] = number
    return found


def unmatched_labels(
    labels: Iterable[str], where: Callable[[str], str], lesions: Sequence[str], table: str
) -> Iterator[Problem]:
    """Yield the problem of each label whose lesion the table lacks, with the nearest spelling."""
    spellings = Spellings(lesions)
    for lesion_id in labels:
        hint = spellings.hint(lesion_id, "add its rows, or remove its label")
        yield Problem(
            lesion_id, "label without a lesion", where(lesion_id), f"lesion {lesion_id} is not in {table}; {hint}"
        )


def parse_label(lesion_id: str, row: Row, task: Task) -> int:
    cells = [row[name] for name in task.diagnosis_names]
    if all(is_missing(cell, task.missing_words) for cell in cells):
        return UNLABELED
    values = [parse_one_hot(cell) for cell in cells]
    if values.count(1.0) != 1 or values.count(0.0) != len(cells) - 1:
        what = (
            f"lesion {lesion_id} needs a single 1 and otherwise 0 over the diagnoses, "
            f"not {quoted(','.join(cells))}; leave all empty if it is unlabeled"
        )
        raise InvalidRow(lesion_id, "label", row.where, what)
    return values.index(1.0)


def parse_one_hot(cell: str) -> float | None:
    return {"true": 1.0, "false": 0.0}.get(cell.lower(), parse_number(cell))
