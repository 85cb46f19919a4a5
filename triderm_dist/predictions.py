"""Prediction files, and the out-of-fold table on which everything after training is fitted.

One row holds the outputs of one model for one lesion. The model of a fold writes `predictions.parquet` (the lesions of
its fold, which it was not trained on) and `test.parquet`; `gather` merges the former of all folds and models and
raises for files that would leak training rows.

Shapes: N lesions, C diagnoses, K concepts, M metadata fields, D features.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from triderm_dist.checksums import (
    Column,
    DamagedFile,
    check_mapping,
    matrix_of,
    read_checked_parquet,
    write_checked_parquet,
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
_LISTS = ("logits", "aux_clinical", "aux_dermoscopic", "features", "concepts", "metadata")

MAX_CHUNK = 1 << 28
"""Numbers in a chunk of a column of lists; 1 GiB, and fewer than 32-bit offsets reach."""


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
    import pyarrow as pa

    scalars = {
        "lesion_id": predictions.lesion_ids,
        "group": predictions.groups,
        "fold": predictions.fold,
        "model": predictions.model,
        "model_hash": predictions.model_hash,
        "head": predictions.head,
        "label": predictions.labels,
    }
    columns: dict[str, Any] = {
        name: pa.array(scalars[name], pa.int64() if name in ("fold", "label") else pa.string()) for name in _SCALARS
    }
    columns |= {name: _as_lists(getattr(predictions, name)) for name in _LISTS}
    if predictions.refit_of:
        extra["refit_of"] = predictions.refit_of
    _write(Path(path), pa.table(columns), _header(predictions, split, extra))


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote. Raises DataError naming the file for anything else."""
    path = Path(path)
    table, task, header = _read(path)
    concepts = tuple(header.pop("concepts"))
    split, refit_of = header.pop("split"), tuple(header.pop("refit_of", ()))
    return replace(_from_rows(table, path, task, concepts), split=split, refit_of=refit_of, extra=header)


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
    if isinstance(source, str | Path):
        paths = find_predictions(Path(source), models)
        if not paths:
            raise DataError(f"{source}: no MODEL/fold-K/predictions.parquet in this folder; run triderm crossval first")
    else:
        paths = [Path(path) for path in source]
    parts = [(path, read_predictions(path)) for path in paths]
    if not parts:
        raise DataError("no prediction files to gather; run triderm crossval first")
    data = _DataSplit(lesion_ids, labels, folds)
    for path, part in parts:
        data.check(path, part)
        if models is not None and (unknown := sorted(set(part.model) - set(models))):
            raise DataError(f"{path}: holds unexpected model {unknown[0]!r}; expected {', '.join(models)}")
    table = _merge(parts, data, models)
    if task is None:
        return table
    if not table.task.matches(task):
        raise DataError(f"{parts[0][0]}: is for task {table.task.name!r}, the data are of {task.name!r}; train again")
    return replace(table, task=task)


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
    import pyarrow as pa

    rows, names = len(table), table.models
    columns: dict[str, Any] = {
        "lesion_id": np.tile(table.lesion_ids, len(names)),
        "group": np.tile(table.groups, len(names)),
        "fold": np.tile(table.folds, len(names)),
        "model": np.repeat(np.array(names, object), rows),
        "model_hash": np.concatenate([table.hashes[name] for name in names]),
        "head": np.repeat(np.array([table.heads[name] for name in names], object), rows),
        "label": np.tile(table.labels, len(names)),
    }
    arrays = {key: pa.array(value, from_pandas=False) for key, value in columns.items()}
    for key in ("logits", "aux_clinical", "aux_dermoscopic", "features"):
        # Models differ in the width of their features: each model is a chunk with its own list length.
        arrays[key] = pa.chunked_array([part for name in names for part in _as_lists(getattr(table, key)[name]).chunks])
    for key in ("concepts", "metadata"):
        arrays[key] = pa.chunked_array(_as_lists(getattr(table, key)).chunks * len(names))
    _write(Path(path), pa.table(arrays), _header(table, OUT_OF_FOLD, {}))


