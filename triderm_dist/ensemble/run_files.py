"""Names of the files that stacking leaves in a run folder, and the reader of the nested estimate's rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triderm_dist.schema import DataError

STACK_FILE = "stack.ubj"
TURNS_FILE = "turns.safetensors"
ENSEMBLE_FILE = "ensemble.json"
OOF_FILE = "oof.parquet"
NESTED_FILE = "ensemble_oof.parquet"
SUBMISSION_FILE = "oof_submission.csv"
HELD_OUT_FILE = "heldout.json"


@dataclass(frozen=True)
class NestedRows:
    """ensemble_oof.parquet: (N,) ids, labels, folds; (N, C) probabilities of ensemble and stacker, and decisions."""

    lesion_ids: np.ndarray
    labels: np.ndarray
    folds: np.ndarray
    probabilities: np.ndarray
    decisions: np.ndarray
    stack: np.ndarray


def read_nested(path: Path) -> NestedRows:
    """Read what `fit_final` wrote. Raises DataError naming the file."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run triderm stack first") from None

    def wide(name: str) -> np.ndarray:
        return np.array(table[name].to_pylist())

    return NestedRows(
        lesion_ids=np.array(table["lesion_id"].to_pylist(), object),
        labels=table["label"].to_numpy(),
        folds=table["fold"].to_numpy(),
        probabilities=wide("probabilities"),
        decisions=wide("decisions"),
        stack=wide("stack"),
    )
