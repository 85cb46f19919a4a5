"""Predictions as columns in memory: rows of models and lesions, and tables with a row per lesion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.schema import UNLABELED, DataError, Task

OUT_OF_FOLD = "out_of_fold"
TEST = "test"
NO_FOLD = -1
"""The fold of test lesions, which belong to no fold."""


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
        if (bad := not_finite(self.logits)).size:
            about = str(self.model[bad[0]]), int(self.fold[bad[0]])
            raise DataError(describe_not_finite(*about, self.lesion_ids[bad]))

    def __len__(self) -> int:
        return len(self.lesion_ids)


def not_finite(logits: np.ndarray) -> np.ndarray:
    """Return the rows (n,) of logits (N, C) with a value that is not finite."""
    return np.flatnonzero(~np.isfinite(logits).all(axis=1))


def describe_not_finite(model: str, fold: int, lesion_ids: np.ndarray) -> str:
    """Return the line for outputs of a network that are not finite. fold: of the network, or `NO_FOLD`."""
    others = f" and {len(lesion_ids) - 1:,} others" if len(lesion_ids) > 1 else ""
    folder = "MODEL/fold-K" if fold == NO_FOLD else f"{model}/fold-{fold}"
    return (
        f"outputs of {model} for lesion {lesion_ids[0]}{others} are not finite; delete {folder} in the run and train "
        "it again, with a lower train.optim.lr or with train.precision=fp32"
    )


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


def rows_of(wanted: Sequence[str] | np.ndarray, lesion_ids: Any) -> np.ndarray:
    """Return the row (n,) int64 of each wanted lesion, -1 for one that is not there.

    wanted: (n,) text.  lesion_ids: of all rows, (N,) text or a large_string array.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pa.array(wanted, pa.large_string())
    ids = lesion_ids if isinstance(lesion_ids, pa.Array) else pa.array(lesion_ids, pa.large_string())
    return np.asarray(pc.index_in(names, ids).fill_null(-1).to_numpy(), np.int64)


def labeled(table: OofTable) -> np.ndarray:
    """Return (N,) bool: lesions whose diagnosis is known."""
    return table.labels != UNLABELED


def _column(value: Any, rows: int, kind: type) -> np.ndarray:
    array: np.ndarray = np.asarray(value, kind)
    if array.ndim > 1 or (array.ndim == 1 and len(array) != rows):
        raise DataError(f"a column has shape {array.shape}, expected ({rows},)")
    return np.array(np.broadcast_to(array, (rows,)))


def concatenate(parts: Sequence[Predictions]) -> Predictions:
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


def single(values: Iterable[str], what: str, path: Path | None = None) -> str:
    distinct = sorted(set(values))
    if len(distinct) != 1:
        where = f"{path}: " if path else ""
        raise DataError(f"{where}expected one {what}, got {len(distinct)}: {', '.join(map(str, distinct[:3]))}")
    return str(distinct[0])
