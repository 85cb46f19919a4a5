"""From what every fold's model says about the test set to the submission, and its score where the truth is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist import metrics
from triderm_dist.ensemble.artifact import Ensemble, read_json
from triderm_dist.ensemble.fit import _probabilities
from triderm_dist.ensemble.run_files import ENSEMBLE_FILE, HELD_OUT_FILE, STACK_FILE
from triderm_dist.ensemble.stack_inputs import (
    column_names,
    stacker_columns,
)
from triderm_dist.ensemble.stacker import STACKER, Stacker
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
    if missing := [name for name in ids if truth.get(name, UNLABELED) == UNLABELED]:
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
        metadata_fields=table.metadata_fields,
        diagnoses=table.diagnoses,
    )


def predict_final(
    run_folder: Path, table: OofTable, parts: Sequence[Predictions] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """((N, C) probabilities, (C,) thresholds) of a test set, in the order of `table.lesion_ids`.

    `table` is `oof.average_test` of every fold model's predictions, `parts` are these themselves; a diagnosis is
    claimed where its probability is strictly above its threshold: hand both to `submission.write_submission`. Raises
    DataError where stack.ubj or ensemble.json is missing or wants a model that the table has not.
    """
    run_folder = Path(run_folder)
    fitted = Ensemble.load(run_folder / ENSEMBLE_FILE)
    models = [name for name in fitted.members if name != STACKER]
    check_weights(
        run_folder, ((name, part.model_hash[part.model == name]) for part in parts for name in sorted(set(part.model)))
    )
    for model in models:
        if model not in table.models:
            raise DataError(
                f"{run_folder / ENSEMBLE_FILE}: needs predictions of model {model!r}, "
                f"there are those of {', '.join(table.models)}"
            )
    if table.diagnoses != fitted.diagnoses:
        raise DataError(f"{run_folder / ENSEMBLE_FILE}: was fitted for other diagnoses than the test set names")
    members = []
    for name, temperature in zip(fitted.members, fitted.temperatures, strict=True):
        if name == STACKER:
            stacker = Stacker.load(run_folder / STACK_FILE)
            names = column_names(table, models)
            if names != stacker.feature_names[: len(names)]:
                raise DataError(f"{run_folder / STACK_FILE}: was fitted on other columns than the test set has")
            members.append(stacker.predict(stacker_columns(run_folder, stacker.extra, table, models, parts)))
        else:
            members.append(_probabilities(table, name, temperature))
    return fitted.final(members), fitted.thresholds


def check_weights(run_folder: Path, said: Iterable[tuple[str, np.ndarray]]) -> None:
    """Raises DataError where predictions (models with the hashes of their weights) are by other weights than
    ensemble.json was fitted on.
    """
    known = read_json(run_folder / ENSEMBLE_FILE)["weights_of"]
    for model, own in said:
        if model in known and not set(own) <= set(known[model]):
            raise DataError(
                f"{run_folder / ENSEMBLE_FILE}: was fitted on other weights of {model} than those that predict now; "
                "run triderm stack again"
            )
