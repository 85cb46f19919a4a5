"""The submission file: each diagnosis' threshold mapped onto the official 0.5, read back before it is put in place."""

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
"""How far above 0.5 a claim stands at least: any reader of decimals tells it from 0.5."""


def map_to_half(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(N, C) monotone map of [0, 1] onto itself that puts threshold t at 0.5.

    0.5 p/t up to t, 0.5 + 0.5 (p - t)/(1 - t) above.
    thresholds: (C,) or (N, C) in [0, 1]. What is strictly above its threshold comes out above 0.5 by at least 1e-6.
    """
    probabilities = np.asarray(probabilities, np.float64)
    thresholds = np.broadcast_to(np.asarray(thresholds, np.float64), probabilities.shape)
    claimed = probabilities > thresholds
    below = 0.5 * np.divide(
        probabilities, thresholds, out=np.zeros_like(probabilities), where=~claimed & (thresholds > 0)
    )
    above = 0.5 + 0.5 * np.divide(
        probabilities - thresholds, 1 - thresholds, out=np.zeros_like(probabilities), where=claimed
    )
    return np.where(claimed, np.maximum(above, OFFICIAL_THRESHOLD + _STEP), np.minimum(below, OFFICIAL_THRESHOLD))


def write_submission(
    path: str | os.PathLike[str],
    lesion_ids: Sequence[str],
    probabilities: np.ndarray,
    thresholds: np.ndarray,
    template: Sequence[str] | None = None,
    diagnoses: Sequence[str] = DIAGNOSES,
) -> None:
    """Write `lesion_id` and a column for each diagnosis, in the order of `template` if its ids are given.

    probabilities: (N, C) in [0, 1]; thresholds: (C,) or (N, C), a diagnosis is claimed where p > threshold. The file
    says the same under the official p > 0.5: it is read back and compared before it is renamed into place.
    Raises DataError for whatever the scorer would refuse: NaN, values outside [0, 1], a wrong shape, doubled ids, ids
    that differ from the template's.
    """
    path = Path(path)
    ids = [str(lesion) for lesion in lesion_ids]
    table = np.asarray(probabilities, np.float64)
    cuts = np.asarray(thresholds, np.float64)
    _check(path, ids, table, cuts, diagnoses)
    if template is not None:
        order = _order(path, ids, [str(lesion) for lesion in template])
        ids, table = [ids[row] for row in order], table[order]
        cuts = cuts[order] if cuts.ndim == 2 else cuts
    with atomic_path(path) as beside:
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["lesion_id", *diagnoses])
            for lesion, row in zip(ids, map_to_half(table, cuts), strict=True):
                writer.writerow([lesion, *(f"{value:.{_DIGITS}f}" for value in row)])
        read_ids, read = read_submission(beside, diagnoses)
        if read_ids != ids or not np.array_equal(read > OFFICIAL_THRESHOLD, table > cuts):
            raise DataError(f"{path}: the file would not say what was decided; a defect of the toolkit, report it")


def read_submission(path: Path, diagnoses: Sequence[str] = DIAGNOSES) -> tuple[list[str], np.ndarray]:
    """(lesion ids, (N, C) probabilities) of a submission. Raises DataError naming the file and the row."""
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
            raise DataError(f"{path}: line {number} has {len(row)} fields, {len(header)} are needed")
    try:
        table = np.array([[float(value) for value in row[1:]] for row in rows[1:]]).reshape(-1, len(diagnoses))
    except ValueError as error:
        raise DataError(f"{path}: a value is no number ({error})") from None
    return [row[0] for row in rows[1:]], table


def _check(path: Path, ids: list[str], table: np.ndarray, cuts: np.ndarray, diagnoses: Sequence[str]) -> None:
    needed = (len(ids), len(diagnoses))
    if not ids:
        raise DataError(f"{path}: there is no lesion to write")
    if table.shape != needed:
        raise DataError(f"{path}: probabilities have shape {table.shape}, {needed} is needed")
    if cuts.shape not in (needed, needed[1:]):
        raise DataError(f"{path}: thresholds have shape {cuts.shape}, {needed[1:]} is needed")
    if not ((cuts >= 0) & (cuts <= 1)).all():
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
            f"{path}: lesion {ids[row]} has {table[row, column]} for {diagnoses[column]}, a number in [0, 1] is needed"
        )


def _order(path: Path, ids: list[str], template: list[str]) -> list[int]:
    place = {lesion: row for row, lesion in enumerate(ids)}
    if missing := [lesion for lesion in template if lesion not in place]:
        raise DataError(f"{path}: {len(missing)} lesions of the template are not predicted, the first is {missing[0]}")
    if extra := sorted(set(ids) - set(template)):
        raise DataError(f"{path}: {len(extra)} lesions are not in the template, the first is {extra[0]}")
    if len(set(template)) != len(template):
        raise DataError(f"{path}: a lesion occurs twice in the template")
    return [place[lesion] for lesion in template]
