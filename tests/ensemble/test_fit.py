from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.synthetic_run import MODELS, folds_of, labels_of, write_run
from triderm_dist import metrics, submission
from triderm_dist.config import EnsembleConfig, Experiment, StackConfig, load
from triderm_dist.ensemble import calibration
from triderm_dist.ensemble.artifact import Ensemble, read_json, with_temperatures
from triderm_dist.ensemble.fit import fit_final
from triderm_dist.ensemble.predict import predict_final
from triderm_dist.ensemble.run_files import read_nested
from triderm_dist.ensemble.thresholds import (
    NEVER,
    RULES,
    Rule,
    _thresholds,
    adjusted_thresholds,
    best_thresholds,
    decide,
    guarded_thresholds,
    lift,
)
from triderm_dist.ensemble.weights import (
    CHOSEN,
    NestedEstimate,
    _Objective,
    choose,
    fit_candidates,
    fit_weights,
    nested_estimate,
)
from triderm_dist.predictions import average_test, gather, read_oof, read_predictions, write_oof
from triderm_dist.schema import DIAGNOSES, DataError

C = len(DIAGNOSES)
QUICK = EnsembleConfig(bootstrap=100, rounds=10)


def brute_force(scores: np.ndarray, truth: np.ndarray) -> float:
    """The best F1 that any cut above 0 gives."""
    cuts = np.unique(np.concatenate([[0.0], scores]))
    f1 = [2 * (truth & (scores > cut)).sum() / ((scores > cut).sum() + truth.sum()) for cut in cuts]
    return max(f1)


@settings(deadline=None)
@given(
    arrays(np.float64, (25, 3), elements=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0]))),
    arrays(np.int64, 25, elements=st.integers(0, 2)),
)
def test_best_thresholds_reach_what_brute_force_reaches(scores: np.ndarray, labels: np.ndarray) -> None:
    thresholds = best_thresholds(scores, labels)
    for label in range(3):
        truth = labels == label
        if truth.any():
            claimed = scores[:, label] > thresholds[label]
            reached = 2 * (truth & claimed).sum() / (claimed.sum() + truth.sum())
            assert reached == pytest.approx(brute_force(scores[:, label], truth))
        else:
            assert thresholds[label] == NEVER
    assert ((thresholds >= 0) & (thresholds <= 1)).all()
    seen = [(scores[labels == label, label] > 0).any() for label in range(3)]  # elsewhere every cut has F1 = 0
    weighted = _thresholds(scores, labels, np.ones((2, 25)))
    np.testing.assert_array_equal(weighted[:, seen], [thresholds[seen], thresholds[seen]])


def test_a_threshold_lies_midway_between_two_scores() -> None:
    scores = np.array([[0.9], [0.6], [0.2], [0.1]])
    assert best_thresholds(scores, np.array([0, 0, 1, 1])) == pytest.approx(0.4)


def test_guarded_thresholds_hold_better_on_new_lesions() -> None:
    """Guarded cuts score higher on lesions they were not fitted on, exact ones on those they were fitted on."""
    gains, fitted = [], []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        labels = np.concatenate([labels_of(600, seed=seed), labels_of(600, seed=100 + seed)])
        logits = 1.5 * np.eye(C)[labels] + generator.normal(size=(1200, C)) + np.log(np.bincount(labels) / 1200)
        table = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        seen = np.arange(1200) < 600
        exact = best_thresholds(table[seen], labels[seen])
        guarded = guarded_thresholds(table[seen], labels[seen], shrinkage=30)
        for rows, into in ((~seen, gains), (seen, fitted)):
            scores = [metrics.macro_f1(table[rows] > cut, labels[rows]) for cut in (guarded, exact)]
            into.append(scores[0] - scores[1])
    assert np.mean(gains) > 2 * np.std(gains) / np.sqrt(len(gains))
    assert max(fitted) <= 0


def test_shrinkage_moves_rare_diagnoses_most() -> None:
    generator = np.random.default_rng(0)
    labels = labels_of(800)
    table = generator.random((800, C)) * 0.6 + 0.4 * np.eye(C)[labels] * generator.random((800, 1))
    free, pulled = (guarded_thresholds(table, labels, s) for s in (0.0, 1e9))
    some = guarded_thresholds(table, labels, 30.0)

    def logit(p: np.ndarray) -> np.ndarray:
        return np.log(p / (1 - p))

    moved = (logit(some) - logit(free)) / (logit(pulled) - logit(free))
    np.testing.assert_allclose(moved, 30 / (np.bincount(labels) + 30), rtol=1e-4)
    share = np.log(np.bincount(labels) / 800)  # all the way, they lie on one line over the log share
    slope = np.polyfit(share, logit(pulled), 1)
    np.testing.assert_allclose(np.polyval(slope, share), logit(pulled), atol=1e-4)