def read_oof(path: Path, features: bool = False) -> OofTable:
    """Read what `write_oof` wrote, without the wide fused features, which are then (N, 0), unless asked for.

    A group gets the first id of its lesions as its name, so that nothing depends on the names in the file: hashes of
    patient ids under another salt give the same stacker. Raises DataError naming the file, also for leaks (`gather`).
    """
    import pyarrow.compute as pc

    path = Path(path)
    wanted = None if features else [*_SCALARS, *(name for name in _LISTS if name != "features")]
    table, task, header = _read(path, wanted)
    if not features:
        table = table.append_column("features", _as_lists(np.empty((len(table), 0))))
    names = tuple(dict.fromkeys(_text(table, "model")))
    if header["split"] != OUT_OF_FOLD:
        raise DataError(f"{path}: holds {header['split']} predictions, expected the out-of-fold table")
    if not names:
        raise DataError(f"{path}: has no rows; run triderm crossval first")
    concepts = tuple(header["concepts"])
    parts = [(path, _from_rows(table.filter(pc.equal(table["model"], name)), path, task, concepts)) for name in names]
    first = parts[0][1]
    data = _DataSplit(first.lesion_ids.tolist(), first.labels, first.fold, str(path))
    for _, part in parts:
        data.check(path, part)
    merged = _merge(parts, data, names)
    return replace(merged, groups=_named_by_lesion(merged.groups, merged.lesion_ids))


def _named_by_lesion(groups: np.ndarray, lesion_ids: np.ndarray) -> np.ndarray:
    """Return the first id, in alphabetical order, of the lesions in each lesion's group, (N,) text."""
    _, codes = np.unique(groups.astype(str), return_inverse=True)
    order = np.argsort(lesion_ids.astype(str), kind="stable")
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


class _DataSplit:
    """The lesions of the data with their labels and folds, which prediction files are checked against."""

    def __init__(
        self, lesion_ids: Sequence[str], labels: np.ndarray, folds: np.ndarray, where: str = "the data"
    ) -> None:
        self.lesion_ids = np.array(list(lesion_ids), object)
        self.labels = np.asarray(labels, np.int64)
        self.folds = np.asarray(folds, np.int64)
        self.row_of = {lesion: row for row, lesion in enumerate(self.lesion_ids)}
        if len(self.row_of) != len(self.lesion_ids):
            raise DataError(f"{where}: a lesion id occurs twice")
        self.fold_of_group: dict[str, int] = {}
        self.fold_of_weights: dict[tuple[str, str], int] = {}

    def rows(self, part: Predictions) -> np.ndarray:
        """Return the row in the data of each row of a part."""
        return np.array([self.row_of[lesion] for lesion in part.lesion_ids], np.int64)

    def check(self, path: Path, part: Predictions) -> None:
        """Raise DataError for a part that does not match the data or the parts checked before (see `gather`)."""
        if part.split != OUT_OF_FOLD:
            raise DataError(f"{path}: holds {part.split} predictions, expected out-of-fold predictions")
        seen: set[tuple[str, str]] = set()
        columns = (part.lesion_ids, part.groups, part.labels, part.fold, part.model, part.model_hash)
        for lesion, group, label, fold, model, weights in zip(*(column.tolist() for column in columns), strict=True):
            if lesion not in self.row_of:
                raise DataError(f"{path}: lesion {lesion} is not in the data")
            if (lesion, model) in seen:
                raise DataError(f"{path}: lesion {lesion} occurs twice for model {model}")
            seen.add((lesion, model))
            row = self.row_of[lesion]
            if label != self.labels[row]:
                raise DataError(f"{path}: lesion {lesion} has label {label}, in the data it is {self.labels[row]}")
            if fold != self.folds[row]:
                raise DataError(
                    f"{path}: lesion {lesion} is predicted as fold {fold} but belongs to fold {self.folds[row]}: "
                    "its model was trained on it; train again with the folds of this data"
                )
            if self.fold_of_group.setdefault(group, fold) != fold:
                raise DataError(
                    f"{path}: group {group} is in folds {self.fold_of_group[group]} and {fold}: assign folds by group"
                )
            if weights and self.fold_of_weights.setdefault((model, weights), fold) != fold:
                raise DataError(
                    f"{path}: weights {weights[:12]} of {model} predict folds "
                    f"{self.fold_of_weights[model, weights]} and {fold}: they were trained on one of them"
                )


