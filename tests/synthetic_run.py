"""Files of a synthetic run: predictions of two models over three folds, in the format of the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from triderm_dist.predictions import NO_FOLD, TEST, Predictions, gather, write_oof, write_predictions
from triderm_dist.schema import CONCEPTS, DIAGNOSES, added_fields

MODELS = {"trimodal": ("softmax", 2.5), "dual_cnn": ("sigmoid", 1.8)}
FOLDS = 3
RARE = 9


def labels_of(lesions: int, seed: int = 0) -> np.ndarray:
    """Return labels with at least `RARE` of each diagnosis, and an imbalance like that of the real data."""
    generator = np.random.default_rng(seed)
    share = np.array([6, 45, 2, 11, 2, 2, 1, 9, 15, 6, 1], float)
    drawn = generator.choice(len(DIAGNOSES), lesions - RARE * len(DIAGNOSES), p=share / share.sum())
    return generator.permutation(np.concatenate([np.repeat(np.arange(len(DIAGNOSES)), RARE), drawn]))


def folds_of(labels: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    result = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        result[rows] = (np.arange(len(rows)) + label) % folds
    return result


def predictions_of(
    model: str, labels: np.ndarray, fold: int, lesion_ids: list[str], seed: int, informed: bool = True
) -> Predictions:
    """Return predictions of a model that is better than chance, or at chance if not `informed`."""
    head, skill = MODELS.get(model, ("softmax", 2.0))
    generator = np.random.default_rng(seed)
    rows, classes = len(labels), len(DIAGNOSES)
    truth = np.eye(classes)[labels] * (skill if informed else 0.0)

    def logits(noise: float) -> np.ndarray:
        return truth + generator.normal(scale=noise, size=(rows, classes)) - (2.0 if head == "sigmoid" else 0.0)

    metadata = np.stack(
        [
            generator.integers(1, 18, rows) * 5.0,
            generator.integers(0, 2, rows).astype(float),
            generator.choice([2.0, 3.0, 4.0, np.nan], rows, p=[0.1, 0.6, 0.25, 0.05]),
            generator.integers(0, 7, rows).astype(float),
            *(np.full(rows, np.nan) for _ in added_fields()),
        ],
        axis=1,
    )
    return Predictions(
        lesion_ids=np.array(lesion_ids, object),
        groups=np.array(lesion_ids, object),
        labels=labels,
        fold=np.array(fold),
        model=np.array(model),
        model_hash=np.array(f"{model}-{fold}".ljust(64, "0")),
        head=np.array(head),
        logits=logits(1.0),
        aux_clinical=logits(1.6),
        aux_dermoscopic=logits(1.3),
        features=generator.normal(size=(rows, 8 if model == "trimodal" else 5)),
        concepts=np.where(
            generator.random((rows, len(CONCEPTS))) < 0.02, np.nan, generator.random((rows, len(CONCEPTS)))
        ),
        metadata=metadata,
        concept_names=CONCEPTS,
    )


def write_run(
    folder: Path, lesions: int = 360, informed: bool = True, models: tuple[str, ...] = tuple(MODELS)
) -> np.ndarray:
    """Write predictions.parquet and test.parquet of every fold and the gathered oof.parquet; return the labels."""
    labels = labels_of(lesions)
    folds = folds_of(labels)
    ids = [f"lesion-{row:04d}" for row in range(lesions)]
    test_labels = labels_of(150, seed=7)
    test_ids = [f"test-{row:04d}" for row in range(150)]
    for number, model in enumerate(models):
        for fold in range(FOLDS):
            rows = np.flatnonzero(folds == fold)
            own = predictions_of(model, labels[rows], fold, [ids[row] for row in rows], 100 * number + fold, informed)
            write_predictions(folder / model / f"fold-{fold}" / "predictions.parquet", own)
            test = predictions_of(model, test_labels, NO_FOLD, test_ids, 1000 + 100 * number + fold, informed)
            test.model_hash[:] = own.model_hash[0]
            write_predictions(folder / model / f"fold-{fold}" / "test.parquet", test, split=TEST, transforms=8)
    write_oof(folder / "oof.parquet", gather(folder, models, ids, labels, folds))
    return labels
