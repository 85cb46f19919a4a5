"""Write submission files: thresholds are mapped onto the official 0.5, and the file is read back and compared."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from triderm_dist.files import atomic_path
from triderm_dist.metrics import OFFICIAL_THRESHOLD
from triderm_dist.schema import DIAGNOSES, DataError

_DIGITS = 9
_STEP = 1e-6
"""Smallest distance of a positive prediction from 0.5, so that no reader of decimals rounds it to 0.5."""


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
    diagnoses: Sequence[str] = DIAGNOSES,
) -> None:
    """Write `lesion_id` and a column per diagnosis, in the order of the ids of `template` if given.

    probabilities: (N, C) in [0, 1]; thresholds: (C,) or (N, C); a diagnosis is predicted where p > threshold. The file
    gives the same decisions under the official p > 0.5: it is read back and compared before it is renamed into place.
    Raises DataError for what the scorer would refuse: NaN, values outside [0, 1], a wrong shape, duplicate ids, ids
    that differ from those of the template.
    """
    path = Path(path)
    ids = [str(lesion) for lesion in lesion_ids]
    table = np.asarray(probabilities, np.float64)
    thresholds = np.asarray(thresholds, np.float64)
    _check(path, ids, table, thresholds, diagnoses)
    if template is not None:
        order = _order(path, ids, [str(lesion) for lesion in template])
        ids, table = [ids[row] for row in order], table[order]
        thresholds = thresholds[order] if thresholds.ndim == 2 else thresholds
    with atomic_path(path) as temporary:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["lesion_id", *diagnoses])
            for lesion, row in zip(ids, map_to_half(table, thresholds), strict=True):
                writer.writerow([lesion, *(f"{value:.{_DIGITS}f}" for value in row)])
        read_ids, read = read_submission(temporary, diagnoses)
        if read_ids != ids or not np.array_equal(read > OFFICIAL_THRESHOLD, table > thresholds):
            raise DataError(
                f"{path}: the file does not reproduce the decisions; this is a bug in triderm-dist, please report it"
            )


def read_submission(path: Path, diagnoses: Sequence[str] = DIAGNOSES) -> tuple[list[str], np.ndarray]:
    """Return (lesion ids, (N, C) probabilities) of a submission. Raises DataError naming the file and the row."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run triderm stack or triderm predict first") from None
    header = ["lesion_id", *diagnoses]
    if not rows or rows[0] != header:
        raise DataError(f"{path}: the header must be {','.join(header)}")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise DataError(f"{path}: line {number} has {len(row)} fields, expected {len(header)}")
    try:
        table = np.array([[float(value) for value in row[1:]] for row in rows[1:]]).reshape(-1, len(diagnoses))
    except ValueError as error:
        raise DataError(f"{path}: a value is not a number ({error})") from None
    return [row[0] for row in rows[1:]], table


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