@settings(deadline=None)
@given(
    arrays(np.float64, (15, 4), elements=st.floats(0, 1)),
    arrays(np.float64, 4, elements=st.floats(0.001, 1) | st.just(NEVER)),
    st.sampled_from(RULES),
)
def test_lifted_probabilities_say_what_the_rule_decides(table: np.ndarray, cuts: np.ndarray, rule: Rule) -> None:
    decided, lifted = decide(table, cuts, rule), lift(table, cuts, rule)
    assert ((lifted >= 0) & (lifted <= 1)).all()
    np.testing.assert_array_equal(lifted > cuts, decided)
    np.testing.assert_array_equal(submission.map_to_half(lifted, cuts) > 0.5, decided)
    if rule == "at_least_one":
        possible = cuts < NEVER
        assert (decided.any(axis=1) == (table > 0)[:, possible].any(axis=1)).all()
        claims = table > cuts
        np.testing.assert_array_equal(decided[claims.any(axis=1)], claims[claims.any(axis=1)])
    if rule == "nearest":
        assert (decided.sum(axis=1) <= 1).all()


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.25])
def test_the_nearest_diagnosis_under_adjusted_thresholds_is_the_argmax_of_adjusted_logits(tau: float) -> None:
    labels = labels_of(300)
    logits = np.random.default_rng(0).normal(scale=2, size=(300, C))
    prior = calibration.class_prior(labels, C)
    decided = decide(calibration.probabilities_of(logits, "softmax"), adjusted_thresholds(labels, C, tau), "nearest")
    np.testing.assert_array_equal(decided, metrics.argmax_decisions(calibration.adjust_logits(logits, prior, tau)))


def test_logit_adjustment_is_chosen_where_it_is_right() -> None:
    """Likelihoods beside a steep prior, few lesions: thresholds a diagnosis are noise, one tau is not."""
    generator = np.random.default_rng(1)
    labels = np.repeat(np.arange(C), [400, 60, 12, 12, 12, 12, 12, 12, 12, 12, 12])
    prior = calibration.class_prior(labels, C)
    logits = 3.0 * np.eye(C)[labels] + generator.normal(size=(len(labels), C)) + 1.0 * np.log(prior)
    table = calibration.probabilities_of(logits, "softmax")
    candidates = fit_candidates({"m": table}, labels, np.arange(len(labels)) % 5, QUICK)
    fitted = candidates["m"].ensemble
    assert fitted.rule == "nearest" and fitted.tau is not None and fitted.shrinkage is None
    np.testing.assert_array_equal(fitted.final([table]) > fitted.thresholds, fitted.decide([table]))


