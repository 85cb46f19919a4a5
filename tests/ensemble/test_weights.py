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
    FitOptions,
    MacroF1Objective,
    NestedEstimate,
    best_network,
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


def test_candidates_have_a_weighting_of_each_member_the_mean_and_fitted_weights() -> None:
    labels = labels_of(400)
    parts = folds_of(labels)
    tables = {f"m{i}": table for i, table in enumerate(members_of(labels, [1.5, 1.5]))}
    candidates = fit_candidates(tables, labels, parts, FitOptions(QUICK))
    assert set(candidates) == {"m0", "m1", "mean", "fitted"}
    assert candidates["mean"].decisions.shape == (400, C) and candidates["mean"].decisions.dtype == bool
    one = fit_candidates({"m0": tables["m0"]}, labels, parts, FitOptions(QUICK))
    assert list(one) == ["m0"]


def test_seeds_of_a_model_share_its_weight() -> None:
    """The candidates are those of an ensemble in which the mean of its seeds stands for the model."""
    labels = labels_of(400)
    parts = folds_of(labels)
    a, a1, b, stack = members_of(labels, [1.5, 1.5, 1.0, 2.0])
    seeds = [("a", "a-s1")]
    each = fit_candidates({"a": a, "a-s1": a1, "b": b, "stack": stack}, labels, parts, FitOptions(QUICK, seeds=seeds))
    by_model = fit_candidates({"a": (a + a1) / 2, "b": b, "stack": stack}, labels, parts, FitOptions(QUICK))
    assert set(each) == {"a", "a-s1", "a-seeds", "b", "stack", "mean", "fitted"}
    np.testing.assert_allclose(each["a-seeds"].ensemble.weights, [1 / 2, 1 / 2, 0, 0])
    np.testing.assert_array_equal(each["a-seeds"].decisions, by_model["a"].decisions)
    np.testing.assert_allclose(each["mean"].ensemble.weights, [1 / 6, 1 / 6, 1 / 3, 1 / 3])
    for weighting in ("mean", "fitted"):
        one, reference = each[weighting].ensemble, by_model[weighting].ensemble
        first, *others = reference.weights
        np.testing.assert_allclose(one.weights, [first / 2, first / 2, *others], atol=1e-12)
        np.testing.assert_allclose(one.thresholds, reference.thresholds, atol=1e-6)
        np.testing.assert_array_equal(each[weighting].decisions, by_model[weighting].decisions)


def test_mean_of_seeds_stands_for_its_model() -> None:
    """Not the seed that is the best by luck."""
    scores = {"a": 0.4, "a-s1": 0.6, "a-seeds": 0.5, "b": 0.45, "stack": 0.7, "mean": 0.7, "fitted": 0.7}
    assert best_network(scores, [("a", "a-s1")]) == "a-seeds"
    assert best_network(scores | {"b": 0.55}, [("a", "a-s1")]) == "b"


@pytest.mark.parametrize(("lead", "expected"), [(-0.01, "mean"), (0.0, "mean"), (0.01, "fitted")])
def test_plain_mean_unless_fitted_weights_beat_it(lead: float, expected: str) -> None:
    assert choose_weighting({"a": 0.4, "b": 0.5, "mean": 0.45, "fitted": 0.5 + lead}) == expected
    assert choose_weighting({"a": 0.4}) == "a"


@pytest.mark.parametrize(("skills", "use", "expected"), [
    ([1.5, 1.5], "auto", "mean"),
    ([2.5, 0.3], "auto", "m0"),  # the mean is worse
    ([2.5, 0.3], "ensemble", "mean"),
    ([1.5, 1.5], "m1", "m1"),
])  # fmt: skip
def test_a_network_predicts_alone_unless_the_ensemble_beats_it(skills: list[float], use: str, expected: str) -> None:
    labels = labels_of(330)
    folds, tables = folds_of(labels), {f"m{i}": table for i, table in enumerate(members_of(labels, skills))}
    config = QUICK.model_copy(update={"use": use})
    nested = nested_estimate(
        lambda fold: tables, labels, folds, lambda fold: folds, FitOptions(config), groups=np.arange(330)
    )
    choice = nested.choice
    assert choice is not None and choice.over_stacker is None
    assert choice.used in {"mean": ("mean", "fitted")}.get(expected, (expected,))
    assert (choice.over_network.low > 0) == (skills == [1.5, 1.5])
    if expected in tables:  # the same in all folds
        assert set(nested.picks.values()) == {expected}
        np.testing.assert_array_equal(nested.decisions[CHOSEN], nested.decisions[expected])
        np.testing.assert_allclose(nested.probabilities, tables[expected])
    score = metrics.macro_f1(nested.decisions[CHOSEN], labels)
    if use == "auto":  # and in each fold by itself
        assert choice.nested_score == pytest.approx(score)


def test_best_of_many_networks_is_chosen_on_the_other_folds() -> None:
    """The best of ten equally good networks is so by luck: its own row is too good, and the estimate counts that."""
    labels = labels_of(330)
    folds, tables = folds_of(labels), {f"m{i}": table for i, table in enumerate(members_of(labels, [1.0] * 10))}
    for table in tables.values():  # nearly equal: no ensemble is better
        table[:] = 0.9 * tables["m0"] + 0.1 * table
    config = QUICK.model_copy(update={"use": "auto"})
    nested = nested_estimate(lambda fold: tables, labels, folds, lambda fold: folds, FitOptions(config))
    assert nested.choice is not None and nested.choice.used == nested.choice.network
    assert metrics.macro_f1(nested.decisions[CHOSEN], labels) <= nested.choice.scores[nested.choice.network]
    assert set(nested.picks.values()) <= set(tables) and len(set(nested.picks.values())) > 1


def test_labels_of_a_fold_do_not_affect_its_decisions() -> None:
    labels = labels_of(330)
    folds = folds_of(labels)
    tables = {f"m{i}": table for i, table in enumerate(members_of(labels, [1.5, 1.0]))}

    def nested(labels: np.ndarray) -> NestedEstimate:
        config = QUICK.model_copy(update={"use": "ensemble"})  # auto decides on all lesions between two of these
        return nested_estimate(lambda fold: tables, labels, folds, lambda fold: folds, FitOptions(config))

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
    nested = nested_estimate(lambda fold: tables, labels, folds, lambda fold: folds, FitOptions(QUICK))
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
    fitted = fit_candidates(tables, labels, folds_of(labels), FitOptions(QUICK, decision="argmax"))["fitted"].ensemble
    reached = metrics.argmax_macro_f1(fitted.combine(list(tables.values())), labels)
    assert reached >= max(metrics.argmax_macro_f1(table, labels) for table in tables.values())
    by_thresholds = fit_candidates(tables, labels, folds_of(labels), FitOptions(QUICK))["fitted"].ensemble
    assert reached > metrics.argmax_macro_f1(by_thresholds.combine(list(tables.values())), labels)
