"""Write the results of a set: probabilities and decisions, and the submission of a challenge.

A submission has the decisions as values above 0.5, and the order of the probabilities. It and decisions.csv are read
back and compared. Shapes: N lesions, C diagnoses.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from triderm_dist.checksums import write_checked_parquet
from triderm_dist.files import PATIENT_DATA, atomic_path
from triderm_dist.metrics import OFFICIAL_THRESHOLD
from triderm_dist.schema import DataError, Task
from triderm_dist.tasks import load_task

if TYPE_CHECKING:
    import pyarrow as pa

_DIGITS = 9
"""After the point of a number in a CSV file."""
_ROWS = 16_384
"""Rows of a CSV file that are written at once."""
_STEP = 1e-6
"""Smallest distance of a predicted diagnosis from 0.5, so that no reader of decimals rounds it to 0.5."""

SUBMISSION_FILE = "submission.csv"
PROBABILITIES_FILE, DECISIONS_FILE = "probabilities.csv", "decisions.csv"
TABLE_FILE = "probabilities.parquet"
TABLE_FORMAT, TABLE_VERSION, TABLE_KEY = "triderm-probabilities", 1, b"triderm"
SEPARATOR = ";"
"""Between the diagnoses of a lesion in decisions.csv; no diagnosis has it in its name."""
_SPECIAL = re.compile(r'[",\r\n]|^ ')
"""In a cell that some version of csv.writer puts into quotes."""
_BUG = "the file does not reproduce the decisions; this is a bug in triderm-dist, please report it"


@dataclass(frozen=True)
class Results:
    """Results for N lesions.

    probabilities: (N, C).  decisions: (N, C) bool, the predicted diagnoses, which may depend on more than a row's
    probabilities.
    """

    lesion_ids: Sequence[str]
    probabilities: np.ndarray
    decisions: np.ndarray


def result_files(task: Task, prefix: str = "") -> tuple[str, ...]:
    """Return the names of the files that `write_results` writes: the decisions, as the task's metric takes them."""
    names = (SUBMISSION_FILE,) if task.submission else (PROBABILITIES_FILE, DECISIONS_FILE)
    return tuple(prefix + name for name in names)


def write_results(
    folder: Path, task: Task, results: Results, template: Sequence[str] | None = None, prefix: str = ""
) -> list[Path]:
    """Write the files `result_files` into FOLDER, each atomically, and return their paths.

    template: ids in the order of the rows, by default that of the results. A challenge's submission is that of
    `write_submission`; other tasks have the files of `write_probabilities`. Raises DataError as `write_submission`.
    """
    if not task.submission:
        return write_probabilities(folder, task, results, template, prefix)
    path, names = Path(folder) / f"{prefix}{SUBMISSION_FILE}", task.diagnosis_names
    _write_submission(path, *_checked(path, results, names, template), names)
    return [path]


def write_probabilities(
    folder: Path, task: Task, results: Results, template: Sequence[str] | None = None, prefix: str = ""
) -> list[Path]:
    """Write probabilities.csv and decisions.csv into FOLDER, each atomically, and return their paths.

    The former has `lesion_id` and a column per diagnosis, the latter `lesion_id` and `decision`: the predicted
    diagnosis; under task.decision=threshold several, joined by `SEPARATOR`, or none. template: see `write_results`.
    Raises DataError as `write_submission` does.
    """
    paths = [Path(folder) / f"{prefix}{name}" for name in (PROBABILITIES_FILE, DECISIONS_FILE)]
    names = task.diagnosis_names
    ids, probabilities, decisions = _checked(paths[0], results, names, template)
    with atomic_path(paths[0], PATIENT_DATA) as temporary:
        write_numbers(temporary, ids, probabilities, names)
    with atomic_path(paths[1], PATIENT_DATA) as temporary:
        _write_rows(temporary, ["lesion_id", "decision"], zip(ids, _words(decisions, names), strict=True))
        if not np.array_equal(read_decisions(temporary, names)[1], decisions):
            raise DataError(f"{paths[1]}: {_BUG}")
    return paths


