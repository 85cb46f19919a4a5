"""Prediction files, and the out-of-fold table on which everything after training is fitted.

One row holds the outputs of one model for one lesion. The model of a fold writes `predictions.parquet` (the lesions of
its fold, which it was not trained on) and `test.parquet`; `gather` merges the former of all folds and models and
raises for files that would leak training rows.

Shapes: N lesions, C diagnoses, K concepts, M metadata fields, D features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
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
from triderm_dist.schema import UNLABELED, ConfigError, DataError, Task
from triderm_dist.tasks import recorded_task

FORMAT = "triderm-predictions"
VERSION = 1
OUT_OF_FOLD = "out_of_fold"
TEST = "test"
PARTS = (25, 50)
"""Percent of the training lesions of a fold that the learning curve trains on, besides all."""
NO_FOLD = -1
"""The fold of test lesions, which belong to no fold."""

_KEY = b"triderm"
_SCALARS = ("lesion_id", "group", "fold", "model", "model_hash", "head", "label")
_OUTPUTS = ("logits", "aux_clinical", "aux_dermoscopic", "features")
_LISTS = (*_OUTPUTS, "concepts", "metadata")
_KINDS: dict[str, Column] = {
    **{name: "integers" if name in ("fold", "label") else "text" for name in _SCALARS},
    **dict.fromkeys(_LISTS, "lists"),
}

_FIELDS = {"lesion_id": "lesion_ids", "group": "groups", "label": "labels"}
"""Names in `Predictions` of columns that have another one in the file."""

READ_ROWS = 4_096
"""Rows that are read at once."""
GROUP_ROWS, GROUP_NUMBERS = 65_536, 1 << 22
"""Rows of a row group of a file, and numbers in its widest column (16 MiB), at most."""


@dataclass(frozen=True)
class Predictions:
    """Outputs of models, one row per lesion and model. A column of scalars may be given as one value for all rows.

    lesion_ids, groups, model, model_hash, head: (N,) text.  labels, fold: (N,) int64.  logits, aux_clinical,
    aux_dermoscopic: (N, C).  features: (N, D).  concepts: (N, K) and metadata: (N, M), NaN where missing.
    head: "softmax" or "sigmoid".  model_hash: SHA-256 of the weights.  task: what labels, C and M mean.
    concept_names: of the K concepts.  refit_of: SHA-256 of the weights of the folds, where a network predicted that was
    trained on all of them.  extra: further values of the file's header.
    """

    lesion_ids: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    fold: np.ndarray
    model: np.ndarray
    model_hash: np.ndarray
    head: np.ndarray
    logits: np.ndarray
    aux_clinical: np.ndarray
    aux_dermoscopic: np.ndarray
    features: np.ndarray
    concepts: np.ndarray
    metadata: np.ndarray
    task: Task
    concept_names: tuple[str, ...]
    split: str = OUT_OF_FOLD
    refit_of: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = len(self.lesion_ids)
        for name in ("lesion_ids", "groups", "model", "model_hash", "head"):
            object.__setattr__(self, name, _column(getattr(self, name), rows, object))
        for name in ("labels", "fold"):
            object.__setattr__(self, name, _column(getattr(self, name), rows, np.int64))
        widths = {
            "logits": len(self.task.diagnoses),
            "aux_clinical": len(self.task.diagnoses),
            "aux_dermoscopic": len(self.task.diagnoses),
            "features": None,
            "concepts": len(self.concept_names),
            "metadata": len(self.task.fields),
        }
        for name, width in widths.items():
            value = np.asarray(getattr(self, name), np.float32)
            if value.ndim != 2 or len(value) != rows or (width is not None and value.shape[1] != width):
                expected = "D" if width is None else width
                raise DataError(f"{name} has shape {value.shape}, expected ({rows}, {expected})")
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.lesion_ids)


@dataclass(frozen=True)
class OofTable:
    """The outputs of each model, one row per lesion; NaN where a model has no held-out prediction for the lesion.

    lesion_ids, groups: (N,) text.  labels, folds: (N,) int64.  concepts (N, K), metadata (N, M).  Of each model by
    name: heads text; logits, aux_clinical, aux_dermoscopic (N, C); features (N, D); hashes (N,) text, of
    the weights that predicted the row, "" without a prediction.  task: what labels, C and M mean. The same type holds
    the test set (`average_test`): there all folds are `NO_FOLD`.
    """

    lesion_ids: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    folds: np.ndarray
    concepts: np.ndarray
    metadata: np.ndarray
    models: tuple[str, ...]
    heads: dict[str, str]
    logits: dict[str, np.ndarray]
    aux_clinical: dict[str, np.ndarray]
    aux_dermoscopic: dict[str, np.ndarray]
    features: dict[str, np.ndarray]
    hashes: dict[str, np.ndarray]
    task: Task
    concept_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.lesion_ids)

    @property
    def diagnoses(self) -> tuple[str, ...]:
        return self.task.diagnosis_names

    def complete(self, models: Sequence[str] | None = None) -> np.ndarray:
        """Return (N,) bool: lesions that every one of the models has a prediction for."""
        names = self.models if models is None else models
        return np.logical_and.reduce([np.isfinite(self.logits[name]).all(axis=1) for name in names])

    def take(self, rows: np.ndarray) -> OofTable:
        """Return the table of some lesions, by index or mask."""

        def of_rows(by_model: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {model: values[rows] for model, values in by_model.items()}

        return replace(
            self,
            lesion_ids=self.lesion_ids[rows],
            groups=self.groups[rows],
            labels=self.labels[rows],
            folds=self.folds[rows],
            concepts=self.concepts[rows],
            metadata=self.metadata[rows],
            logits=of_rows(self.logits),
            aux_clinical=of_rows(self.aux_clinical),
            aux_dermoscopic=of_rows(self.aux_dermoscopic),
            features=of_rows(self.features),
            hashes=of_rows(self.hashes),
        )


def labeled(table: OofTable) -> np.ndarray:
    """Return (N,) bool: lesions whose diagnosis is known."""
    return table.labels != UNLABELED


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
        size = _group_rows(predictions.features.shape[1])
        if sum(map(len, waiting)) >= size:
            write_groups(size, all_rows=False)

    def write_groups(size: int, all_rows: bool) -> None:
        nonlocal written
        rows = _concatenate(waiting)
        end = len(rows) if all_rows else len(rows) // size * size
        for start in range(0, max(end, all_rows and not written), size):
            part = row_slice(rows, start, min(start + size, end))
            about = {**extra, **({"refit_of": part.refit_of} if part.refit_of else {})}
            file.write(_rows_table(part, _header(part, split, about)))
            written = True
        waiting[:] = [row_slice(rows, end, len(rows))]

    with checked_parquet_rows(Path(path)) as file:
        yield write
        write_groups(_group_rows(waiting[0].features.shape[1]), all_rows=True)


def read_predictions(path: Path, features: bool = True) -> Predictions:
    """Read what `write_predictions` wrote, without the wide fused features, which are then (N, 0), if not `features`.

    Raises DataError naming the file for anything else.
    """
    file = PredictionFile(path)
    columns = [*_SCALARS, *(name for name in _LISTS if features or name != "features")]
    return file.predictions(_read_columns(file.tables(columns), file, file.rows))


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
        columns = [*_SCALARS, *(name for name in _LISTS if features or name != "features")]
        size, waiting = rows or READ_ROWS, list[Predictions]()
        for table in self.tables(columns, size):
            waiting.append(self.predictions(_read_columns([table], self, len(table))))
            while sum(map(len, waiting)) >= size:
                joined = _concatenate(waiting)
                yield row_slice(joined, 0, size)
                waiting = [row_slice(joined, size, len(joined))]
        if sum(map(len, waiting)):
            yield _concatenate(waiting)

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


def find_predictions(run_folder: Path, models: Sequence[str] | None = None) -> list[Path]:
    """Return the files MODEL/fold-K/predictions.parquet of a run, sorted; `models` None takes all models."""
    found = sorted(Path(run_folder).glob("*/fold-*/predictions.parquet"))
    return [path for path in found if models is None or path.parent.parent.name in models]


def gather(
    source: Path | str | Iterable[Path],
    models: Sequence[str] | None,
    lesion_ids: Sequence[str],
    labels: np.ndarray,
    folds: np.ndarray,
    task: Task | None = None,
) -> OofTable:
    """Merge the prediction files of a run folder (or of a list of files, in any order) into the out-of-fold table.

    lesion_ids (N,), labels (N,) int64 and folds (N,) int64 are those of the data, and the table has their order. A
    missing file leaves NaN. `models` None takes all models that are found. task: that of the data, whose titles or
    decision may have changed since the files were written; None takes the first file's.

    Raises DataError for a wrong format or version, a test file, an unexpected lesion or model, a lesion predicted twice
    by a model, a label or a fold that differs from the data's, a group in two folds, and weights that predict two folds
    (they were trained on one of them).
    """
    return _gather(source, models, lesion_ids, labels, folds, task).table()


def write_gathered(
    path: Path,
    source: Path | str | Iterable[Path],
    models: Sequence[str] | None,
    lesion_ids: Sequence[str],
    labels: np.ndarray,
    folds: np.ndarray,
    task: Task | None = None,
) -> None:
    """Write the out-of-fold table that `gather` returns, without holding the outputs of more than a row group of it."""
    gathered = _gather(source, models, lesion_ids, labels, folds, task)
    _write_oof(path, gathered.scalars, gathered.chunks)


def _gather(
    source: Path | str | Iterable[Path],
    models: Sequence[str] | None,
    lesion_ids: Sequence[str],
    labels: np.ndarray,
    folds: np.ndarray,
    task: Task | None,
) -> _Gathered:
    if isinstance(source, str | Path):
        paths = find_predictions(Path(source), models)
        if not paths:
            raise DataError(f"{source}: no MODEL/fold-K/predictions.parquet in this folder; run triderm crossval first")
    else:
        paths = [Path(path) for path in source]
    if not paths:
        raise DataError("no prediction files to gather; run triderm crossval first")
    gathered = _Gathered([PredictionFile(path) for path in paths], models, _DataSplit(lesion_ids, labels, folds))
    if task is None:
        return gathered
    if not gathered.scalars.task.matches(task):
        name = gathered.scalars.task.name
        raise DataError(f"{paths[0]}: is for task {name!r}, the data are of {task.name!r}; train again")
    gathered.scalars = replace(gathered.scalars, task=task)
    return gathered


def part_folder(run_folder: Path, model: str, percent: int, fold: int) -> Path:
    """Return the folder of a fold that was trained on a part of its lesions for the learning curve."""
    return run_folder / "learning_curve" / model / f"{percent}-percent" / f"fold-{fold}"


def gather_part(run_folder: Path, model: str, percent: int, whole: OofTable) -> OofTable | None:
    """Merge the held-out predictions of folds that were trained on a part of their lesions.

    whole: the out-of-fold table of the run. None where not all folds are trained, or not on those lesions.
    """
    paths = [part_folder(run_folder, model, percent, fold) / "predictions.parquet" for fold in np.unique(whole.folds)]
    if not all(path.exists() for path in paths):
        return None
    table = gather(paths, [model], whole.lesion_ids.tolist(), whole.labels, whole.folds, whole.task)
    return table if table.complete().all() else None


def write_oof(path: Path, table: OofTable) -> None:
    """Write the table as parquet, atomically: one row per lesion and model, NaN without a prediction."""

    def chunks(model: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        outputs = {key: getattr(table, key)[model] for key in _OUTPUTS}
        size = _group_rows(outputs["features"].shape[1])
        for start in range(0, len(table), size):
            yield start, {key: values[start : start + size] for key, values in outputs.items()}

    _write_oof(path, table, chunks)


def _write_oof(
    path: Path, table: OofTable, chunks: Callable[[str], Iterator[tuple[int, dict[str, np.ndarray]]]]
) -> None:
    """Write the out-of-fold table. chunks: yields (first row, outputs) of a model, which are not taken of `table`."""
    import pyarrow as pa

    header = _header(table, OUT_OF_FOLD, {})
    with checked_parquet_rows(Path(path)) as file:
        for name in table.models:
            for start, outputs in chunks(name):
                part = slice(start, start + len(outputs["logits"]))
                rows = len(outputs["logits"])
                columns: dict[str, Any] = {
                    "lesion_id": pa.array(table.lesion_ids[part], pa.string()),
                    "group": pa.array(table.groups[part], pa.string()),
                    "fold": pa.array(table.folds[part], pa.int64()),
                    "model": pa.repeat(pa.scalar(name, pa.string()), rows),
                    "model_hash": pa.array(table.hashes[name][part], pa.string()),
                    "head": pa.repeat(pa.scalar(table.heads[name], pa.string()), rows),
                    "label": pa.array(table.labels[part], pa.int64()),
                }
                outputs |= {"concepts": table.concepts[part], "metadata": table.metadata[part]}
                columns |= {key: _as_lists(outputs[key]) for key in _LISTS}
                file.write(pa.table(columns).replace_schema_metadata(header))


def read_oof(
    path: Path, features: bool = False, lesion_ids: Sequence[str] | None = None, logits_only: bool = False
) -> OofTable:
    """Read what `write_oof` wrote, without the wide fused features, which are then (N, 0), unless asked for; or only
    the logits.

    A group gets the first id of its lesions as its name, so that nothing depends on the names in the file: hashes of
    patient ids under another salt give the same stacker. lesion_ids: read the outputs of these lesions only, in this
    order. Raises DataError naming the file, also for leaks (`gather`) and a lesion that it lacks.
    """
    file = PredictionFile(path)
    if file.split != OUT_OF_FOLD:
        raise DataError(f"{path}: holds {file.split} predictions, expected the out-of-fold table")
    if not file.rows:
        raise DataError(f"{path}: has no rows; run triderm crossval first")
    gathered = _Gathered([file], None, None)
    table = replace(gathered.scalars, groups=_named_by_lesion(gathered.scalars.groups, gathered.scalars.lesion_ids))
    gathered.scalars = table
    keys = _OUTPUTS[:1] if logits_only else _OUTPUTS if features else _OUTPUTS[:3]
    if lesion_ids is None:
        return gathered.table(keys)
    row_of = {lesion: row for row, lesion in enumerate(table.lesion_ids)}
    if absent := [lesion for lesion in lesion_ids if lesion not in row_of]:
        raise DataError(f"{path}: has no lesion {absent[0]}; run triderm crossval again")
    return gathered.table(keys, np.array([row_of[lesion] for lesion in lesion_ids], np.int64))


def _named_by_lesion(groups: np.ndarray, lesion_ids: np.ndarray) -> np.ndarray:
    """Return the first id, in alphabetical order, of the lesions in each lesion's group, (N,) text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    codes = pa.array(groups, pa.string()).dictionary_encode().indices.to_numpy()
    order = pc.sort_indices(pa.array(lesion_ids, pa.string())).to_numpy()
    first = order[np.unique(codes[order], return_index=True)[1]]
    named: np.ndarray = lesion_ids[first][codes]
    return named


