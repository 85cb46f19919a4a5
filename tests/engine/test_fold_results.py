"""The table at the end of a cross-validation, and the time that the folds after the current one take."""

import json

import numpy as np
import pytest

from tests.synthetic_run import predictions_of
from triderm_dist.config import Experiment, load
from triderm_dist.engine.fold_results import fold_results, fold_table, later_seconds
from triderm_dist.files import write_text
from triderm_dist.predictions import write_predictions


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    models = "models={a: {train: {epochs: 2}}, b: {train: {epochs: 6}}}"
    return load(Experiment, None, [f"output={tmp_path}", models, "data.folds=2"])


def write_fold(experiment, model, fold, seconds, scores, correct):
    """Write a finished fold of six lesions of two diagnoses, of which it gives `correct` the highest logit."""
    folder, labels = experiment.fold_folder(model, fold), np.array([0, 0, 0, 1, 1, 1])
    held_out = predictions_of(model, labels, fold, [f"{fold}-{row}" for row in range(6)], 0)
    held_out.logits[:] = -9.0
    held_out.logits[np.arange(6), np.where(np.arange(6) < correct, labels, 1 - labels)] = 9.0
    write_predictions(folder / "predictions.parquet", held_out)
    lines = [
        {"kind": "validation", "epoch": epoch, "step": epoch, "macro_f1": score, "official": score}
        | ({} if seconds is None else {"seconds": seconds * epoch / len(scores)})
        for epoch, score in enumerate(scores, 1)
    ]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_text(folder / "fold.json", "{}")


def test_table_of_folds_and_of_all_their_lesions(experiment):
    write_fold(experiment, "a", 0, 100.0, (0.2, 0.5, 0.5), correct=6)
    write_fold(experiment, "a", 1, 50.0, (0.6, 0.5, 0.4), correct=3)
    write_fold(experiment, "b", 0, None, (0.1,), correct=0)
    results = fold_results(experiment, ["a"], [0, 1])
    assert fold_table(results).splitlines() == [
        "model  fold  macro F1    AUC  best epoch     time",
        "a         0     1.000  1.000      2 of 3  0:01:40",
        "a         1     0.333  0.500      1 of 3  0:00:50",
        "a       all     0.733  0.750              0:02:30",
    ]
    (without_time,) = fold_results(experiment, ["b"], [0])
    assert without_time.cells == ("b", "0", "0.000", "0.000", "1 of 1", "")


def test_later_folds_take_as_long_as_finished_ones_of_their_model(experiment):
    order = ["a", "a", "b", "b"]
    estimate = later_seconds(experiment, order, 0)
    assert estimate(10.0) == 10 + 2 * 30  # b has three times the epochs
    assert later_seconds(experiment, order, 3)(10.0) == 0
    write_fold(experiment, "b", 0, 70.0, (0.1, 0.2), correct=3)
    assert later_seconds(experiment, order[:3], 0)(10.0) == 10 + 70