def read_probabilities(folder: Path, task: Task) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return (lesion ids, (N, C) probabilities, (N, C) bool decisions) that `write_probabilities` wrote."""
    paths = [Path(folder) / name for name in (PROBABILITIES_FILE, DECISIONS_FILE)]
    ids, probabilities = read_submission(paths[0], task.diagnosis_names)
    decided, decisions = read_decisions(paths[1], task.diagnosis_names)
    if decided != ids:
        raise DataError(f"{paths[1]}: holds other lesions than {paths[0].name}; run triderm predict again")
    return ids, probabilities, decisions


def results_table(results: Results, members: Mapping[str, np.ndarray], diagnoses: Sequence[str]) -> pa.Table:
    """Return lesion_id, the probability of each diagnosis, the decision, and MEMBER/DIAGNOSIS for each member.

    members: (N, C) by name. A decision is the predicted diagnosis; where the task may predict several, joined by
    `SEPARATOR`, or none.
    """
    import pyarrow as pa

    columns: dict[str, Any] = {"lesion_id": pa.array([*results.lesion_ids], pa.string())}
    columns |= {name: results.probabilities[:, at] for at, name in enumerate(diagnoses)}
    columns["decision"] = pa.array(_words(results.decisions, diagnoses), pa.string())
    for member, probabilities in members.items():
        columns |= {f"{member}/{name}": probabilities[:, at].astype(np.float64) for at, name in enumerate(diagnoses)}
    return pa.table(columns)


def write_table(path: Path, table: pa.Table, about: Mapping[str, Any]) -> None:
    """Write what `results_table` returned as parquet. about: JSON values for its metadata."""
    header = json.dumps({"format": TABLE_FORMAT, "version": TABLE_VERSION, **about})
    write_checked_parquet(path, table, {TABLE_KEY: header.encode()})


def default_diagnoses() -> tuple[str, ...]:
    """Return the diagnoses of MILK10k, whose submission `write_submission` writes by default."""
    return load_task("milk10k").diagnosis_names


def map_to_half(probabilities: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """Map probabilities (N, C) such that a value is above 0.5 exactly where the diagnosis is decided, (N, C) bool.

    p/2 if it is not decided, in [0, 0.5], else 0.5 + 1e-6 + p (0.5 - 1e-6). Both are strictly increasing and the
    same for all rows and columns, so the decided values keep their order and their ties, within a row and within a
    column, and so do the others. No values with these decisions rank a column closer to its probabilities, as AUC and
    average precision see it.
    """
    probabilities = np.asarray(probabilities, np.float64)
    lowest = OFFICIAL_THRESHOLD + _STEP
    return np.where(decisions, lowest + probabilities * (1 - lowest), probabilities * OFFICIAL_THRESHOLD)


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
    a diagnosis is predicted where p > threshold. The file gives the same decisions under the official p > 0.5 and keeps
    the order of the probabilities (`map_to_half`): it is read back and compared before it is renamed into place.
    Raises DataError for what the scorer would refuse: NaN, values outside [0, 1], a wrong shape, duplicate ids, ids
    that differ from those of the template.
    """
    path = Path(path)
    diagnoses = diagnoses or default_diagnoses()
    table, thresholds = np.asarray(probabilities, np.float64), np.asarray(thresholds, np.float64)
    columns = (len(diagnoses),)
    if thresholds.shape not in (columns, (len(lesion_ids), *columns)):
        raise DataError(f"{path}: thresholds have shape {thresholds.shape}, expected {columns}")
    if not ((thresholds >= 0) & (thresholds <= 1)).all():
        raise DataError(f"{path}: thresholds must lie in [0, 1]")
    _check_shape(path, table, (len(lesion_ids), *columns))
    results = Results(lesion_ids, table, table > thresholds)
    _write_submission(path, *_checked(path, results, diagnoses, template), diagnoses)


