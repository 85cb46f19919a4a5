"""Prediction files: parquet with checksums, written and read in row groups."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from triderm_dist.checksums import (
    CheckedParquet,
    Column,
    DamagedFile,
    check_mapping,
    checked_parquet_rows,
    matrix_of,
)
from triderm_dist.predictions.rows import OUT_OF_FOLD, TEST, OofTable, Predictions, concatenate, row_slice
from triderm_dist.schema import UNLABELED, ConfigError, DataError, Task
from triderm_dist.tasks import recorded_task

FORMAT = "triderm-predictions"
VERSION = 1
_KEY = b"triderm"
SCALARS = ("lesion_id", "group", "fold", "model", "model_hash", "head", "label")
OUTPUTS = ("logits", "aux_clinical", "aux_dermoscopic", "features")
LISTS = (*OUTPUTS, "concepts", "metadata")
_KINDS: dict[str, Column] = {
    **{name: "integers" if name in ("fold", "label") else "text" for name in SCALARS},
    **dict.fromkeys(LISTS, "lists"),
}
_FIELDS = {"lesion_id": "lesion_ids", "group": "groups", "label": "labels"}
"""Names in `Predictions` of columns that have another one in the file."""
READ_ROWS = 4_096
"""Rows that are read at once."""
GROUP_ROWS, GROUP_NUMBERS = 65_536, 1 << 22
"""Rows of a row group of a file, and numbers in its widest column (16 MiB), at most."""


def write_predictions(path: Path, predictions: Predictions, split: str = OUT_OF_FOLD, **extra: Any) -> None:
    """Write a parquet file, atomically. `extra` (JSON values, such as transforms=8) goes into its header."""
    with predictions_writer(path, split, **extra) as write:
        write(predictions)


@contextmanager
def predictions_writer(path: Path, split: str = OUT_OF_FOLD, **extra: Any) -> Iterator[Callable[[Predictions], None]]:
    """Yield a function that writes the next rows of a prediction file, which is complete, or absent, afterwards.

    The file does not depend on how many rows each call has. At least one call is needed, which may have no row. split,
    extra: see `write_predictions`.
    """
    waiting: list[Predictions] = []
    written = False

    def write(predictions: Predictions) -> None:
        waiting.append(predictions)
        size = group_rows(predictions.features.shape[1])
        if sum(map(len, waiting)) >= size:
            write_groups(size, all_rows=False)

    def write_groups(size: int, all_rows: bool) -> None:
        nonlocal written
        rows = concatenate(waiting)
        end = len(rows) if all_rows else len(rows) // size * size
        for start in range(0, max(end, all_rows and not written), size):
            part = row_slice(rows, start, min(start + size, end))
            about = {**extra, **({"refit_of": part.refit_of} if part.refit_of else {})}
            file.write(_rows_table(part, file_header(part, split, about)))
            written = True
        waiting[:] = [row_slice(rows, end, len(rows))]

    with checked_parquet_rows(Path(path)) as file:
        yield write
        write_groups(group_rows(waiting[0].features.shape[1]), all_rows=True)


def read_predictions(path: Path, features: bool = True) -> Predictions:
    """Read what `write_predictions` wrote, without the wide fused features, which are then (N, 0), if not `features`.

    Raises DataError naming the file for anything else.
    """
    file = PredictionFile(path)
    return file.predictions(_read_columns(file.tables(_names(features)), file, file.rows))


def _names(features: bool) -> list[str]:
    """Return the columns to read, with or without the wide fused features."""
    return [name for name in (*SCALARS, *LISTS) if features or name != "features"]


class PredictionFile:
    """A prediction file whose rows are read in batches.

    rows: their number.  task, concept_names, split, refit_of, extra: as in `Predictions`. Raises DataError naming the
    file where it is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = Path(path)
        try:
            self._file = CheckedParquet(path)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; run triderm crossval first") from None
        except DamagedFile as error:
            raise self._damaged(error) from None
        self.rows = self._file.rows
        self.task, self.extra = _parse_header(path, self._file.metadata)
        self.concept_names = tuple(self.extra.pop("concepts"))
        self.split, self.refit_of = self.extra.pop("split"), tuple(self.extra.pop("refit_of", ()))

    def tables(self, columns: Sequence[str], rows: int | None = None) -> Iterator[Any]:
        """Yield the columns in tables of at most this number of rows.

        Raises DataError for a damaged file: for wrong checksums after the last table.
        """
        try:
            for table in self._file.batches(columns, _KINDS, rows or READ_ROWS):
                self._check(table)
                yield table
        except DamagedFile as error:
            raise self._damaged(error) from None

    def chunks(self, features: bool = True, rows: int | None = None) -> Iterator[Predictions]:
        """Yield the rows in order, this number at once. features: see `read_predictions`."""
        size, waiting = rows or READ_ROWS, list[Predictions]()
        for table in self.tables(_names(features), size):
            waiting.append(self.predictions(_read_columns([table], self, len(table))))
            while sum(map(len, waiting)) >= size:
                joined = concatenate(waiting)
                yield row_slice(joined, 0, size)
                waiting = [row_slice(joined, size, len(joined))]
        if sum(map(len, waiting)):
            yield concatenate(waiting)

    def predictions(self, columns: Mapping[str, np.ndarray]) -> Predictions:
        """Build the table of rows, given their columns by the names in the file."""
        named: dict[str, Any] = {_FIELDS.get(name, name): values for name, values in columns.items()}
        about = {"split": self.split, "refit_of": self.refit_of, "extra": self.extra}
        named.setdefault("features", np.empty((len(columns["label"]), 0), np.float32))
        try:
            return Predictions(**named, task=self.task, concept_names=self.concept_names, **about)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None

    def width(self, name: str) -> int:
        """Return how many numbers a column of lists has a row where the header says so, else 0."""
        widths = {"features": 0, "concepts": len(self.concept_names), "metadata": len(self.task.fields)}
        return widths.get(name, len(self.task.diagnoses))

    def matrix(self, table: Any, name: str) -> np.ndarray:
        """Return a column of lists as (n, W) float32. Raises DataError for rows of unequal lengths."""
        try:
            return np.asarray(matrix_of(table, name), np.float32)
        except DamagedFile as error:
            raise self._damaged(error) from None

    def _check(self, table: Any) -> None:
        """Raise DataError for a head or a label that does not exist."""
        again = "run triderm crossval or triderm predict again"
        heads = set(table["head"].unique().to_pylist()) if "head" in table.column_names else set()
        if unknown := sorted(heads - {"softmax", "sigmoid"}):
            raise DataError(f"{self.path}: {unknown[0]!r} is not a kind of head; {again}")
        if "label" in table.column_names and len(table):
            labels = table["label"].to_numpy()
            if not UNLABELED <= labels.min() <= labels.max() < len(self.task.diagnoses):
                raise DataError(f"{self.path}: a label is not a diagnosis of task {self.task.name!r}; {again}")

    def _damaged(self, error: DamagedFile) -> DataError:
        return DataError(f"{self.path}: {error}; delete it and run triderm crossval or triderm predict again")


