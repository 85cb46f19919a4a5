"""Read the one-hot table of labels, and the finer labels of the supplement."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from triderm_dist.data.problems import Problem
from triderm_dist.data.readers.dataset import Spellings
from triderm_dist.data.readers.lesion_table import no_labels
from triderm_dist.data.readers.parsed_columns import ParsedColumns
from triderm_dist.data.readers.table import Table, find_tables, read_table
from triderm_dist.data.shards.format import Text
from triderm_dist.runtime.messages import quoted
from triderm_dist.schema import UNLABELED, DataError, Task, TaskColumns
from triderm_dist.tasks import milk10k_task


def _read_truth(path: Path, task: Task) -> tuple[ParsedColumns, np.ndarray]:
    """Return the table of labels and the label of each row (N,); a row whose cells are all empty is unlabeled."""
    known = ("lesion_id", *task.diagnosis_names)
    table = read_table(path, task.table).named(known)
    table.require(known)
    if unknown := [name for name in table.header if name not in known]:
        raise DataError(f"{path}: unknown diagnosis {unknown[0]!r} in the header; known are {', '.join(known[1:])}")
    columns = TaskColumns(image=dict.fromkeys(task.view_names, "lesion_id"), lesion_id="lesion_id")
    truth = ParsedColumns(table, replace(task, columns=columns))
    truth.refuse_repeated_lesions("duplicate label", "remove one")
    return truth, truth.labels()


def match_labels(path: Path, task: Task, names: Text, metadata: str) -> tuple[np.ndarray, list[Problem]]:
    """Return the labels (L,) of the lesions `names`, `UNLABELED` for none, and the problems of labels.

    metadata: the name of the table that the lesions are in, for messages on labels of other lesions.
    """
    truth, of_rows = _read_truth(path, task)
    valid = np.ones(len(of_rows), bool)
    valid[list(truth.bad)] = False
    found = pc.index_in(truth.names.column, names.column).fill_null(-1).to_numpy(zero_copy_only=False)[truth.codes]
    labels, known = no_labels(len(names)), valid & (found >= 0)
    labels[found[known]] = of_rows[known]
    spellings = Spellings(names)
    for row in np.flatnonzero(valid & (found < 0)).tolist():
        lesion_id = truth.lesion_id(row)
        hint = spellings.hint(lesion_id, "add its rows, or remove its label")
        truth.add_problem(row, "label without a lesion", f"lesion {lesion_id} is not in {metadata}; {hint}")
    return labels, truth.problems


def read_labels(path: Path, task: Task | None = None) -> dict[str, int]:
    """Read the label of each lesion from a one-hot table; a row whose cells are all empty is unlabeled.

    Raises DataError for an invalid row.
    """
    truth, labels = _read_truth(path, task or milk10k_task())
    if truth.problems:
        raise DataError(str(truth.problems[0]))
    return dict(zip(truth.names, labels.tolist(), strict=True))  # no lesion has two rows


def read_finer_labels(metadata: Path, task: Task) -> tuple[dict[str, int], list[str]]:
    """Return the number of the finer label of each photo that has one, from the supplement next to the metadata, and
    notes.

    Raises DataError for a photo with different finer labels.
    """
    if task.fine is None:
        return {}, []
    found, notes = dict[str, int](), list[str]()
    first: dict[str, tuple[str, Table, int]] = {}
    columns = ("isic_id", task.fine.column)
    for path in find_tables(metadata.parent):
        if not path.stem.lower().endswith("supplement"):
            continue
        table = read_table(path, task.table).named(columns)
        table.require(columns)
        repeated = 0
        parts = (zip(ids.to_pylist(), words.to_pylist(), strict=True) for ids, words in table.parts(*columns))
        for row, (isic_id, word) in enumerate(chain.from_iterable(parts)):
            if not isic_id:
                continue
            own = word, table, row
            earlier, other, other_row = known = first.setdefault(isic_id, own)
            if earlier.lower() != word.lower():
                raise DataError(
                    f"{table.where(row)}: photo {isic_id} occurs twice: {task.fine.column} {quoted(word)}, and "
                    f"{quoted(earlier)} in {other.where(other_row)}; remove one"
                )
            repeated += known is not own
            if (number := task.fine.label_of(word)) != UNLABELED:
                found[isic_id] = number
        if repeated:
            notes.append(f"{path}: rows that repeat a photo with the same {task.fine.column}: {repeated:,}")
    return found, notes