def members_of(labels: np.ndarray, skills: list[float], seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    tables = []
    for skill in skills:
        logits = skill * np.eye(C)[labels] + generator.normal(size=(len(labels), C))
        tables.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    return tables


def test_the_fast_objective_equals_exact_thresholds() -> None:
    labels = labels_of(400)
    table = members_of(labels, [2.0])[0]
    exact = metrics.macro_f1(table > best_thresholds(table, labels), labels)
    objective = _Objective([table], labels)
    assert objective(objective.mix(np.ones(1))) == pytest.approx(exact, abs=1e-6)


def test_weights_are_on_the_simplex_and_beat_every_member_on_their_rows() -> None:
    labels = labels_of(500)
    tables = members_of(labels, [2.0, 2.0, 0.0])
    fitted = fit_weights(tables, labels)
    assert fitted.weights.sum() == pytest.approx(1) and (fitted.weights >= 0).all()
    assert fitted.weights[2] < 0.15 < min(fitted.weights[:2])  # one knows nothing, two are worth the same
    score = metrics.macro_f1(fitted.decide(tables), labels)
    for table in tables:
        assert score > metrics.macro_f1(table > best_thresholds(table, labels), labels)
    again = fit_weights(tables, labels)
    np.testing.assert_array_equal(fitted.weights, again.weights)


def test_the_plain_mean_is_taken_where_fitted_weights_do_not_win() -> None:
    labels = labels_of(400)
    parts = folds_of(labels)
    tables = {f"m{i}": table for i, table in enumerate(members_of(labels, [1.5, 1.5]))}
    candidates = fit_candidates(tables, labels, parts, QUICK)
    assert set(candidates) == {"m0", "m1", "mean", "fitted"}
    for lead, expected in ((-0.01, "mean"), (0.0, "mean"), (0.01, "fitted")):
        best = max(candidate.score for name, candidate in candidates.items() if name != "fitted")
        scores = {name: candidate.score for name, candidate in candidates.items()} | {"fitted": best + lead}
        assert choose(scores) == expected
    one = fit_candidates({"m0": tables["m0"]}, labels, parts, QUICK)
    assert list(one) == ["m0"] and choose({"m0": one["m0"].score}) == "m0"


def test_no_label_of_a_fold_reaches_the_decisions_on_it() -> None:
    labels = labels_of(330)
    folds = folds_of(labels)
    tables = {f"m{i}": table for i, table in enumerate(members_of(labels, [1.5, 1.0]))}

    def nested(labels: np.ndarray) -> NestedEstimate:
        return nested_estimate(lambda fold: tables, labels, folds, lambda fold: folds, QUICK)

    poisoned = labels.copy()
    poisoned[folds == 1] = np.roll(poisoned[folds == 1], 1)
    before, after = nested(labels), nested(poisoned)
    for way in before.decisions:
        np.testing.assert_array_equal(before.decisions[way][folds == 1], after.decisions[way][folds == 1])
    np.testing.assert_array_equal(before.final > before.thresholds, before.decisions[CHOSEN])


def test_noise_with_ten_members_is_not_above_chance() -> None:
    """Where weights and thresholds are scored on the rows they were fitted on, pure noise looks like skill."""
    labels = labels_of(600)
    folds = folds_of(labels, 5)
    tables = {f"m{i}": table for i, table in enumerate(members_of(labels, [0.0] * 10))}
    fitted = fit_weights(list(tables.values()), labels)
    chance = []
    for seed in range(20):
        shuffled = np.random.default_rng(seed).permutation(labels)
        chance.append(metrics.macro_f1(fitted.decide(list(tables.values())), shuffled))
    nested = nested_estimate(lambda fold: tables, labels, folds, lambda fold: folds, QUICK)
    honest = metrics.macro_f1(nested.decisions[CHOSEN], labels)
    assert metrics.macro_f1(fitted.decide(list(tables.values())), labels) > np.mean(chance) + 0.04
    assert honest < np.mean(chance) + 0.02


def test_an_ensemble_survives_its_file(tmp_path: Path) -> None:
    labels = labels_of(200)
    fitted = with_temperatures(fit_weights(members_of(labels, [1.0, 2.0]), labels, ["a", "b"]), {"b": 1.5})
    fitted.save(tmp_path / "ensemble.json", scores={"a": 0.5})
    loaded = Ensemble.load(tmp_path / "ensemble.json")
    np.testing.assert_array_equal(loaded.weights, fitted.weights)
    np.testing.assert_array_equal(loaded.thresholds, fitted.thresholds)
    assert loaded.temperatures.tolist() == [1.0, 1.5] and loaded.members == ("a", "b")
    assert read_json(tmp_path / "ensemble.json")["scores"] == {"a": 0.5}
    with pytest.raises(DataError, match="has 2 members, here are 1"):
        loaded.decide(members_of(labels, [1.0]))
    (tmp_path / "ensemble.json").write_text('{"format": "triderm-ensemble", "version": 99}')
    with pytest.raises(DataError, match="version 3"):
        Ensemble.load(tmp_path / "ensemble.json")


def experiment(folder: Path, **change) -> Experiment:
    quick = {"max_rounds": 14, "early_stopping": 4, "learning_rate": 0.4, "device": "cpu"}
    tree = {"output": str(folder), "ensemble": {"bootstrap": 100, "rounds": 8}, "stack": quick | change}
    return load(Experiment).model_copy(
        update={
            "output": str(folder),
            "ensemble": EnsembleConfig(**tree["ensemble"]),  # type: ignore[arg-type]
            "stack": StackConfig(**tree["stack"]),  # type: ignore[arg-type]
        }
    )


def test_the_whole_stage_and_its_use_on_a_test_set(tmp_path: Path) -> None:
    labels = write_run(tmp_path)
    config = experiment(tmp_path)
    fit = fit_final(tmp_path, config)
    assert [row.name for row in fit.rows] == [*MODELS, "stack", "plain mean", "fitted weights", "ensemble"]
    files = ("stack.ubj", "stack.json", "ensemble.json", "ensemble_oof.parquet", "oof_submission.csv")
    rows, read = {row.name: row for row in fit.rows}, read_oof(tmp_path / "oof.parquet")
    for model in MODELS:  # nothing fitted, no temperature either
        plain = calibration.probabilities_of(read.logits[model], read.heads[model])
        assert rows[model].official == pytest.approx(metrics.official_macro_f1(plain, read.labels))
    assert rows["fitted weights"].official is rows["fitted weights"].argmax is rows["ensemble"].official is None
    rivals = [row.nested.value for name, row in rows.items() if name not in ("fitted weights", "ensemble")]
    assert fit.chosen == ("fitted" if rows["fitted weights"].nested.value > max(rivals) else "mean")
    first = {name: (tmp_path / name).read_bytes() for name in files}
    fit_final(tmp_path, config)
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
    probabilities, thresholds = predict_final(tmp_path, tests)
    on_test = metrics.macro_f1(probabilities > thresholds, tests.labels)
    assert on_test > score - 0.1  # the mean of three fold models is no worse than one
    with pytest.raises(DataError, match="needs predictions of model 'dual_cnn'"):
        predict_final(tmp_path, replace(tests, models=("trimodal",)))


def test_no_label_of_a_fold_reaches_its_lines_in_the_submission(tmp_path: Path) -> None:
    """End to end, through temperature, stacker, weights and thresholds: change fold 0's labels, its lines stay."""
    write_run(tmp_path)
    table = read_oof(tmp_path / "oof.parquet")
    inside = table.folds == 0
    poisoned = table.labels.copy()
    poisoned[inside] = np.roll(poisoned[inside], 1)
    said = []
    for labels in (table.labels, poisoned):
        write_oof(tmp_path / "oof.parquet", replace(table, labels=labels))
        fit_final(tmp_path, experiment(tmp_path))
        ids, submitted = submission.read_submission(tmp_path / "oof_submission.csv")
        assert ids == table.lesion_ids.tolist()
        said.append(submitted)
    np.testing.assert_array_equal(said[0][inside], said[1][inside])
    assert (said[0][~inside] != said[1][~inside]).any()


def test_shuffled_labels_are_at_chance(tmp_path: Path) -> None:
    write_run(tmp_path, lesions=450, informed=False)
    fit = fit_final(tmp_path, experiment(tmp_path))
    labels = read_oof(tmp_path / "oof.parquet").labels
    decisions = read_nested(tmp_path / "ensemble_oof.parquet").decisions
    chance = [metrics.macro_f1(decisions, np.random.default_rng(seed).permutation(labels)) for seed in range(50)]
    assert fit.rows[-1].nested.value < np.mean(chance) + 3 * np.std(chance)
    assert fit.rows[-1].nested.value < 0.16
    assert fit.rows[-1].fitted > fit.rows[-1].nested.value  # fitted on its own rows, noise looks like skill


def test_a_run_that_is_partly_done_is_told_and_one_without_folds_refused(tmp_path: Path) -> None:
    labels = write_run(tmp_path)
    ids, folds = [f"lesion-{row:04d}" for row in range(len(labels))], folds_of(labels)
    (tmp_path / "dual_cnn" / "fold-1" / "predictions.parquet").unlink()
    write_oof(tmp_path / "oof.parquet", gather(tmp_path, None, ids, labels, folds))
    fit = fit_final(tmp_path, experiment(tmp_path, enabled=False))
    assert any(f"{(folds == 1).sum()} of {len(labels)} lesions are left out" in note for note in fit.notes)
    assert not (tmp_path / "stack.ubj").exists()
    (tmp_path / "dual_cnn" / "fold-2" / "predictions.parquet").unlink()
    write_oof(tmp_path / "oof.parquet", gather(tmp_path, None, ids, labels, folds))
    with pytest.raises(DataError, match="lie in 1 folds, two are needed"):
        fit_final(tmp_path, experiment(tmp_path))
