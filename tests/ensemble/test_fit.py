"""Stacking end to end: fitted out of fold, applied to a test set, refused if input is missing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.ensemble.conftest import experiment
from tests.synthetic_run import MODELS, folds_of, write_run
from triderm_dist import metrics, submission
from triderm_dist.ensemble import calibration
from triderm_dist.ensemble.fit import fit_ensemble
from triderm_dist.ensemble.predict import predict_ensemble
from triderm_dist.ensemble.run_files import read_nested
from triderm_dist.predictions import average_test, gather, read_oof, read_predictions, write_oof
from triderm_dist.schema import DIAGNOSES, DataError

C = len(DIAGNOSES)


def test_fit_and_predict_end_to_end(tmp_path: Path) -> None:
    labels = write_run(tmp_path)
    config = experiment(tmp_path)
    fit = fit_ensemble(tmp_path, config)
    assert [row.name for row in fit.rows] == [*MODELS, "stack", "plain mean", "fitted weights", "ensemble"]
    files = ("stack.ubj", "stack.json", "ensemble.json", "ensemble_oof.parquet", "oof_submission.csv")
    rows, read = {row.name: row for row in fit.rows}, read_oof(tmp_path / "oof.parquet")
    for model in MODELS:  # nothing is fitted, including temperatures
        plain = calibration.probabilities_of(read.logits[model], read.heads[model])
        assert rows[model].official == pytest.approx(metrics.official_macro_f1(plain, read.labels))
    assert rows["fitted weights"].official is rows["fitted weights"].argmax is rows["ensemble"].official is None
    rivals = [row.nested.value for name, row in rows.items() if name not in ("fitted weights", "ensemble")]
    assert fit.chosen == ("fitted" if rows["fitted weights"].nested.value > max(rivals) else "mean")
    first = {name: (tmp_path / name).read_bytes() for name in files}
    fit_ensemble(tmp_path, config)
    assert first == {name: (tmp_path / name).read_bytes() for name in files}
    assert not list(tmp_path.glob("*.part"))

    ids, table = submission.read_submission(tmp_path / "oof_submission.csv")
    place = {f"lesion-{row:04d}": label for row, label in enumerate(labels)}
    score = metrics.official_macro_f1(table, np.array([place[lesion] for lesion in ids]))
    assert score == pytest.approx(fit.rows[-1].nested.value)
    assert score > 0.6
    nested = read_nested(tmp_path / "ensemble_oof.parquet")
    np.testing.assert_array_equal(nested.decisions, table > 0.5)

    tests = average_test(read_predictions(path) for path in sorted(tmp_path.glob("*/fold-*/test.parquet")))
    on_test = metrics.macro_f1(predict_ensemble(tmp_path, tests).decisions, tests.labels)
    assert on_test > score - 0.1  # the mean of three fold models is at least as good as one
    with pytest.raises(DataError, match="needs predictions of model 'dual_cnn'"):
        predict_ensemble(tmp_path, replace(tests, models=("trimodal",)))


def test_labels_of_a_fold_do_not_affect_its_submission_rows(tmp_path: Path) -> None:
    """Changed labels in fold 0 do not change its rows through temperatures, stacker, weights or thresholds."""
    write_run(tmp_path)
    table = read_oof(tmp_path / "oof.parquet")
    inside = table.folds == 0
    poisoned = table.labels.copy()
    poisoned[inside] = np.roll(poisoned[inside], 1)
    submissions = []
    for labels in (table.labels, poisoned):
        write_oof(tmp_path / "oof.parquet", replace(table, labels=labels))
        fit_ensemble(tmp_path, experiment(tmp_path))
        ids, submitted = submission.read_submission(tmp_path / "oof_submission.csv")
        assert ids == table.lesion_ids.tolist()
        submissions.append(submitted)
    np.testing.assert_array_equal(submissions[0][inside], submissions[1][inside])
    assert (submissions[0][~inside] != submissions[1][~inside]).any()


def test_shuffled_labels_are_at_chance(tmp_path: Path) -> None:
    write_run(tmp_path, lesions=450, informed=False)
    fit = fit_ensemble(tmp_path, experiment(tmp_path))
    labels = read_oof(tmp_path / "oof.parquet").labels
    decisions = read_nested(tmp_path / "ensemble_oof.parquet").decisions
    chance = [metrics.macro_f1(decisions, np.random.default_rng(seed).permutation(labels)) for seed in range(50)]
    assert fit.rows[-1].nested.value < np.mean(chance) + 3 * np.std(chance)
    assert fit.rows[-1].nested.value < 0.16
    # Scored on the rows it was fitted on, noise appears better than chance.
    assert fit.rows[-1].fitted > fit.rows[-1].nested.value


def test_incomplete_folds_are_reported_and_a_single_fold_is_refused(tmp_path: Path) -> None:
    labels = write_run(tmp_path)
    ids, folds = [f"lesion-{row:04d}" for row in range(len(labels))], folds_of(labels)
    (tmp_path / "dual_cnn" / "fold-1" / "predictions.parquet").unlink()
    write_oof(tmp_path / "oof.parquet", gather(tmp_path, None, ids, labels, folds))
    fit = fit_ensemble(tmp_path, experiment(tmp_path, enabled=False))
    assert any(f"{(folds == 1).sum()} of {len(labels)} lesions are excluded" in note for note in fit.notes)
    assert not (tmp_path / "stack.ubj").exists()
    (tmp_path / "dual_cnn" / "fold-2" / "predictions.parquet").unlink()
    write_oof(tmp_path / "oof.parquet", gather(tmp_path, None, ids, labels, folds))
    with pytest.raises(DataError, match="lie in 1 fold, two are needed"):
        fit_ensemble(tmp_path, experiment(tmp_path))
