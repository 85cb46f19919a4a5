"""Write the results of a set: the submission of a challenge, or probabilities.csv and decisions.csv.

A submission maps thresholds onto the official 0.5. Every file is read back and compared. Shapes: N lesions, C
diagnoses.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triderm_dist.files import atomic_path
from triderm_dist.metrics import OFFICIAL_THRESHOLD
from triderm_dist.schema import DataError, Task
from triderm_dist.tasks import load_task

_DIGITS = 9
_STEP = 1e-6
"""Smallest distance of a positive prediction from 0.5, so that no reader of decimals rounds it to 0.5."""

SUBMISSION_FILE = "submission.csv"
PROBABILITIES_FILE, DECISIONS_FILE = "probabilities.csv", "decisions.csv"
SEPARATOR = ";"
"""Between the diagnoses of a lesion in decisions.csv; no diagnosis has it in its name."""
_BUG = "the file does not reproduce the decisions; this is a bug in triderm-dist, please report it"


@dataclass(frozen=True)
class Results:
    """Results for N lesions.

    probabilities: (N, C).  decidable: (N, C) the same with the rule of the decision encoded, so that the decision is
    `decidable > thresholds`, with thresholds (C,) or (N, C).
    """

    lesion_ids: Sequence[str]
    probabilities: np.ndarray
    decidable: np.ndarray
    thresholds: np.ndarray

    @property
    def decisions(self) -> np.ndarray:
        """(N, C) bool."""
        return self.decidable > self.thresholds


def result_files(task: Task, prefix: str = "") -> tuple[str, ...]:
    """Return the names of the files that `write_results` writes."""
    names = (SUBMISSION_FILE,) if task.submission else (PROBABILITIES_FILE, DECISIONS_FILE)
    return tuple(prefix + name for name in names)


def write_results(
    folder: Path, task: Task, results: Results, template: Sequence[str] | None = None, prefix: str = ""
) -> list[Path]:
    """Write the files `result_files` into FOLDER, each atomically, and return their paths.

    template: ids in the order of the rows, by default that of the results. A challenge's submission is that of
    `write_submission`. Otherwise probabilities.csv has `lesion_id` and a column per diagnosis, and decisions.csv
    `lesion_id` and `decision`: the predicted diagnosis; under task.decision=threshold several, joined by `SEPARATOR`,
    or none, and then the probabilities are mapped such that a diagnosis is predicted where they exceed 0.5. Raises
    DataError as `write_submission` does.
    """
    paths = [Path(folder) / name for name in result_files(task, prefix)]
    names = task.diagnosis_names
    if task.submission:
        write_submission(paths[0], results.lesion_ids, results.decidable, results.thresholds, template, names)
        return paths
    probabilities = results.probabilities
    if task.decision == "threshold":
        probabilities = map_to_half(results.decidable, results.thresholds)
    ids = [str(lesion) for lesion in results.lesion_ids]
    _check(paths[0], ids, probabilities, np.zeros(len(names)), names)
    order = list(range(len(ids))) if template is None else _order(paths[0], ids, [str(each) for each in template])
    ids, probabilities, decisions = [ids[row] for row in order], probabilities[order], results.decisions[order]
    with atomic_path(paths[0]) as temporary:
        _write_numbers(temporary, ids, probabilities, names)
    with atomic_path(paths[1]) as temporary:
        words = [SEPARATOR.join(names[column] for column in np.flatnonzero(row)) for row in decisions]
        _write_rows(temporary, ["lesion_id", "decision"], zip(ids, words, strict=True))
        if not np.array_equal(read_decisions(temporary, names)[1], decisions):
            raise DataError(f"{paths[1]}: {_BUG}")
    return paths


def read_results(folder: Path, task: Task) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return (lesion ids, (N, C) probabilities, (N, C) bool decisions) of the files that `write_results` wrote."""
    paths = [Path(folder) / name for name in result_files(task)]
    ids, probabilities = read_submission(paths[0], task.diagnosis_names)
    if task.submission:
        return ids, probabilities, probabilities > OFFICIAL_THRESHOLD
    decided, decisions = read_decisions(paths[1], task.diagnosis_names)
    if decided != ids:
        raise DataError(f"{paths[1]}: holds other lesions than {paths[0].name}; run triderm predict again")
    return ids, probabilities, decisions


def default_diagnoses() -> tuple[str, ...]:
    """Return the diagnoses of MILK10k, whose submission `write_submission` writes by default."""
    return load_task("milk10k").diagnosis_names