def average_test(parts: Iterable[Predictions]) -> OofTable:
    """Average the test predictions of each model over its fold models: logits and auxiliary logits.

    Logits rather than probabilities are averaged, since the stacker was fitted on logits. Features are dropped, (N, 0).
    Raises DataError unless every part holds the same lesions, each once, and all parts are by different weights.
    """
    parts = list(parts)
    if not parts:
        raise DataError("no test predictions to average; run triderm predict on the fold models first")
    first = parts[0]
    ids = first.lesion_ids
    seen: set[tuple[str, str]] = set()
    by_model: dict[str, list[tuple[Predictions, np.ndarray]]] = {}
    for part in parts:
        key = (_single(part.model, "model"), _single(part.model_hash, "model_hash"))
        if key in seen:
            raise DataError(f"test predictions of {key[0]} with weights {key[1][:12]} were given twice")
        seen.add(key)
        if difference := _difference(part, first):
            raise DataError(f"test predictions of {key[0]} are for {difference} than the first file's")
        row_of = {lesion: row for row, lesion in enumerate(part.lesion_ids)}
        if len(row_of) != len(part) or set(row_of) != set(ids):
            raise DataError(
                f"test predictions of {key[0]} ({key[1][:12]}) hold other lesions than the first file; "
                "run triderm predict again"
            )
        by_model.setdefault(key[0], []).append((part, np.array([row_of[lesion] for lesion in ids], np.int64)))

    def mean(name: str, model: str) -> np.ndarray:
        return np.asarray(np.mean([getattr(part, name)[order] for part, order in by_model[model]], axis=0))

    models = tuple(by_model)
    return OofTable(
        lesion_ids=ids,
        groups=first.groups,
        labels=first.labels,
        folds=np.full(len(ids), NO_FOLD, np.int64),
        concepts=first.concepts,
        metadata=first.metadata,
        models=models,
        heads={model: _single(by_model[model][0][0].head, "head") for model in models},
        logits={model: mean("logits", model) for model in models},
        aux_clinical={model: mean("aux_clinical", model) for model in models},
        aux_dermoscopic={model: mean("aux_dermoscopic", model) for model in models},
        # The features of different fold models have different axes: their mean would be meaningless.
        features={model: np.full((len(ids), 0), np.nan, np.float32) for model in models},
        hashes={model: np.full(len(ids), "", object) for model in models},
        task=first.task,
        concept_names=first.concept_names,
    )