def _merge(parts: list[tuple[Path, Predictions]], data: _DataSplit, models: Sequence[str] | None) -> OofTable:
    """Merge checked parts into one table. Raises DataError where parts overlap or differ in names, heads or widths."""
    first_path, first = parts[0]
    rows = len(data.lesion_ids)
    found = tuple(dict.fromkeys(model for _, part in parts for model in part.model))
    if models is not None and (absent := [name for name in models if name not in found]):
        raise DataError(f"no predictions of model {absent[0]!r} found; train it, or remove it from models")
    names = found if models is None else tuple(models)
    groups = data.lesion_ids.copy()
    concepts = np.full((rows, len(first.concept_names)), np.nan, np.float32)
    metadata = np.full((rows, len(first.task.fields)), np.nan, np.float32)
    heads: dict[str, str] = {}
    hashes = {name: np.full(rows, "", object) for name in names}
    arrays: dict[str, dict[str, np.ndarray]] = {key: {} for key in _LISTS[:4]}
    predicted = {name: np.zeros(rows, bool) for name in names}
    for path, part in parts:
        if difference := _difference(part, first):
            raise DataError(f"{path}: is for {difference} than {first_path}")
        for name in dict.fromkeys(part.model):
            mask = part.model == name
            positions = data.rows(part)[mask]
            if predicted[name][positions].any():
                lesion = data.lesion_ids[positions[predicted[name][positions]][0]]
                raise DataError(f"{path}: lesion {lesion} was already predicted by model {name} in another file")
            predicted[name][positions] = True
            head = _single(part.head[mask], "head", path)
            if heads.setdefault(name, head) != head:
                raise DataError(f"{path}: model {name} has a {head} head, but a {heads[name]} head in another file")
            hashes[name][positions] = part.model_hash[mask]
            for key in arrays:
                value = getattr(part, key)[mask]
                kept = arrays[key].setdefault(name, np.full((rows, value.shape[1]), np.nan, np.float32))
                if kept.shape[1] != value.shape[1]:
                    raise DataError(
                        f"{path}: {key} of {name} has width {value.shape[1]}, but {kept.shape[1]} in another file"
                    )
                kept[positions] = value
            groups[positions] = part.groups[mask]
            concepts[positions], metadata[positions] = part.concepts[mask], part.metadata[mask]
    return OofTable(
        lesion_ids=data.lesion_ids,
        groups=groups,
        labels=data.labels,
        folds=data.folds,
        concepts=concepts,
        metadata=metadata,
        models=names,
        heads=heads,
        **arrays,
        hashes=hashes,
        task=first.task,
        concept_names=first.concept_names,
    )


def _difference(part: Predictions, other: Predictions) -> str:
    """Name what keeps two files from being combined, "" if nothing does."""
    if not part.task.matches(other.task):
        return "another task"
    return "" if part.concept_names == other.concept_names else "other concepts"