def map_to_half(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Map probabilities (N, C) monotonically onto [0, 1] such that the threshold t becomes 0.5.

    0.5 p/t up to t, 0.5 + 0.5 (p - t)/(1 - t) above. thresholds: (C,) or (N, C) in [0, 1]. A probability strictly above
    its threshold becomes at least 0.5 + 1e-6.
    """
    probabilities = np.asarray(probabilities, np.float64)
    thresholds = np.broadcast_to(np.asarray(thresholds, np.float64), probabilities.shape)
    above_threshold = probabilities > thresholds
    lower = 0.5 * np.divide(
        probabilities, thresholds, out=np.zeros_like(probabilities), where=~above_threshold & (thresholds > 0)
    )
    upper = 0.5 + 0.5 * np.divide(
        probabilities - thresholds, 1 - thresholds, out=np.zeros_like(probabilities), where=above_threshold
    )
    return np.where(
        above_threshold, np.maximum(upper, OFFICIAL_THRESHOLD + _STEP), np.minimum(lower, OFFICIAL_THRESHOLD)
    )


def write_submission(
    path: str | os.PathLike[str],
    lesion_ids: Sequence[str],
    probabilities: np.ndarray,
    thresholds: np.ndarray,
    template: Sequence[str] | None = None,
    diagnoses: Sequence[str] | None = None,
) -> None:
    """Write `lesion_id` and a column per diagnosis, in the order of the ids of `template` if given.

    diagnoses: the C names, by default those of MILK10k.  probabilities: (N, C) in [0, 1].  thresholds: (C,) or (N, C);
    a diagnosis is predicted where p > threshold. The file gives the same decisions under the official p > 0.5: it is
    read back and compared before it is renamed into place. Raises DataError for what the scorer would refuse: NaN,
    values outside [0, 1], a wrong shape, duplicate ids, ids that differ from those of the template.
    """
    path = Path(path)
    diagnoses = diagnoses or default_diagnoses()
    ids = [str(lesion) for lesion in lesion_ids]
    table = np.asarray(probabilities, np.float64)
    thresholds = np.asarray(thresholds, np.float64)
    _check(path, ids, table, thresholds, diagnoses)
    if template is not None:
        order = _order(path, ids, [str(lesion) for lesion in template])
        ids, table = [ids[row] for row in order], table[order]
        thresholds = thresholds[order] if thresholds.ndim == 2 else thresholds
    with atomic_path(path) as temporary:
        _write_numbers(temporary, ids, map_to_half(table, thresholds), diagnoses)
        read_ids, read = read_submission(temporary, diagnoses)
        if read_ids != ids or not np.array_equal(read > OFFICIAL_THRESHOLD, table > thresholds):
            raise DataError(f"{path}: {_BUG}")


def read_submission(path: Path, diagnoses: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
    """Return (lesion ids, (N, C) probabilities) of submission.csv, or of probabilities.csv, which has the same format.

    diagnoses: the C names, by default those of MILK10k. Raises DataError naming the file and the row.
    """
    diagnoses = diagnoses or default_diagnoses()
    ids, rows = _read_rows(path, ["lesion_id", *diagnoses])
    try:
        return ids, np.array([[float(value) for value in row] for row in rows]).reshape(-1, len(diagnoses))
    except ValueError as error:
        raise DataError(f"{path}: a value is not a number ({error})") from None


def read_decisions(path: Path, diagnoses: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return (lesion ids, (N, C) bool decisions) of decisions.csv. Raises DataError naming the file and the row."""
    ids, rows = _read_rows(path, ["lesion_id", "decision"])
    column_of = {name: column for column, name in enumerate(diagnoses)}
    decisions = np.zeros((len(ids), len(diagnoses)), bool)
    for number, (cell,) in enumerate(rows):
        for name in filter(None, cell.split(SEPARATOR)):
            if name not in column_of:
                raise DataError(f"{path}: line {number + 2}: {name!r} is not a diagnosis of the task")
            decisions[number, column_of[name]] = True
    return ids, decisions


def _write_numbers(path: Path, ids: Sequence[str], numbers: np.ndarray, diagnoses: Sequence[str]) -> None:
    rows = ([lesion, *(f"{value:.{_DIGITS}f}" for value in row)] for lesion, row in zip(ids, numbers, strict=True))
    _write_rows(path, ["lesion_id", *diagnoses], rows)


def _write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _read_rows(path: Path, header: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return (lesion ids, the other cells of each row) of a CSV file with this header."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run triderm stack or triderm predict first") from None
    if not rows or rows[0] != header:
        raise DataError(f"{path}: the header must be {','.join(header)}")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise DataError(f"{path}: line {number} has {len(row)} fields, expected {len(header)}")
    return [row[0] for row in rows[1:]], [row[1:] for row in rows[1:]]


def _check(path: Path, ids: list[str], table: np.ndarray, thresholds: np.ndarray, diagnoses: Sequence[str]) -> None:
    shape = (len(ids), len(diagnoses))
    if not ids:
        raise DataError(f"{path}: there are no lesions to write")
    if table.shape != shape:
        raise DataError(f"{path}: probabilities have shape {table.shape}, expected {shape}")
    if thresholds.shape not in (shape, shape[1:]):
        raise DataError(f"{path}: thresholds have shape {thresholds.shape}, expected {shape[1:]}")
    if not ((thresholds >= 0) & (thresholds <= 1)).all():
        raise DataError(f"{path}: thresholds must lie in [0, 1]")
    seen: set[str] = set()
    for lesion in ids:
        if lesion in seen:
            raise DataError(f"{path}: lesion {lesion} occurs twice")
        seen.add(lesion)
    wrong = ~((table >= 0) & (table <= 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(
            f"{path}: lesion {ids[row]} has {table[row, column]} for {diagnoses[column]}, expected a number in [0, 1]"
        )


def _order(path: Path, ids: list[str], template: list[str]) -> list[int]:
    """Return the row of each id of the template. Raises DataError where the two sets of ids differ."""
    row_of = {lesion: row for row, lesion in enumerate(ids)}
    if missing := [lesion for lesion in template if lesion not in row_of]:
        raise DataError(f"{path}: {len(missing)} lesions of the template are not predicted, the first is {missing[0]}")
    if extra := sorted(set(ids) - set(template)):
        raise DataError(f"{path}: {len(extra)} lesions are not in the template, the first is {extra[0]}")
    if len(set(template)) != len(template):
        raise DataError(f"{path}: a lesion occurs twice in the template")
    return [row_of[lesion] for lesion in template]
