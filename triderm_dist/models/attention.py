"""Attention maps of a tri-modal network, as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from triderm_dist.schema import UNLABELED, MetadataField

NULL = "null"
"""Name of the learned token to which an image may attend instead of concepts and fields."""


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of one model, or the mean over several, for one lesion.

    photos: by view, the crop that is the network's input, (S, S, 3) float in [0, 1]; without missing views.
    attention: by view, weights (L,) over its patches, row by row, sum 1; without views that nothing attends to.
    semantic: by token name, weights with sum 1; empty without semantic gating.
    values: by token name, the score or category as text.  probabilities: (C,), of `diagnoses`.  models: number of
    models averaged.
    """

    lesion_id: str
    label: int
    photos: Mapping[str, np.ndarray]
    attention: Mapping[str, np.ndarray]
    semantic: Mapping[str, float]
    values: Mapping[str, str]
    probabilities: np.ndarray
    models: int
    diagnoses: Sequence[str]

    def json(self) -> dict[str, Any]:
        """Return the values that the attention page draws, for JSON."""
        return {
            "lesion_id": self.lesion_id,
            "diagnosis": None if self.label == UNLABELED else self.diagnoses[self.label],
            "probabilities": dict(zip(self.diagnoses, map(float, self.probabilities), strict=True)),
            "attention": {view: part.tolist() for view, part in self.attention.items()},
            "semantic": dict(self.semantic),
            "models": self.models,
        }


def semantic_values(
    concepts: Sequence[str], scores: np.ndarray, fields: Sequence[MetadataField], metadata: np.ndarray
) -> dict[str, str]:
    """Format the value of each semantic token of a lesion by name: scores (K,) and metadata (M,), NaN where missing."""
    values = {
        name: "missing" if math.isnan(score) else f"{score:.2f}" for name, score in zip(concepts, scores, strict=True)
    }
    for field, value in zip(fields, metadata.tolist(), strict=True):
        values[field.name] = field.show(value)
    return values
