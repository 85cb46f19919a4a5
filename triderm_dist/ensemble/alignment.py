"""Fused features of fold models turned into one basis, so that a column means the same in every row.

Each fold's network has its own axes. Lesions that all of them have predicted (the test set: no label is looked at) show
how they lie to one another; orthogonal Procrustes turns every network's features onto those of its model's first fold.
Shapes: N lesions, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triderm_dist.files import atomic_path
from triderm_dist.predictions import OofTable, Predictions
from triderm_dist.schema import DataError


@dataclass(frozen=True, eq=False)
class Turn:
    """features -> (features - center) @ rotation. center: (D,) and rotation: (D, D) float32, orthogonal."""

    center: np.ndarray
    rotation: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features - self.center) @ self.rotation


def fit_turns(parts: Sequence[Predictions]) -> dict[str, Turn]:
    """A turn for the weights (by hash) of every part, each the predictions of one fold model for the same lesions.

    The first part of a model is what its others are turned to. Raises DataError where parts hold different lesions.
    """
    from scipy.linalg import orthogonal_procrustes

    references: dict[str, tuple[list[str], np.ndarray]] = {}
    turns = {}
    for part in parts:
        model, weights = str(part.model[0]), str(part.model_hash[0])
        order = np.argsort(part.lesion_ids.astype(str))
        ids = part.lesion_ids[order].tolist()
        center = part.features.mean(axis=0)
        own = part.features[order] - center
        there, reference = references.setdefault(model, (ids, own))
        if there != ids or reference.shape != own.shape:
            raise DataError(f"test predictions of {model} ({weights[:12]}) hold other lesions than its first fold's")
        rotation = np.eye(own.shape[1]) if own is reference else orthogonal_procrustes(own, reference)[0]
        turns[weights] = Turn(center, np.ascontiguousarray(rotation, np.float32))
    return turns


def turned_rows(table: OofTable, models: Sequence[str], turns: Mapping[str, Turn]) -> np.ndarray:
    """(N, sum of D) float32 out-of-fold features of the models, each row turned as its own network wants it."""
    blocks = []
    for model in models:
        block = np.empty_like(table.features[model])
        for weights in dict.fromkeys(table.hashes[model]):
            if weights not in turns:
                raise DataError(
                    f"no test.parquet of {model} with weights {weights[:12]}: run triderm predict submit=false first"
                )
            own = table.hashes[model] == weights
            block[own] = turns[weights](table.features[model][own])
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


def turned_mean(
    parts: Sequence[Predictions], lesion_ids: np.ndarray, models: Sequence[str], turns: Mapping[str, Turn]
) -> np.ndarray:
    """(N, sum of D) of test lesions: the mean over a model's folds of their turned features."""
    by_model: dict[str, list[np.ndarray]] = {model: [] for model in models}
    for part in parts:
        model, weights = str(part.model[0]), str(part.model_hash[0])
        if model not in by_model:
            continue
        if weights not in turns:
            raise DataError(f"weights {weights[:12]} of {model} are not those that triderm stack aligned; run it again")
        place = {lesion: row for row, lesion in enumerate(part.lesion_ids)}
        by_model[model].append(turns[weights](part.features[[place[lesion] for lesion in lesion_ids]]))
    return np.concatenate([np.mean(by_model[model], axis=0) for model in models], axis=1)


def save_turns(path: Path, turns: Mapping[str, Turn]) -> None:
    """Write as safetensors, whole or not at all."""
    from safetensors.numpy import save_file

    tensors = {f"{weights}.{name}": getattr(turn, name) for weights, turn in turns.items()
               for name in ("center", "rotation")}  # fmt: skip
    with atomic_path(path) as beside:
        save_file(tensors, beside)


def load_turns(path: Path) -> dict[str, Turn]:
    """Read what `save_turns` wrote. Raises DataError naming the file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        raise DataError(f"{path}: missing or not readable; run triderm stack again") from None
    hashes = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    return {weights: Turn(tensors[f"{weights}.center"], tensors[f"{weights}.rotation"]) for weights in hashes}
