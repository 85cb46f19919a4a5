"""Align the fused features of fold models to one basis, so that a column means the same in every row.

Each fold's network has its own axes. Test lesions are predicted by all of them (their labels are not used), so
orthogonal Procrustes on their features maps every network onto the first fold's network of the same model.
Shapes: N lesions, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triderm_dist.checksums import DamagedFile, read_checked_tensors, write_checked_tensors
from triderm_dist.predictions import OofTable, Predictions
from triderm_dist.schema import DataError


@dataclass(frozen=True, eq=False)
class Alignment:
    """features -> (features - center) @ rotation. center: (D,) and rotation: (D, D) float32, orthogonal."""

    center: np.ndarray
    rotation: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features - self.center) @ self.rotation


def fit_alignments(parts: Sequence[Predictions]) -> dict[str, Alignment]:
    """Fit an alignment for each fold model, by the hash of its weights.

    parts: the predictions of one fold model each, all for the same lesions; the first part of a model is the
    reference of its other parts. Raises DataError if parts hold different lesions.
    """
    from scipy.linalg import orthogonal_procrustes

    references: dict[str, tuple[list[str], np.ndarray]] = {}
    alignments = {}
    for part in parts:
        model, weights = str(part.model[0]), str(part.model_hash[0])
        order = np.argsort(part.lesion_ids.astype(str))
        lesion_ids = part.lesion_ids[order].tolist()
        center = part.features.mean(axis=0)
        centered = part.features[order] - center
        reference_ids, reference = references.setdefault(model, (lesion_ids, centered))
        if reference_ids != lesion_ids or reference.shape != centered.shape:
            raise DataError(
                f"test predictions of {model} ({weights[:12]}) hold other lesions than the first fold's; "
                "run triderm predict again"
            )
        is_reference = centered is reference
        rotation = np.eye(centered.shape[1]) if is_reference else orthogonal_procrustes(centered, reference)[0]
        alignments[weights] = Alignment(center, np.ascontiguousarray(rotation, np.float32))
    return alignments


def aligned_rows(table: OofTable, models: Sequence[str], alignments: Mapping[str, Alignment]) -> np.ndarray:
    """Align the out-of-fold features of the models, each row by the network that predicted it: (N, sum of D) float32.

    Raises DataError if a network has no alignment, since it has not predicted the test set.
    """
    blocks = []
    for model in models:
        block = np.empty_like(table.features[model])
        for weights in dict.fromkeys(table.hashes[model]):
            if weights not in alignments:
                raise DataError(
                    f"no test.parquet of {model} with weights {weights[:12]}; run triderm predict submit=false first"
                )
            rows = table.hashes[model] == weights
            block[rows] = alignments[weights](table.features[model][rows])
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


def aligned_mean(
    parts: Sequence[Predictions], lesion_ids: np.ndarray, models: Sequence[str], alignments: Mapping[str, Alignment]
) -> np.ndarray:
    """Average the aligned features of test lesions over the folds of each model: (N, sum of D).

    Raises DataError for weights that were not aligned.
    """
    by_model: dict[str, list[np.ndarray]] = {model: [] for model in models}
    for part in parts:
        model, weights = str(part.model[0]), str(part.model_hash[0])
        if model not in by_model:
            continue
        if weights not in alignments:
            raise DataError(f"weights {weights[:12]} of {model} were not aligned; run triderm stack again")
        row_of = {lesion: row for row, lesion in enumerate(part.lesion_ids)}
        by_model[model].append(alignments[weights](part.features[[row_of[lesion] for lesion in lesion_ids]]))
    return np.concatenate([np.mean(by_model[model], axis=0) for model in models], axis=1)


def save_alignments(path: Path, alignments: Mapping[str, Alignment]) -> None:
    """Write as safetensors, atomically."""
    tensors = {}
    for weights, alignment in alignments.items():
        tensors[f"{weights}.center"] = alignment.center
        tensors[f"{weights}.rotation"] = alignment.rotation
    write_checked_tensors(path, tensors)


def load_alignments(path: Path) -> dict[str, Alignment]:
    """Read what `save_alignments` wrote. Raises DataError naming the file."""
    try:
        tensors = read_checked_tensors(path)
        hashes = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        return {weights: Alignment(tensors[f"{weights}.center"], tensors[f"{weights}.rotation"]) for weights in hashes}
    except (OSError, DamagedFile, KeyError):
        raise DataError(f"{path}: missing, changed or damaged; run triderm stack again") from None