def concatenate_tables(tables: Sequence[OofTable]) -> OofTable:
    """Join tables of other lesions by the same models of one task."""
    if len(tables) == 1:
        return tables[0]
    columns: dict[str, Any] = {}
    for each in fields(OofTable):
        values = [getattr(table, each.name) for table in tables]
        if isinstance(values[0], np.ndarray):
            columns[each.name] = np.concatenate(values)
        elif each.name in (*_OUTPUTS, "hashes"):
            columns[each.name] = {name: np.concatenate([value[name] for value in values]) for name in tables[0].models}
    return replace(tables[0], **columns)


class _DataSplit:
    """The lesions of the data with their labels and folds, which prediction files are checked against."""

    def __init__(
        self, lesion_ids: Sequence[str] | np.ndarray, labels: np.ndarray, folds: np.ndarray, where: str = "the data"
    ) -> None:
        import pyarrow as pa

        self.lesion_ids = np.array(lesion_ids, object)
        self.labels = np.asarray(labels, np.int64)
        self.folds = np.asarray(folds, np.int64)
        self._known = pa.array(self.lesion_ids, pa.string())
        if len(self._known.unique()) != len(self.lesion_ids):
            raise DataError(f"{where}: a lesion id occurs twice")
        self._groups = pa.array([], pa.string())
        self._fold_of_group = np.empty(0, np.int64)
        self._fold_of_weights: dict[tuple[str, str], int] = {}

    def check(self, part: _Part) -> None:
        """Raise DataError for a part that does not match the data or the parts checked before (see `gather`)."""
        if part.split != OUT_OF_FOLD:
            raise DataError(f"{part.path}: holds {part.split} predictions, expected out-of-fold predictions")
        if not self._accepts(part):
            self._raise(part)

    def rows(self, lesion_ids: Any) -> np.ndarray:
        """Return the row in the data of each id of an Arrow array, -1 for a lesion that is not in the data."""
        import pyarrow.compute as pc

        rows = pc.fill_null(pc.index_in(lesion_ids, value_set=self._known), -1)
        return np.asarray(rows.to_numpy(), np.int64)

    def _accepts(self, part: _Part) -> bool:
        """Return whether `_raise` would raise nothing. Records the groups and weights of the part."""
        import pyarrow as pa
        import pyarrow.compute as pc

        rows, fold = part.rows, part.fold
        if (rows < 0).any() or (part.labels != self.labels[rows]).any() or (fold != self.folds[rows]).any():
            return False
        for number in range(len(part.models)):
            if (np.bincount(rows[part.model_of == number], minlength=1) > 1).any():
                return False
        encoded = part.groups.dictionary_encode()
        codes, names = encoded.indices.to_numpy(), encoded.dictionary
        fold_of_code = np.empty(len(names), np.int64)
        fold_of_code[codes] = fold
        if (fold_of_code[codes] != fold).any():
            return False
        known = pc.fill_null(pc.index_in(names, value_set=self._groups), -1).to_numpy()
        if (self._fold_of_group[known[known >= 0]] != fold_of_code[known >= 0]).any():
            return False
        folds = int(fold.max(initial=0)) + 2
        pairs = np.unique((part.model_of * len(part.hashes) + part.hash_of) * folds + fold + 1)
        for pair, one in zip(*(each.tolist() for each in np.divmod(pairs, folds)), strict=True):
            model, weights = part.models[pair // len(part.hashes)], part.hashes[pair % len(part.hashes)]
            if weights and self._fold_of_weights.setdefault((model, weights), one - 1) != one - 1:
                return False
        self._groups = pa.concat_arrays([self._groups, names.filter(pa.array(known < 0))])
        self._fold_of_group = np.concatenate([self._fold_of_group, fold_of_code[known < 0]])
        return True

    def _raise(self, part: _Part) -> None:
        """Raise DataError for the first row of a part that does not match."""
        path = part.path
        seen: set[tuple[str, str]] = set()
        fold_of_group = dict(zip(self._groups.to_pylist(), self._fold_of_group.tolist(), strict=True))
        ids, groups = part.lesion_ids.to_pylist(), part.groups.to_pylist()
        columns = (part.rows, part.labels, part.fold, part.model_of, part.hash_of)
        for lesion, group, row, label, fold, model_of, hash_of in zip(
            ids, groups, *(column.tolist() for column in columns), strict=True
        ):
            model, weights = part.models[model_of], part.hashes[hash_of]
            if row < 0:
                raise DataError(f"{path}: lesion {lesion} is not in the data")
            if (lesion, model) in seen:
                raise DataError(f"{path}: lesion {lesion} occurs twice for model {model}")
            seen.add((lesion, model))
            if label != self.labels[row]:
                raise DataError(f"{path}: lesion {lesion} has label {label}, in the data it is {self.labels[row]}")
            if fold != self.folds[row]:
                raise DataError(
                    f"{path}: lesion {lesion} is predicted as fold {fold} but belongs to fold {self.folds[row]}: "
                    "its model was trained on it; train again with the folds of this data"
                )
            if fold_of_group.setdefault(group, fold) != fold:
                raise DataError(
                    f"{path}: group {group} is in folds {fold_of_group[group]} and {fold}: assign folds by group"
                )
            if weights and self._fold_of_weights.setdefault((model, weights), fold) != fold:
                raise DataError(
                    f"{path}: weights {weights[:12]} of {model} predict folds "
                    f"{self._fold_of_weights[model, weights]} and {fold}: they were trained on one of them"
                )


class _Part:
    """The columns of a prediction file that are no lists. n: its rows.

    lesion_ids, groups: (n,) Arrow text.  labels, fold: (n,) int64.  models, hashes, heads: the distinct values of which
    model_of, hash_of and head_of (n,) are indices.  rows: (n,) in the data, once it is known.
    """

    def __init__(self, file: PredictionFile) -> None:
        import pyarrow as pa

        self.file, self.path, self.split = file, file.path, file.split
        text = {name: [pa.array([], pa.string())] for name in ("lesion_id", "group")}
        numbers = {name: [np.empty(0, np.int64)] for name in ("label", "fold", "model", "model_hash", "head")}
        distinct: dict[str, dict[str, int]] = {name: {} for name in ("model", "model_hash", "head")}
        for table in file.tables(_SCALARS):
            for name in _SCALARS:
                column = table[name].combine_chunks()
                if name in text:
                    text[name].append(column)
                elif name in distinct:
                    encoded, known = column.dictionary_encode(), distinct[name]
                    codes = [known.setdefault(each, len(known)) for each in encoded.dictionary.to_pylist()]
                    numbers[name].append(np.array(codes, np.int64)[encoded.indices.to_numpy()])
                else:
                    numbers[name].append(column.to_numpy().astype(np.int64))
        self.lesion_ids, self.groups = (pa.concat_arrays(text[name]) for name in ("lesion_id", "group"))
        joined = {name: np.concatenate(parts) for name, parts in numbers.items()}
        self.labels, self.fold = joined["label"], joined["fold"]
        self.models, self.model_of = tuple(distinct["model"]), joined["model"]
        self.hashes, self.hash_of = tuple(distinct["model_hash"]), joined["model_hash"]
        self.heads, self.head_of = tuple(distinct["head"]), joined["head"]
        self.rows = np.empty(0, np.int64)


class _Gathered:
    """Checked prediction files whose outputs are still to be read.

    scalars: the table without outputs, but with concepts and metadata.
    """

    def __init__(self, files: Sequence[PredictionFile], models: Sequence[str] | None, data: _DataSplit | None) -> None:
        """data: None takes the lesions of the first model of the first file.  models: see `gather`. Raises DataError
        where files do not match the data, or overlap or differ in names, heads or widths.
        """
        self._parts = []
        for file in files:
            part = _Part(file)
            if data is None:
                own = np.flatnonzero(part.model_of == 0)
                ids = part.lesion_ids.take(own).to_numpy(zero_copy_only=False)
                data = _DataSplit(ids, part.labels[own], part.fold[own], str(part.path))
            part.rows = data.rows(part.lesion_ids)
            data.check(part)
            if models is not None and (unknown := sorted(set(part.models) - set(models))):
                expected = ", ".join(models)
                raise DataError(f"{part.path}: holds unexpected model {unknown[0]!r}; expected {expected}")
            self._parts.append(part)
        assert data is not None
        self._feature_widths: dict[str, int] = {}
        self.scalars = self._merge(models, data)

    def table(self, keys: Sequence[str] = _OUTPUTS, rows: np.ndarray | None = None) -> OofTable:
        """Return the table with these outputs; others are (N, 0). rows: only these rows, in this order."""
        table, place = self.scalars, np.arange(len(self.scalars))
        if rows is not None:
            table, place = table.take(rows), np.full(len(table), -1)
            place[rows] = np.arange(len(rows))
        found: dict[str, dict[str, np.ndarray]] = {key: {} for key in keys}
        for part in self._parts:
            for name, positions, values in self._outputs(part, keys):
                target = place[positions]
                for key, value in values.items():
                    if name not in found[key]:
                        found[key][name] = np.full((len(table), value.shape[1]), np.nan, np.float32)
                    found[key][name][target[target >= 0]] = value[target >= 0]
        ordered = {key: {name: by_model[name] for name in table.models} for key, by_model in found.items()}
        return replace(table, **ordered)  # type: ignore[arg-type]

    def chunks(self, model: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield (first row, outputs) of a model for all rows in order, NaN without a prediction."""
        sources = [self._in_order(part, model) for part in self._parts if model in part.models]
        waiting = [next(source) for source in sources]
        widths = {key: value.shape[1] for key, value in waiting[0][1].items()}
        size = _group_rows(widths["features"])
        for start in range(0, len(self.scalars), size):
            stop = min(start + size, len(self.scalars))
            outputs = {key: np.full((stop - start, width), np.nan, np.float32) for key, width in widths.items()}
            for number, source in enumerate(sources):
                while len(waiting[number][0]) and waiting[number][0][0] < stop:
                    rows, values = waiting[number]
                    end = int(np.searchsorted(rows, stop))
                    for key, value in values.items():
                        outputs[key][rows[:end] - start] = value[:end]
                    rest = rows[end:], {key: value[end:] for key, value in values.items()}
                    waiting[number] = rest if len(rest[0]) else next(source, rest)
            yield start, outputs

    def _in_order(self, part: _Part, model: str) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Yield (rows, outputs) of a model in a part by ascending row, of a file in another order all at once."""
        found = ((rows, values) for name, rows, values in self._outputs(part, _OUTPUTS) if name == model)
        if (np.diff(part.rows[part.model_of == part.models.index(model)]) > 0).all():
            yield from found
            return
        pairs = list(found)
        rows = np.concatenate([each for each, _ in pairs])
        order = np.argsort(rows)
        yield rows[order], {key: np.concatenate([values[key] for _, values in pairs])[order] for key in _OUTPUTS}

    def _outputs(self, part: _Part, keys: Sequence[str]) -> Iterator[tuple[str, np.ndarray, dict[str, np.ndarray]]]:
        """Yield (model, rows in the data (n,), lists (n, W)) in the order of a file."""
        import pyarrow as pa

        start = 0
        for table in part.file.tables(keys):
            here = slice(start, start + len(table))
            for number, name in enumerate(part.models):
                mask = part.model_of[here] == number
                if mask.any():
                    # Models differ in the width of their features.
                    own = table if mask.all() else table.filter(pa.array(mask))
                    values = {key: part.file.matrix(own, key) for key in keys}
                    self._check_widths(part, name, values)
                    yield name, part.rows[here][mask], values
            start += len(table)

    def _check_widths(self, part: _Part, model: str, values: Mapping[str, np.ndarray]) -> None:
        file = part.file
        for key, value in values.items():
            found, width = value.shape[1], file.width(key)
            if key == "features":
                width = self._feature_widths.setdefault(model, found)
                if found != width:
                    raise DataError(f"{part.path}: {key} of {model} has width {found}, but {width} in another file")
            elif found != width:
                raise DataError(f"{part.path}: {key} of {model} has {found} numbers a row, expected {width}")

    def _merge(self, models: Sequence[str] | None, data: _DataSplit) -> OofTable:
        """Return the table without outputs. Raises DataError where files overlap or differ in names or heads."""
        first = self._parts[0]
        rows = len(data.lesion_ids)
        found = tuple(dict.fromkeys(model for part in self._parts for model in part.models))
        if models is not None and (absent := [name for name in models if name not in found]):
            raise DataError(f"no predictions of model {absent[0]!r} found; train it, or remove it from models")
        names = found if models is None else tuple(models)
        groups = data.lesion_ids.copy()
        concepts = np.full((rows, len(first.file.concept_names)), np.nan, np.float32)
        metadata = np.full((rows, len(first.file.task.fields)), np.nan, np.float32)
        heads: dict[str, str] = {}
        hashes = {name: np.full(rows, "", object) for name in names}
        predicted = {name: np.zeros(rows, bool) for name in names}
        for part in self._parts:
            path = part.path
            if difference := _difference(part.file, first.file):
                raise DataError(f"{path}: is for {difference} than {first.path}")
            for number, name in enumerate(part.models):
                mask = part.model_of == number
                positions = part.rows[mask]
                if predicted[name][positions].any():
                    lesion = data.lesion_ids[positions[predicted[name][positions]][0]]
                    raise DataError(f"{path}: lesion {lesion} was already predicted by model {name} in another file")
                predicted[name][positions] = True
                head = _single([part.heads[each] for each in np.unique(part.head_of[mask])], "head", path)
                if heads.setdefault(name, head) != head:
                    raise DataError(f"{path}: model {name} has a {head} head, but a {heads[name]} head in another file")
                hashes[name][positions] = np.array(part.hashes, object)[part.hash_of[mask]]
            groups[part.rows] = part.groups.to_numpy(zero_copy_only=False)
            for _, positions, values in self._outputs(part, ("concepts", "metadata")):
                concepts[positions], metadata[positions] = values["concepts"], values["metadata"]
        empty = {name: np.empty((rows, 0), np.float32) for name in names}
        return OofTable(
            lesion_ids=data.lesion_ids,
            groups=groups,
            labels=data.labels,
            folds=data.folds,
            concepts=concepts,
            metadata=metadata,
            models=names,
            heads={name: heads[name] for name in names},
            logits=empty,
            aux_clinical=empty,
            aux_dermoscopic=empty,
            features=empty,
            hashes=hashes,
            task=first.file.task,
            concept_names=first.file.concept_names,
        )


def _difference(part: Predictions | PredictionFile, other: Predictions | PredictionFile) -> str:
    """Name what keeps two files from being combined, "" if nothing does."""
    if not part.task.matches(other.task):
        return "another task"
    return "" if part.concept_names == other.concept_names else "other concepts"


def _header(names: Predictions | OofTable, split: str, extra: Mapping[str, Any]) -> dict[bytes, bytes]:
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
        for name in _SCALARS
    }
    columns |= {name: _as_lists(getattr(rows, name)) for name in _LISTS}
    return pa.table(columns).replace_schema_metadata(header)


def _as_lists(array: np.ndarray) -> Any:
    """Return the rows (n, W) of a row group as an Arrow array of lists."""
    import pyarrow as pa

    values = pa.array(np.ascontiguousarray(array, np.float32).ravel(), from_pandas=False)
    return pa.ListArray.from_arrays(pa.array(np.arange(len(array) + 1, dtype=np.int32) * array.shape[1]), values)


def _group_rows(width: int) -> int:
    """Return the rows of a row group whose widest column has this width."""
    return max(1, min(GROUP_ROWS, GROUP_NUMBERS // max(width, 1)))


def _read_columns(tables: Iterable[Any], file: PredictionFile, rows: int) -> dict[str, np.ndarray]:
    """Return the columns of tables of this many rows in all."""
    columns: dict[str, np.ndarray] = {}
    start = 0
    for table in tables:
        here = slice(start, start + len(table))
        for name in table.column_names:
            values = file.matrix(table, name) if name in _LISTS else _array(table[name])
            if name not in columns:
                columns[name] = np.empty((rows, *values.shape[1:]), values.dtype)
            kept = columns[name]
            if kept.shape[1:] != values.shape[1:]:
                found = f"{kept.shape[1]} and of {values.shape[1]} numbers"
                raise DataError(f"{file.path}: column {name!r} has rows of {found}; run triderm crossval again")
            kept[here] = values
        start += len(table)
    empty = {name: np.empty((0, file.width(name)), np.float32) for name in _LISTS}
    return columns or {**empty, **{name: np.empty(0, object if _KINDS[name] == "text" else int) for name in _SCALARS}}


def _array(column: Any) -> np.ndarray:
    """Return a column of integers, or of text with one object for each distinct text where these are few."""
    import pyarrow as pa

    column = column.combine_chunks()
    if not pa.types.is_string(column.type):
        return np.asarray(column.to_numpy())
    encoded = column.dictionary_encode()
    texts = encoded.dictionary.to_numpy(zero_copy_only=False)
    return np.asarray(texts[encoded.indices.to_numpy()])


def _concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Join rows that are of one task, split and header."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {
        each.name: np.concatenate([getattr(part, each.name) for part in parts])
        for each in fields(Predictions)
        if isinstance(getattr(parts[0], each.name), np.ndarray)
    }
    return replace(parts[0], **columns)


def row_slice(rows: Predictions, start: int, stop: int) -> Predictions:
    """Return the rows from start to stop."""
    columns: dict[str, Any] = {
        each.name: value[start:stop]
        for each in fields(Predictions)
        if isinstance(value := getattr(rows, each.name), np.ndarray)
    }
    return replace(rows, **columns)


def _column(value: Any, rows: int, kind: type) -> np.ndarray:
    array: np.ndarray = np.asarray(value, kind)
    if array.ndim > 1 or (array.ndim == 1 and len(array) != rows):
        raise DataError(f"a column has shape {array.shape}, expected ({rows},)")
    return np.array(np.broadcast_to(array, (rows,)))


def _single(values: Iterable[str], what: str, path: Path | None = None) -> str:
    distinct = sorted(set(values))
    if len(distinct) != 1:
        where = f"{path}: " if path else ""
        raise DataError(f"{where}expected one {what}, got {len(distinct)}: {', '.join(map(str, distinct[:3]))}")
    return str(distinct[0])