def _write_submission(
    path: Path, ids: list[str], probabilities: np.ndarray, decisions: np.ndarray, diagnoses: Sequence[str]
) -> None:
    with atomic_path(path, PATIENT_DATA) as temporary:
        write_numbers(temporary, ids, map_to_half(probabilities, decisions), diagnoses)
        read_ids, read = read_submission(temporary, diagnoses)
        if read_ids != ids or not np.array_equal(read > OFFICIAL_THRESHOLD, decisions):
            raise DataError(f"{path}: {_BUG}")


def read_submission(path: Path, diagnoses: Sequence[str] | None = None) -> tuple[list[str], np.ndarray]:
    """Return (lesion ids, (N, C) probabilities) of submission.csv, or of probabilities.csv, which has the same format.

    diagnoses: the C names, by default those of MILK10k. Raises DataError naming the file and the row.
    """
    diagnoses = diagnoses or default_diagnoses()
    header = ["lesion_id", *diagnoses]
    if (table := _read_numbers(path, header)) is not None:
        return table[0].to_pylist(), np.stack([column.to_numpy() for column in table.columns[1:]], axis=1)
    ids, numbers = [], array("d")
    for lesion, cells in _read_rows(path, header):
        ids.append(lesion)
        try:
            numbers.extend(map(float, cells))
        except ValueError as error:
            raise DataError(f"{path}: a value is not a number ({error})") from None
    return ids, np.array(numbers).reshape(-1, len(diagnoses))