def predicted_by(path: Path) -> set[str]:
    """Return the SHA-256 of the weights whose predictions are in a file; none if it is not readable:
    `read_predictions` says why.
    """
    try:
        return {name for table in PredictionFile(path).tables(["model_hash"]) for name in table[0].unique().to_pylist()}
    except DataError:
        return set()


def read_transforms(path: Path) -> int:
    """Return the number of transforms that the predictions in a file are the mean over.

    1 for a file from before there was a choice, and for one that is not readable: `read_predictions` says why.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(json.loads((pq.read_schema(path).metadata or {})[_KEY]).get("transforms", 1))
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError):
        return 1


def file_header(names: Predictions | OofTable, split: str, extra: Mapping[str, Any]) -> dict[bytes, bytes]:
    """Return the metadata of a file."""
    if split not in (OUT_OF_FOLD, TEST):
        raise DataError(f"split: {split!r} is not a split; known: {OUT_OF_FOLD}, {TEST}")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "diagnoses": list(names.task.diagnosis_names),
        "concepts": list(names.concept_names),
        "metadata_fields": list(names.task.field_names),
        "task": names.task.to_mapping(),
        **extra,
    }
    return {_KEY: json.dumps(content).encode()}


class _HeaderKeys(BaseModel):
    split: str
    diagnoses: list[str]
    concepts: list[str]
    metadata_fields: list[str] = []
    refit_of: list[str] = []


def _parse_header(path: Path, metadata: Mapping[bytes, bytes]) -> tuple[Task, dict[str, Any]]:
    """Return the task of a prediction file, and the other values of its header."""
    try:
        header = json.loads(metadata[_KEY])
    except (KeyError, ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise DataError(f"{path}: not a prediction file of this toolkit")
    if (header.pop("format", None), header.pop("version", None)) != (FORMAT, VERSION):
        raise DataError(f"{path}: not {FORMAT} version {VERSION}; write it again with this version of the toolkit")
    try:
        check_mapping(header, _HeaderKeys)
    except DamagedFile as error:
        raise DataError(f"{path}: {error}; run triderm crossval or triderm predict again") from None
    try:
        task = recorded_task(header, str(path))
    except ConfigError as error:
        raise DataError(f"{error}; run triderm crossval again") from None
    header.pop("task", None)
    if tuple(header.pop("diagnoses")) != task.diagnosis_names or (
        # Files of the first version do not name their fields.
        tuple(header.pop("metadata_fields", task.field_names)) != task.field_names
    ):
        raise DataError(
            f"{path}: its diagnoses or metadata fields are not those of task {task.name!r}; run triderm crossval again"
        )
    return task, header


def _rows_table(rows: Predictions, header: dict[bytes, bytes]) -> Any:
    """Return rows as an Arrow table with the header of their file."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        name: pa.array(getattr(rows, _FIELDS.get(name, name)), pa.string() if _KINDS[name] == "text" else pa.int64())
        for name in SCALARS
    }
    columns |= {name: as_lists(getattr(rows, name)) for name in LISTS}
    return pa.table(columns).replace_schema_metadata(header)