def _header(names: Predictions | OofTable, split: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    if split not in (OUT_OF_FOLD, TEST):
        raise DataError(f"split: {split!r} is not a split; known: {OUT_OF_FOLD}, {TEST}")
    return {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "diagnoses": list(names.task.diagnosis_names),
        "concepts": list(names.concept_names),
        "metadata_fields": list(names.task.field_names),
        "task": names.task.to_mapping(),
        **extra,
    }


class _HeaderKeys(BaseModel):
    split: str
    diagnoses: list[str]
    concepts: list[str]
    metadata_fields: list[str] = []
    refit_of: list[str] = []


def _write(path: Path, table: Any, header: dict[str, Any]) -> None:
    write_checked_parquet(path, table, {_KEY: json.dumps(header).encode()})


def _read(path: Path, columns: list[str] | None = None) -> tuple[Any, Task, dict[str, Any]]:
    """Return the rows of a prediction file, its task, and the other values of its header."""
    try:
        kinds: dict[str, Column] = {name: "integers" if name in ("fold", "label") else "text" for name in _SCALARS}
        kinds |= dict.fromkeys(_LISTS, "lists")
        table = read_checked_parquet(
            path, columns, {name: kind for name, kind in kinds.items() if columns is None or name in columns}
        )
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run triderm crossval first") from None
    except DamagedFile as error:
        raise DataError(f"{path}: {error}; delete it and run triderm crossval or triderm predict again") from None
    try:
        header = json.loads((table.schema.metadata or {})[_KEY])
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
    if unknown := sorted(set(table["head"].unique().to_pylist()) - {"softmax", "sigmoid"}):
        raise DataError(f"{path}: {unknown[0]!r} is not a kind of head; run triderm crossval or triderm predict again")
    labels = table["label"].to_numpy()
    if len(labels) and not UNLABELED <= labels.min() <= labels.max() < len(task.diagnoses):
        raise DataError(f"{path}: a label is not a diagnosis of task {task.name!r}; run triderm crossval again")
    return table, task, header


def _from_rows(table: Any, path: Path, task: Task, concepts: tuple[str, ...]) -> Predictions:
    texts = {"lesion_ids": "lesion_id", "groups": "group", "model": "model", "model_hash": "model_hash", "head": "head"}
    columns: dict[str, Any] = {field: _text(table, name) for field, name in texts.items()}
    columns |= {name: _as_array(table, name, path) for name in _LISTS}
    columns |= {"labels": table["label"].to_numpy(), "fold": table["fold"].to_numpy()}
    try:
        return Predictions(**columns, task=task, concept_names=concepts)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _as_lists(array: np.ndarray) -> Any:
    """Return the rows (N, W) as a chunked column of lists, each chunk with at most `MAX_CHUNK` numbers."""
    import pyarrow as pa

    width = array.shape[1]
    rows = max(1, MAX_CHUNK // max(1, width))
    chunks = []
    for start in range(0, max(1, len(array)), rows):
        part = np.ascontiguousarray(array[start : start + rows], np.float32)
        offsets = np.arange(len(part) + 1, dtype=np.int32) * width
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(part.ravel(), from_pandas=False)))
    return pa.chunked_array(chunks)


def _as_array(table: Any, name: str, path: Path) -> np.ndarray:
    try:
        return np.asarray(matrix_of(table, name), np.float32)
    except DamagedFile as error:
        raise DataError(f"{path}: {error}") from None


def _text(table: Any, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist(), object)


def _column(value: Any, rows: int, kind: type) -> np.ndarray:
    array: np.ndarray = np.asarray(value, kind)
    if array.ndim > 1 or (array.ndim == 1 and len(array) != rows):
        raise DataError(f"a column has shape {array.shape}, expected ({rows},)")
    return np.array(np.broadcast_to(array, (rows,)))


def _single(values: np.ndarray, what: str, path: Path | None = None) -> str:
    distinct = sorted(set(values))
    if len(distinct) != 1:
        where = f"{path}: " if path else ""
        raise DataError(f"{where}expected one {what}, got {len(distinct)}: {', '.join(map(str, distinct[:3]))}")
    return str(distinct[0])
