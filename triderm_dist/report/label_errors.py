"""Confident learning: which labels are probably wrong (Northcutt, Jiang and Chuang 2021, doi:10.1613/jair.1.12125).

Shapes: N lesions, C diagnoses. Probabilities are out of sample, and a lesion's add up to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelErrors:
    """What confident learning finds.

    joint: (C, C) the confident joint, counts of lesions by label (row) and confident diagnosis (column).
    estimated: (C, C) lesions by label and true diagnosis: rows of the joint scaled to the lesions with the label, all
    scaled to N.
    suspects: (n,) lesions off the diagonal of the joint, the least self-confident first (see `margins`).
    alternatives: (n,) their confident diagnosis.
    margins: (n,) probability of the label minus the largest one of another diagnosis, which orders the suspects.
    """

    joint: np.ndarray
    estimated: np.ndarray
    suspects: np.ndarray
    alternatives: np.ndarray
    margins: np.ndarray

    @property
    def share(self) -> float:
        """The estimated share of lesions whose label is wrong."""
        return float(1 - np.trace(self.estimated) / max(self.estimated.sum(), 1e-300))


def find_label_errors(probabilities: np.ndarray, labels: np.ndarray) -> LabelErrors:
    """Count the confident joint of probabilities (N, C) and labels (N,), and return the lesions off its diagonal.

    The threshold of a diagnosis is its mean probability among the lesions labeled with it. A lesion is confidently of
    the most probable one of the diagnoses whose threshold it reaches (equations 1 and 2 of the paper), or of none. The
    lesions off the diagonal are the paper's set "C confusion" of label errors; their order is by normalized margin.
    """
    rows, size = np.arange(len(labels)), probabilities.shape[1]
    of_label = probabilities[rows, labels]
    lesions = np.bincount(labels, minlength=size)
    total = np.bincount(labels, of_label, minlength=size)
    thresholds = np.divide(total, lesions, out=np.full(size, np.inf), where=lesions > 0)
    reached = np.where(probabilities >= thresholds, probabilities, -1.0)
    confident = reached.argmax(axis=1)
    counted = reached[rows, confident] >= 0
    joint = np.zeros((size, size), np.int64)
    np.add.at(joint, (labels[counted], confident[counted]), 1)
    others = probabilities.copy()
    others[rows, labels] = -np.inf
    margins = of_label - others.max(axis=1) if size > 1 else np.ones(len(labels))
    suspects = np.flatnonzero(counted & (confident != labels))
    suspects = suspects[np.argsort(margins[suspects], kind="stable")]
    return LabelErrors(joint, _calibrated(joint, lesions), suspects, confident[suspects], margins[suspects])


def _calibrated(joint: np.ndarray, lesions: np.ndarray) -> np.ndarray:
    """Scale each row of the confident joint to the lesions (C,) with the label, and all to their sum (equation 3).

    A label of which no lesion is confident keeps its lesions on the diagonal.
    """
    counts = joint.astype(float)
    empty = counts.sum(axis=1) == 0
    counts[empty, empty] = 1.0
    scaled = counts / counts.sum(axis=1, keepdims=True) * lesions[:, None]
    return np.asarray(scaled * (lesions.sum() / scaled.sum()))
