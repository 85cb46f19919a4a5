"""Weights of ensemble members and the nested estimate of their score."""

import numpy as np
import pytest

from tests.ensemble.conftest import QUICK, members_of
from tests.synthetic_run import folds_of, labels_of
from triderm_dist import metrics
from triderm_dist.ensemble.run_files import CHOSEN
from triderm_dist.ensemble.thresholds import best_thresholds
from triderm_dist.ensemble.weights import (
    ArgmaxObjective,
    MacroF1Objective,
    NestedEstimate,
    choose_weighting,
    fit_candidates,
    fit_weights,
    nested_estimate,
)
from triderm_dist.schema import DIAGNOSES

C = len(DIAGNOSES)


def test_objective_equals_macro_f1_at_exact_thresholds() -> None:
    labels = labels_of(400)
    table = members_of(labels, [2.0])[0]
    exact = metrics.macro_f1(table > best_thresholds(table, labels), labels)
    objective = MacroF1Objective([table], labels)
    assert objective(objective.mix(np.ones(1))) == pytest.approx(exact, abs=1e-6)


def test_fitted_weights_are_on_the_simplex_and_beat_every_member() -> None:
    labels = labels_of(500)
    tables = members_of(labels, [2.0, 2.0, 0.0])
    fitted = fit_weights(tables, labels)
    assert fitted.weights.sum() == pytest.approx(1) and (fitted.weights >= 0).all()
    assert fitted.weights[2] < 0.15 < min(fitted.weights[:2])  # the third member is random, the others are equally good
    score = metrics.macro_f1(fitted.decide(tables), labels)
    for table in tables:
        assert score > metrics.macro_f1(table > best_thresholds(table, labels), labels)
    again = fit_weights(tables, labels)
    np.testing.assert_array_equal(fitted.weights, again.weights)


def test_plain_mean_unless_fitted_weights_beat_it() -> None:
    labels = labels_of(400)
    parts = folds_of(labels)
    tables = {f"m{i}": table for i, table in enumerate(members_of(labels, [1.5, 1.5]))}
    candidates = fit_candidates(tables, labels, parts, QUICK)
    assert set(candidates) == {"m0", "m1", "mean", "fitted"}
    for lead, expected in ((-0.01, "mean"), (0.0, "mean"), (0.01, "fitted")):
        best = max(candidate.score for name, candidate in candidates.items() if name != "fitted")
        scores = {name: candidate.score for name, candidate in candidates.items()} | {"fitted": best + lead}
        assert choose_weighting(scores) == expected
    one = fit_candidates({"m0": tables["m0"]}, labels, parts, QUICK)
    assert list(one) == ["m0"] and choose_weighting({"m0": one["m0"].score}) == "m0"


def test_labels_of_a_fold_do_not_affect_its_decisions() -> None:
    labels = labels_of(330)
    folds = folds_of(labels)
    tables = {f"m{i}": table for i, table in enumerate(members_of(labels, [1.5, 1.0]))}

    def nested(labels: np.ndarray) -> NestedEstimate:
        return nested_estimate(lambda fold: tables, labels, folds, lambda fold: folds, QUICK)

    poisoned = labels.copy()
    poisoned[folds == 1] = np.roll(poisoned[folds == 1], 1)
    before, after = nested(labels), nested(poisoned)
    for weighting in before.decisions:
        np.testing.assert_array_equal(before.decisions[weighting][folds == 1], after.decisions[weighting][folds == 1])


def test_nested_estimate_of_noise_is_at_chance() -> None:
    """Scored on the rows that weights and thresholds were fitted on, pure noise would appear better than chance."""
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


def test_weights_under_argmax_are_fitted_for_argmax_macro_f1() -> None:
    labels = labels_of(400)
    tables = {f"m{i}": table for i, table in enumerate(members_of(labels, [1.5, 1.2, 0.0]))}
    objective = ArgmaxObjective(list(tables.values()), labels)
    weights = np.array([0.5, 0.3, 0.2])
    mixed = np.tensordot(weights, np.stack(list(tables.values())), axes=1)
    assert objective(objective.mix(weights)) == pytest.approx(metrics.argmax_macro_f1(mixed, labels), abs=0.01)
    fitted = fit_candidates(tables, labels, folds_of(labels), QUICK, decision="argmax")["fitted"].ensemble
    reached = metrics.argmax_macro_f1(fitted.combine(list(tables.values())), labels)
    assert reached >= max(metrics.argmax_macro_f1(table, labels) for table in tables.values())
    by_thresholds = fit_candidates(tables, labels, folds_of(labels), QUICK)["fitted"].ensemble
    assert reached > metrics.argmax_macro_f1(by_thresholds.combine(list(tables.values())), labels)
