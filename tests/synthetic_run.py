"""Files of a synthetic run: predictions of two models over three folds, in the format of the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from triderm_dist.predictions import NO_FOLD, TEST, DataSplit, Predictions, gather, write_oof, write_predictions
from triderm_dist.schema import Diagnosis, MetadataField, ReferenceResult, Task, TaskColumns, View
from triderm_dist.tasks import milk10k_task

MODELS = {"trimodal": ("softmax", 2.5), "dual_cnn": ("sigmoid", 1.8)}
FOLDS = 3
RARE = 9
CONCEPTS = tuple(f"{view}/concept_{number}" for view in ("clinical", "dermoscopic") for number in range(7))

CLINIC = Task(
    name="clinic",
    title="Lesions of a <clinic> & $practice$",
    diagnoses=(
        Diagnosis("MEL<em>1", "thin [melanoma]", malignant=True),
        Diagnosis("Nävus", "nevus", malignant=False),
        Diagnosis("$x$", "in dollars"),
        Diagnosis("[wart]", "wart & co", malignant=False),
    ),
    views=(View("clinical", "phone"),),
    fields=(
        MetadataField("fototyp", "Fototyp (1-6)", "ordinal", ("I", "II<", "III&")),
        MetadataField("n_lesions", "Anzahl", "number", low=-5, high=500, unit="per m$^2$ <b>"),
        MetadataField("smoker", "raucht", "category", ("yes", "no"), title="smokes & drinks"),
    ),
    columns=TaskColumns(image="datei", diagnosis="befund", group="patient"),
    decision="argmax",
    reference_results=(ReferenceResult("an expert <b>", validation="0.9", test="0.8", source="a & b"),),
)
"""A task of four diagnoses and one view, without concepts, whose names need escaping in HTML, figures and XGBoost."""


def labels_of(lesions: int, seed: int = 0, classes: int = 11) -> np.ndarray:
    """Return labels with at least `RARE` of each diagnosis, and an imbalance like that of the real data."""
    generator = np.random.default_rng(seed)
    share = np.array([6, 45, 2, 11, 2, 2, 1, 9, 15, 6, 1], float)[:classes]
    drawn = generator.choice(classes, lesions - RARE * classes, p=share / share.sum())
    return generator.permutation(np.concatenate([np.repeat(np.arange(classes), RARE), drawn]))


def folds_of(labels: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    result = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        result[rows] = (np.arange(len(rows)) + label) % folds
    return result


def predictions_of(
    model: str,
    labels: np.ndarray,
    fold: int,
    lesion_ids: list[str],
    seed: int,
    informed: bool = True,
    task: Task | None = None,
) -> Predictions:
    """Return predictions of a model that is better than chance, or at chance if not `informed`."""
    task = task or milk10k_task()
    head, skill = MODELS.get(model, ("softmax", 2.0))
    generator = np.random.default_rng(seed)
    rows, classes = len(labels), len(task.diagnoses)
    concepts = CONCEPTS if task.concepts.prefix else task.concepts.names
    truth = np.eye(classes)[labels] * (skill if informed else 0.0)

    def logits(noise: float, view: str = "") -> np.ndarray:
        noisy = truth + generator.normal(scale=noise, size=(rows, classes)) - (2.0 if head == "sigmoid" else 0.0)
        return np.full_like(noisy, np.nan) if view and view not in task.view_names else noisy

    metadata = [_values(field, rows, generator) for field in task.fields]
    return Predictions(
        lesion_ids=np.array(lesion_ids, object),
        groups=np.array(lesion_ids, object),
        labels=labels,
        fold=np.array(fold),
        model=np.array(model),
        model_hash=np.array(f"{model}-{fold}".ljust(64, "0")),
        head=np.array(head),
        logits=logits(1.0),
        aux_clinical=logits(1.6, "clinical"),
        aux_dermoscopic=logits(1.3, "dermoscopic"),
        features=generator.normal(size=(rows, 8 if model == "trimodal" else 5)),
        concepts=np.where(
            generator.random((rows, len(concepts))) < 0.02, np.nan, generator.random((rows, len(concepts)))
        ),
        metadata=np.stack(metadata, axis=1) if metadata else np.empty((rows, 0)),
        task=task,
        concept_names=concepts,
    )


def write_run(
    folder: Path,
    lesions: int = 360,
    informed: bool = True,
    models: tuple[str, ...] = tuple(MODELS),
    task: Task | None = None,
) -> np.ndarray:
    """Write predictions.parquet and test.parquet of every fold and the gathered oof.parquet; return the labels.

    task: by default MILK10k.
    """
    classes = len((task or milk10k_task()).diagnoses)
    labels = labels_of(lesions, classes=classes)
    folds = folds_of(labels)
    ids = [f"lesion-{row:04d}" for row in range(lesions)]
    test_labels = labels_of(150, seed=7, classes=classes)
    test_ids = [f"test-{row:04d}" for row in range(150)]
    for number, model in enumerate(models):
        for fold in range(FOLDS):
            rows, seed = np.flatnonzero(folds == fold), 100 * number + fold
            own = predictions_of(model, labels[rows], fold, [ids[row] for row in rows], seed, informed, task)
            write_predictions(folder / model / f"fold-{fold}" / "predictions.parquet", own)
            test = predictions_of(model, test_labels, NO_FOLD, test_ids, 1000 + seed, informed, task)
            test.model_hash[:] = own.model_hash[0]
            write_predictions(folder / model / f"fold-{fold}" / "test.parquet", test, split=TEST, transforms=8)
    write_oof(folder / "oof.parquet", gather(folder, models, DataSplit(ids, labels, folds)))
    return labels


def _values(field: MetadataField, rows: int, generator: np.random.Generator) -> np.ndarray:
    """Draw values of a field; about one in twenty of an ordinal field is missing."""
    if field.is_number:
        return generator.uniform(field.low, field.high, rows).round()
    values = generator.integers(0, len(field.categories), rows).astype(float)
    return np.where(generator.random(rows) < 0.05, np.nan, values) if field.kind == "ordinal" else values