def as_lists(array: np.ndarray) -> Any:
    """Return the rows (n, W) of a row group as an Arrow array of lists."""
    import pyarrow as pa

    values = pa.array(np.ascontiguousarray(array, np.float32).ravel(), from_pandas=False)
    return pa.ListArray.from_arrays(pa.array(np.arange(len(array) + 1, dtype=np.int32) * array.shape[1]), values)


def group_rows(width: int) -> int:
    """Return the rows of a row group whose widest column has this width."""
    return max(1, min(GROUP_ROWS, GROUP_NUMBERS // max(width, 1)))


def _read_columns(tables: Iterable[Any], file: PredictionFile, rows: int) -> dict[str, np.ndarray]:
    """Return the columns of tables of this many rows in all."""
    columns: dict[str, np.ndarray] = {}
    start = 0
    for table in tables:
        here = slice(start, start + len(table))
        for name in table.column_names:
            values = file.matrix(table, name) if name in LISTS else _array(table[name])
            if name not in columns:
                columns[name] = np.empty((rows, *values.shape[1:]), values.dtype)
            kept = columns[name]
            if kept.shape[1:] != values.shape[1:]:
                found = f"{kept.shape[1]} and of {values.shape[1]} numbers"
                raise DataError(f"{file.path}: column {name!r} has rows of {found}; run triderm crossval again")
            kept[here] = values
        start += len(table)
    empty = {name: np.empty((0, file.width(name)), np.float32) for name in LISTS}
    return columns or {**empty, **{name: np.empty(0, object if _KINDS[name] == "text" else int) for name in SCALARS}}


def _array(column: Any) -> np.ndarray:
    """Return a column of integers, or of text with one object for each distinct text where these are few."""
    import pyarrow as pa

    column = column.combine_chunks()
    if not pa.types.is_string(column.type):
        return np.asarray(column.to_numpy())
    encoded = column.dictionary_encode()
    texts = encoded.dictionary.to_numpy(zero_copy_only=False)
    return np.asarray(texts[encoded.indices.to_numpy()])
