"""From what every fold's model says about the test set to the submission, and its score where the truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist import metrics
from triderm_dist.files import write_json
from triderm_dist.final import HELD_OUT_FILE, predict_final
from triderm_dist.predictions import TEST, OofTable, Predictions, average_test, read_predictions, write_predictions
from triderm_dist.schema import DIAGNOSES, UNLABELLED, DataError
from triderm_dist.submission import read_submission, write_submission


def submit(run_folder: Path, test_files: Sequence[Path]) -> Path:
    """Average `test_files` (MODEL/fold-K/test.parquet), apply stacker and ensemble, write RUN/submission.csv.

    Also leaves RUN/predictions.parquet: one row a lesion and model, the mean over folds and transforms. Raises
    DataError where the files do not hold the same lesions or the ensemble wants another model.
    """
    parts = [read_predictions(path) for path in test_files]
    table = average_test(parts)
    probabilities, thresholds = predict_final(run_folder, table, parts)
    write_predictions(run_folder / "predictions.parquet", _as_rows(table), split=TEST)
    path = run_folder / "submission.csv"
    (run_folder / HELD_OUT_FILE).unlink(missing_ok=True)  # the score of an earlier submission
    ids = [str(name) for name in table.lesion_ids]
    write_submission(path, ids, probabilities, thresholds, template=sorted(ids))
    return path


def score(submission: Path, truth: Mapping[str, int], resamples: int, seed: int) -> dict[str, Any]:
    """Official macro F1 of a submission against {lesion id: label}, with its interval; written to heldout.json beside
    it.

    macro_f1 is over the diagnoses in the truth, and `absent` names the others: the official scorer has no score then.
    Raises DataError where a lesion of the submission has no truth.
    """
    ids, probabilities = read_submission(submission)
    if missing := [name for name in ids if truth.get(name, UNLABELLED) == UNLABELLED]:
        raise DataError(f"{submission}: {len(missing)} lesions are not in the ground truth, first {missing[0]}")
    labels = np.array([truth[name] for name in ids], np.int64)
    decisions = probabilities > metrics.OFFICIAL_THRESHOLD
    interval = metrics.bootstrap_interval(decisions, labels, resamples, seed)
    result = {
        "macro_f1": interval.value,
        "interval": [interval.low, interval.high],
        "argmax": metrics.argmax_macro_f1(probabilities, labels),
        "n": len(ids),
        "absent": [name for label, name in enumerate(DIAGNOSES) if not (labels == label).any()],
    }
    write_json(submission.with_name(HELD_OUT_FILE), result)
    return result


def _as_rows(table: OofTable) -> Predictions:
    """The averaged table with one row a lesion and model."""
    models = table.models

    def tall(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values] * len(models))

    def stacked(by_model: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([by_model[model] for model in models])

    return Predictions(
        lesion_ids=tall(table.lesion_ids),
        groups=tall(table.groups),
        labels=tall(table.labels),
        fold=tall(table.folds),
        model=np.repeat(np.array(models, object), len(table)),
        model_hash=stacked(table.hashes),
        head=np.repeat(np.array([table.heads[model] for model in models], object), len(table)),
        logits=stacked(table.logits),
        aux_clinical=stacked(table.aux_clinical),
        aux_dermoscopic=stacked(table.aux_dermoscopic),
        features=stacked(table.features),
        concepts=tall(table.concepts),
        metadata=tall(table.metadata),
        concept_names=table.concept_names,
        diagnoses=table.diagnoses,
    )
