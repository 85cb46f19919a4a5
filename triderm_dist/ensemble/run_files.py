"""Names of the files that stacking and predicting write into a run folder, and of members and rows of an ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from triderm_dist.checksums import (
    Column,
    DamagedFile,
    matrix_of,
    read_checked_json,
    read_checked_parquet,
    write_checked_parquet,
)
from triderm_dist.schema import DataError

OOF_FILE = "oof.parquet"
STACK_FILE = "stack.json"
"""Describes the stacker and names its kind; the model itself is stack + the suffix of the kind (stack.ubj)."""
REDUCTION_FILE = "stack.safetensors"
ALIGNMENTS_FILE = "turns.safetensors"
STACKER_FILES = (STACK_FILE, REDUCTION_FILE, ALIGNMENTS_FILE)
"""Files of a stacker of any kind; the last two for wide columns, and for fused features."""
ENSEMBLE_FILE = "ensemble.json"
NESTED_FILE = "ensemble_oof.parquet"
OOF_PREFIX = "oof_"
"""Prefix of `submission.result_files` of the out-of-fold lesions; those of the test set have none."""
PREDICTIONS_FILE = "predictions.parquet"
HELD_OUT_FILE = "heldout.json"

STACKER = "stack"
"""The stacker's name among the members of an ensemble; the other members are networks."""
MEAN, FITTED = "mean", "fitted"
"""Weightings of the members: the plain mean, and fitted weights. Where a single member or the mean of a model's seeds
predicts, the weighting has its name.
"""
CHOSEN = "chosen"
"""The weighting that predicts, chosen on the other folds, which the nested estimate scores."""
ENSEMBLE = "ensemble"
"""The chosen weighting in ensemble.json, "final model" in texts (`score_table.FINAL_MODEL`); as `ensemble.use`, `mean`
or `fitted` whatever they gain.
"""
AUTO = "auto"
"""As `ensemble.use`: the best network, unless the ensemble beats it beyond the noise."""
RESERVED = (STACKER, MEAN, FITTED, CHOSEN, ENSEMBLE)
"""Names that no network may have."""


@dataclass(frozen=True)
class NestedRows:
    """The nested estimate per lesion (ensemble_oof.parquet): nothing in a row was fitted on the lesion's fold.

    lesion_ids, labels, folds: (N,).  probabilities: (N, C) of the ensemble, decisions: (N, C) bool, stack: (N, C)
    probabilities of the stacker, NaN without one.
    """

    lesion_ids: np.ndarray
    labels: np.ndarray
    folds: np.ndarray
    probabilities: np.ndarray
    decisions: np.ndarray
    stack: np.ndarray


def write_nested(path: Path, rows: NestedRows) -> None:
    """Write the rows as parquet, atomically."""
    import pyarrow as pa

    columns = {
        "lesion_id": pa.array(rows.lesion_ids, pa.string()),
        "fold": pa.array(rows.folds),
        "label": pa.array(rows.labels),
    }
    for name in ("probabilities", "decisions", "stack"):
        matrix = getattr(rows, name)
        offsets = pa.array(np.arange(len(matrix) + 1) * matrix.shape[1], pa.int32())
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(np.ravel(matrix)))
    write_checked_parquet(path, pa.table(columns))


def read_nested(path: Path) -> NestedRows:
    """Read what `write_nested` wrote. Raises DataError naming the file."""
    lists = ("probabilities", "decisions", "stack")
    kinds: dict[str, Column] = {"lesion_id": "text", "fold": "integers", "label": "integers"}
    try:
        table = read_checked_parquet(path, kinds={**kinds, **dict.fromkeys(lists, "lists")})
        matrices = {name: matrix_of(table, name) for name in lists}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run triderm stack first") from None
    except DamagedFile as error:
        raise DataError(f"{path}: {error}; run triderm stack again") from None
    return NestedRows(
        lesion_ids=np.array(table["lesion_id"].to_pylist(), object),
        labels=table["label"].to_numpy(),
        folds=table["fold"].to_numpy(),
        **matrices,
    )


class _HeldOutKeys(BaseModel):
    macro_f1: float
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    argmax: float
    n: int
    absent: list[str]
    diagnoses: dict[str, int] = {}
    in_training: int = 0


def in_training(count: int, lesions: int) -> str:
    """Say that `count` of the `lesions` of a test set may have been trained on."""
    return (
        f"{count:,} of {lesions:,} test lesions have the id, the group or a photo of a training lesion; where they are "
        "the same lesions or patients, this score is too high"
    )


def read_held_out(folder: Path) -> dict[str, Any] | None:
    """Return the score of a test set in heldout.json, None if it was not scored.

    Raises DataError naming the file.
    """
    path = folder / HELD_OUT_FILE
    try:
        return read_checked_json(path, _HeldOutKeys)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        raise DataError(f"{path}: {error}; run triderm predict again") from None
