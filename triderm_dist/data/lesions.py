"""The interface of a set of lesions for plans and loaders: everything except for photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass
class LesionInputs:
    """Rows of a packed set, or of several: everything of a `Batch` except the photos, as arrays of B rows."""

    lesion_ids: list[str]
    view_present: np.ndarray
    concepts: np.ndarray
    metadata: np.ndarray
    labels: np.ndarray
    class_mask: np.ndarray | None = None
    weights: np.ndarray | None = None
    fine: np.ndarray | None = None


def one_hot(numbers: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return the rows (B, F) float32 of these labels (B,); zeros for one that is unknown."""
    return (numbers[:, None] == np.arange(len(names))).astype(np.float32)


class Lesions(Protocol):
    """N lesions by row number: a packed set (`ShardIndex`), or the union of several (`LesionUnion`)."""

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64, `UNLABELED` where unknown."""

    @property
    def shard(self) -> np.ndarray:
        """(N,) integers, equal for lesions whose photos are in the same shard."""

    def inputs(self, rows: np.ndarray) -> LesionInputs:
        """Return the lesions in these rows (B,)."""