def read_decisions(path: Path, diagnoses: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return (lesion ids, (N, C) bool decisions) of decisions.csv. Raises DataError naming the file and the row."""
    ids, cells = [], list[str]()
    for lesion, (cell,) in _read_rows(path, ["lesion_id", "decision"]):
        ids.append(lesion)
        cells.append(cell)
    try:
        return ids, decisions_of(cells, diagnoses)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def decisions_of(cells: Sequence[str], diagnoses: Sequence[str]) -> np.ndarray:
    """Return the (N, C) bool decisions that cells of decisions.csv state. Raises DataError naming the line."""
    column_of = {name: column for column, name in enumerate(diagnoses)}
    number = {cell: at for at, cell in enumerate(dict.fromkeys(cells))}
    distinct = np.zeros((len(number), len(diagnoses)), bool)
    for cell, at in number.items():
        for name in filter(None, cell.split(SEPARATOR)):
            if name not in column_of:
                raise DataError(f"line {cells.index(cell) + 2}: {name!r} is not a diagnosis of the task")
            distinct[at, column_of[name]] = True
    return distinct[np.array([number[cell] for cell in cells], np.int64)]


def _words(decisions: np.ndarray, diagnoses: Sequence[str]) -> list[str]:
    """Return the cells of decisions.csv that state decisions (N, C)."""
    packed = np.packbits(decisions, axis=1)
    keys = packed.view(f"S{packed.shape[1]}").ravel().tolist()
    words = {
        key: SEPARATOR.join(diagnoses[column] for column in np.flatnonzero(decisions[row]).tolist())
        for key, row in dict(zip(keys, range(len(keys)), strict=True)).items()
    }
    return [words[key] for key in keys]


def write_numbers(
    path: Path,
    ids: Sequence[str],
    numbers: np.ndarray,
    diagnoses: Sequence[str],
    decisions: Sequence[str] | None = None,
) -> None:
    """Write `lesion_id`, a column per diagnosis of numbers (N, C), and `decision` where N of them are given."""
    last = [""] * len(ids) if decisions is None else [f",{_cell(each)}" for each in decisions]
    with path.open("w", newline="", encoding="utf-8") as file:
        header = ["lesion_id", *diagnoses, *(() if decisions is None else ("decision",))]
        csv.writer(file, lineterminator="\n").writerow(header)
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            columns = zip(ids[rows], _decimals(numbers[rows]), last[rows], strict=True)
            file.writelines(f"{_cell(lesion)}{cells}{end}\n" for lesion, cells, end in columns)


def _decimals(numbers: np.ndarray) -> list[str]:
    """Return each row of numbers (n, C) as text: a comma and `_DIGITS` decimals of each, as Python formats them."""
    numbers = np.asarray(numbers, np.float64)
    inside = (numbers >= 0) & (numbers <= 1) & ~np.signbit(numbers)
    scaled = np.where(inside, numbers, 0) * 10**_DIGITS
    nearest = np.rint(scaled)
    rest = nearest.astype(np.uint32)
    text = np.empty((*numbers.shape, _DIGITS + 3), np.uint8)
    text[..., 0], text[..., 2] = ord(","), ord(".")
    for place in (*range(_DIGITS + 2, 2, -1), 1):
        rest, digit = np.divmod(rest, 10)
        text[..., place] = digit + ord("0")
    width = text[0].size
    joined = text.tobytes().decode("ascii")
    rows = [joined[start : start + width] for start in range(0, len(joined), width)]
    # The product is rounded: near half a step, the next decimal of the number itself decides.
    certain = inside & (np.abs(scaled - nearest) < 0.5 - 1e-6)
    for row in np.flatnonzero(~certain.all(axis=1)).tolist():
        rows[row] = "".join(f",{number:.{_DIGITS}f}" for number in numbers[row].tolist())
    return rows


def _cell(text: str) -> str:
    """Return text as csv.writer writes it into a row of several cells."""
    if not _SPECIAL.search(text):
        return text
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([text, ""])
    return line.getvalue().removesuffix(",\n")


def _write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _read_numbers(path: Path, header: list[str]) -> pa.Table | None:
    """Read a CSV file with this header, whose columns after the first are numbers, six times as fast as `_read_rows`.

    None for a file that pyarrow refuses or that has another header: `_read_rows` says what is wrong.
    """
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    types = {name: pa.float64() if column else pa.string() for column, name in enumerate(header)}
    try:
        table = pa_csv.read_csv(
            path,
            pa_csv.ReadOptions(use_threads=False),
            pa_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
            pa_csv.ConvertOptions(column_types=types, null_values=[]),
        )
    except (pa.ArrowException, OSError):
        return None
    return table if table.column_names == header else None


def _read_rows(path: Path, header: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the lesion id and the other cells of each row of a CSV file with this header."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            if next(rows, None) != header:
                raise DataError(f"{path}: the header must be {','.join(header)}")
            for number, row in enumerate(rows, start=2):
                if len(row) != len(header):
                    raise DataError(f"{path}: line {number} has {len(row)} fields, expected {len(header)}")
                yield row[0], row[1:]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run triderm stack or triderm predict first") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({error}); run triderm predict again") from None


def _checked(
    path: Path, results: Results, diagnoses: Sequence[str], template: Sequence[str] | None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return (lesion ids, (N, C) probabilities, (N, C) decisions) in the order of the template, after checking them."""
    ids, table = [str(lesion) for lesion in results.lesion_ids], np.asarray(results.probabilities, np.float64)
    if not ids:
        raise DataError(f"{path}: there are no lesions to write")
    _check_shape(path, table, (len(ids), len(diagnoses)))
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
    order = list(range(len(ids))) if template is None else _order(path, ids, [str(lesion) for lesion in template])
    return [ids[row] for row in order], table[order], np.asarray(results.decisions, bool)[order]


def _check_shape(path: Path, table: np.ndarray, shape: tuple[int, int]) -> None:
    if table.shape != shape:
        raise DataError(f"{path}: probabilities have shape {table.shape}, expected {shape}")


def _order(path: Path, ids: list[str], template: list[str]) -> list[int]:
    """Return the row of each id of the template. Raises DataError if the two sets of ids differ."""
    row_of = {lesion: row for row, lesion in enumerate(ids)}
    if missing := [lesion for lesion in template if lesion not in row_of]:
        raise DataError(f"{path}: {len(missing)} lesions of the template are not predicted, the first is {missing[0]}")
    if extra := sorted(set(ids) - set(template)):
        raise DataError(f"{path}: {len(extra)} lesions are not in the template, the first is {extra[0]}")
    if len(set(template)) != len(template):
        raise DataError(f"{path}: a lesion occurs twice in the template")
    return [row_of[lesion] for lesion in template]
