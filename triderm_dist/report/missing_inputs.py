"""Scores of networks whose lesions were predicted with one input hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.predictions import OofTable, read_predictions, rows_of
from triderm_dist.schema import VIEWS


@dataclass(frozen=True)
class MissingInput:
    """Argmax macro F1 of a network with one input hidden.  difference: minus with all inputs.

    name: a view, `concepts` or `metadata`.
    """

    model: str
    name: str
    macro_f1: float
    difference: intervals.Interval


def score_missing_inputs(
    folder: Path, table: OofTable, networks: Sequence[str], labels: np.ndarray, groups: np.ndarray, resamples: int
) -> list[MissingInput]:
    """Return the scores of each network without each of its inputs, where it was predicted so.

    folder: of the run.  table: logits of its N lesions.  labels, groups: (N,) numbers.
    """
    result = []
    for model in networks:
        full = metrics.argmax_decisions(table.logits[model])
        for name in (*VIEWS, "concepts", "metadata"):
            logits = _logits_without(folder, table, model, name)
            if np.isnan(logits).any():
                continue
            decisions = metrics.argmax_decisions(logits)
            difference = intervals.macro_f1_difference(decisions, full, labels, groups, resamples)
            result.append(MissingInput(model, name, metrics.macro_f1(decisions, labels), difference))
    return result


def _logits_without(folder: Path, table: OofTable, model: str, name: str) -> np.ndarray:
    """Read (N, C) logits of a network with an input hidden, by the weights of the table; NaN without any."""
    logits = np.full_like(table.logits[model], np.nan)
    for path in sorted((folder / model).glob(f"fold-*/without_{name}.parquet")):
        part = read_predictions(path, features=False)
        rows = rows_of(part.lesion_ids, table.lesion_ids)
        used = (rows >= 0) & (part.model_hash == table.hashes[model][rows])
        logits[rows[used]] = part.logits[used]
    return logits
