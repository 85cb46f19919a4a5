"""Predict a test set with the fitted stacker and ensemble, write the submission, and score it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist import metrics
from triderm_dist.ensemble.artifact import Ensemble, read_json
from triderm_dist.ensemble.calibration import member_probabilities
from triderm_dist.ensemble.fitted_stacker import FittedStacker
from triderm_dist.ensemble.run_files import (
    ENSEMBLE_FILE,
    HELD_OUT_FILE,
    PREDICTIONS_FILE,
    STACK_FILE,
    STACKER,
    SUBMISSION_FILE,
)
from triderm_dist.ensemble.stack_inputs import column_names, stacker_columns
from triderm_dist.files import write_json
from triderm_dist.predictions import (
    TEST,
    OofTable,
    Predictions,
    average_test,
    read_predictions,
    write_predictions,
)
from triderm_dist.schema import DIAGNOSES, UNLABELED, DataError
from triderm_dist.submission import read_submission, write_submission


def submit(run_folder: Path, test_files: Sequence[Path]) -> Path:
    """Average `test_files` (MODEL/fold-K/test.parquet), apply stacker and ensemble, write RUN/submission.csv.

    Also writes RUN/predictions.parquet: one row per lesion and model, the mean over folds and transforms. Raises
    DataError where the files hold different lesions or the ensemble needs another model.
    """
    parts = [read_predictions(path) for path in test_files]
    table = average_test(parts)
    probabilities, thresholds = predict_ensemble(run_folder, table, parts)
    write_predictions(run_folder / PREDICTIONS_FILE, _to_rows(table), split=TEST)
    path = run_folder / SUBMISSION_FILE
    (run_folder / HELD_OUT_FILE).unlink(missing_ok=True)  # the score of an earlier submission
    ids = [str(name) for name in table.lesion_ids]
    write_submission(path, ids, probabilities, thresholds, template=sorted(ids))
    return path


def score(submission: Path, truth: Mapping[str, int], resamples: int, seed: int) -> dict[str, Any]:
    """Score a submission by the official macro F1 against {lesion id: label}, and write heldout.json next to it.

    macro_f1 is over the diagnoses in the truth. `absent` names the others: the official scorer has no score then.
    Raises DataError where a lesion of the submission has no truth.
    """
    ids, probabilities = read_submission(submission)
    if missing := [name for name in ids if truth.get(name, UNLABELED) == UNLABELED]:
        raise DataError(f"{submission}: {len(missing)} lesions are not in the ground truth, the first is {missing[0]}")
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


def predict_ensemble(
    run_folder: Path, table: OofTable, parts: Sequence[Predictions] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Return ((N, C) probabilities, (C,) thresholds) of a test set, in the order of `table.lesion_ids`.

    A diagnosis is predicted where its probability is strictly above its threshold; both go to
    `submission.write_submission`.  table: `predictions.average_test` of `parts`, the predictions of every fold model.
    Raises DataError where stack.json or ensemble.json is missing, or was fitted on other models, weights or columns.
    """
    run_folder = Path(run_folder)
    ensemble = Ensemble.load(run_folder / ENSEMBLE_FILE)
    models = [name for name in ensemble.members if name != STACKER]
    check_weights(
        run_folder, ((name, part.model_hash[part.model == name]) for part in parts for name in sorted(set(part.model)))
    )
    for model in models:
        if model not in table.models:
            raise DataError(
                f"{run_folder / ENSEMBLE_FILE}: needs predictions of model {model!r}; "
                f"got predictions of {', '.join(table.models)}"
            )
    if table.diagnoses != ensemble.diagnoses:
        raise DataError(f"{run_folder / ENSEMBLE_FILE}: was fitted for other diagnoses than the test set's")
    members = []
    for name, temperature in zip(ensemble.members, ensemble.temperatures, strict=True):
        if name == STACKER:
            stacker = FittedStacker.load(run_folder / STACK_FILE)
            names = column_names(table, models)
            if names != stacker.feature_names[: len(names)]:
                raise DataError(f"{run_folder / STACK_FILE}: was fitted on other columns than the test set's")
            members.append(stacker.predict(stacker_columns(run_folder, stacker.extra, table, models, parts)))
        else:
            members.append(member_probabilities(table, name, temperature))
    return ensemble.decidable(members), ensemble.thresholds


def check_weights(run_folder: Path, used: Iterable[tuple[str, np.ndarray]]) -> None:
    """Check that predictions are by the network weights that ensemble.json was fitted on.

    used: models with the hashes of their weights. Raises DataError for other weights.
    """
    fitted_on = read_json(run_folder / ENSEMBLE_FILE)["weights_of"]
    for model, hashes in used:
        if model in fitted_on and not set(hashes) <= set(fitted_on[model]):
            raise DataError(
                f"{run_folder / ENSEMBLE_FILE}: was fitted on other weights of {model} than the predictions; "
                "run triderm stack again"
            )


def _to_rows(table: OofTable) -> Predictions:
    """Flatten the averaged table to one row per lesion and model."""
    models = table.models

    def repeat(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values] * len(models))

    def concatenate(by_model: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([by_model[model] for model in models])

    return Predictions(
        lesion_ids=repeat(table.lesion_ids),
        groups=repeat(table.groups),
        labels=repeat(table.labels),
        fold=repeat(table.folds),
        model=np.repeat(np.array(models, object), len(table)),
        model_hash=concatenate(table.hashes),
        head=np.repeat(np.array([table.heads[model] for model in models], object), len(table)),
        logits=concatenate(table.logits),
        aux_clinical=concatenate(table.aux_clinical),
        aux_dermoscopic=concatenate(table.aux_dermoscopic),
        features=concatenate(table.features),
        concepts=repeat(table.concepts),
        metadata=repeat(table.metadata),
        concept_names=table.concept_names,
        metadata_fields=table.metadata_fields,
        diagnoses=table.diagnoses,
    )
