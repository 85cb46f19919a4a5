"""Decision thresholds: exact, regularized, and adjusted for class frequencies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.ensemble.conftest import QUICK, members_of
from tests.synthetic_run import labels_of
from triderm_dist import metrics
from triderm_dist.ensemble import calibration, sampling
from triderm_dist.ensemble.thresholds import (
    NEVER,
    RULES,
    Resamples,
    Rule,
    Thresholding,
    _weighted_thresholds,
    adjusted_thresholds,
    best_thresholds,
    decide,
    regularized_thresholds,
    thresholdings,
)
from triderm_dist.ensemble.weights import FitOptions, fit_candidates
from triderm_dist.schema import DIAGNOSES

C = len(DIAGNOSES)


def brute_force(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the best F1 over all thresholds >= 0."""
    thresholds = np.unique(np.concatenate([[0.0], scores]))
    f1 = [
        2 * (truth & (scores > threshold)).sum() / ((scores > threshold).sum() + truth.sum())
        for threshold in thresholds
    ]
    return max(f1)


@settings(deadline=None)
@given(
    arrays(np.float64, (25, 3), elements=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.25, 0.5, 1.0]))),
    arrays(np.int64, 25, elements=st.integers(0, 2)),
)
def test_best_thresholds_equal_brute_force(scores: np.ndarray, labels: np.ndarray) -> None:
    thresholds = best_thresholds(scores, labels)
    for label in range(3):
        truth = labels == label
        if truth.any():
            predicted = scores[:, label] > thresholds[label]
            reached = 2 * (truth & predicted).sum() / (predicted.sum() + truth.sum())
            assert reached == pytest.approx(brute_force(scores[:, label], truth))
        else:
            assert thresholds[label] == NEVER
    assert ((thresholds >= 0) & (thresholds <= 1)).all()
    seen = [
        (scores[labels == label, label] > 0).any() for label in range(3)
    ]  # without a positive, every threshold has F1 = 0
    weighted = _weighted_thresholds(scores, labels, np.ones((2, 25), np.uint8))
    np.testing.assert_array_equal(weighted[:, seen], [thresholds[seen], thresholds[seen]])


def test_thresholds_under_weights_are_those_of_repeated_lesions() -> None:
    for seed in range(30):
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, 3, 40)
        scores = generator.integers(0, 2 + seed, (40, 3)) / (1 + seed)  # ties, zeros and ones
        weights = generator.integers(0, 3, (4, 40)).astype(np.uint8)
        for row, thresholds in zip(weights, _weighted_thresholds(scores, labels, weights), strict=True):
            repeated, of = np.repeat(scores, row, axis=0), np.repeat(labels, row)
            for label in np.flatnonzero(np.bincount(labels, minlength=3)):
                truth, predicted = of == label, repeated[:, label] > thresholds[label]
                reached = 2 * (truth & predicted).sum() / max((predicted.sum() + truth.sum()), 1)
                if truth.any():
                    assert reached == pytest.approx(brute_force(repeated[:, label], truth))


def test_thresholds_lie_midway_between_two_scores() -> None:
    scores = np.array([[0.9], [0.6], [0.2], [0.1]])
    assert best_thresholds(scores, np.array([0, 0, 1, 1])) == pytest.approx(0.4)


def test_regularized_thresholds_generalize_better() -> None:
    """Regularized thresholds score higher on new lesions, exact thresholds on the lesions they were fitted on."""
    gains, fitted = [], []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        labels = np.concatenate([labels_of(600, seed=seed), labels_of(600, seed=100 + seed)])
        logits = 1.5 * np.eye(C)[labels] + generator.normal(size=(1200, C)) + np.log(np.bincount(labels) / 1200)
        table = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        seen = np.arange(1200) < 600
        exact = best_thresholds(table[seen], labels[seen])
        regularized = regularized_thresholds(table[seen], labels[seen], shrinkage=30)
        for rows, into in ((~seen, gains), (seen, fitted)):
            scores = [metrics.macro_f1(table[rows] > threshold, labels[rows]) for threshold in (regularized, exact)]
            into.append(scores[0] - scores[1])
    assert np.mean(gains) > 2 * np.std(gains) / np.sqrt(len(gains))
    assert max(fitted) <= 0


def test_shrinkage_is_strongest_for_rare_diagnoses() -> None:
    generator = np.random.default_rng(0)
    labels = labels_of(800)
    table = generator.random((800, C)) * 0.6 + 0.4 * np.eye(C)[labels] * generator.random((800, 1))
    unshrunk, shrunk = (regularized_thresholds(table, labels, s) for s in (0.0, 1e9))
    some = regularized_thresholds(table, labels, 30.0)

    def logit(p: np.ndarray) -> np.ndarray:
        return np.log(p / (1 - p))

    moved = (logit(some) - logit(unshrunk)) / (logit(shrunk) - logit(unshrunk))
    np.testing.assert_allclose(moved, 30 / (np.bincount(labels) + 30), rtol=1e-4)
    share = np.log(np.bincount(labels) / 800)  # fully shrunk thresholds are linear in the log frequency
    slope = np.polyfit(share, logit(shrunk), 1)
    np.testing.assert_allclose(np.polyval(slope, share), logit(shrunk), atol=1e-4)


@settings(deadline=None)
@given(
    arrays(np.float64, (15, 4), elements=st.floats(0, 1)),
    arrays(np.float64, 4, elements=st.floats(0.001, 1) | st.just(NEVER)),
    st.sampled_from(RULES),
)
def test_rules_decide_as_described(table: np.ndarray, thresholds: np.ndarray, rule: Rule) -> None:
    decided = decide(table, thresholds, rule)
    assert not decided[table == 0].any()
    if rule == "any":
        np.testing.assert_array_equal(decided, table > thresholds)
    if rule == "at_least_one":
        possible = thresholds < NEVER
        assert (decided.any(axis=1) == (table > 0)[:, possible].any(axis=1)).all()
        above = table > thresholds
        np.testing.assert_array_equal(decided[above.any(axis=1)], above[above.any(axis=1)])
    if rule == "nearest":
        assert (decided.sum(axis=1) <= 1).all()


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.25])
def test_adjusted_thresholds_equal_logit_adjustment(tau: float) -> None:
    labels = labels_of(300)
    logits = np.random.default_rng(0).normal(scale=2, size=(300, C))
    prior = calibration.class_prior(labels, C)
    decided = decide(calibration.probabilities_of(logits, "softmax"), adjusted_thresholds(labels, C, tau), "nearest")
    np.testing.assert_array_equal(decided, metrics.argmax_decisions(calibration.adjust_logits(logits, prior, tau)))


def test_logit_adjustment_is_chosen_for_a_biased_prior() -> None:
    """With few lesions, thresholds per diagnosis overfit; a single tau does not."""
    generator = np.random.default_rng(1)
    labels = np.repeat(np.arange(C), [400, 60, 12, 12, 12, 12, 12, 12, 12, 12, 12])
    prior = calibration.class_prior(labels, C)
    logits = 3.0 * np.eye(C)[labels] + generator.normal(size=(len(labels), C)) + 1.0 * np.log(prior)
    table = calibration.probabilities_of(logits, "softmax")
    candidates = fit_candidates({"m": table}, labels, np.arange(len(labels)) % 5, FitOptions(QUICK))
    fitted = candidates["m"].ensemble
    assert fitted.rule == "nearest" and fitted.tau is not None and fitted.shrinkage is None


def test_thresholdings_of_a_decision() -> None:
    assert thresholdings("argmax", QUICK) == [Thresholding("nearest", None, 0.0)]
    fitted, any_number = thresholdings("fitted", QUICK), thresholdings("threshold", QUICK)
    assert {choice.rule for choice in fitted} == {"nearest"} and Thresholding("nearest", None, 0.0) in fitted
    assert {choice.rule for choice in any_number} == set(RULES)
    assert len(any_number) == 2 * 4 + 7 and len(fitted) == 4 + 7


@pytest.mark.parametrize("decision", ["argmax", "fitted"])
def test_decisions_for_one_diagnosis_per_lesion(decision: str) -> None:
    labels = labels_of(300)
    tables = {f"m{i}": table for i, table in enumerate(members_of(labels, [1.5, 1.0]))}
    for candidate in fit_candidates(tables, labels, np.arange(300) % 3, FitOptions(QUICK, decision=decision)).values():
        decided = candidate.ensemble.decide(list(tables.values()))
        assert (decided.sum(axis=1) == 1).all()
        if decision == "argmax":
            combined = candidate.ensemble.combine(list(tables.values()))
            np.testing.assert_array_equal(decided, metrics.argmax_decisions(combined))


def test_a_large_set_is_searched_on_a_sample_and_its_thresholds_fitted_on_all_lesions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = labels_of(3000)
    members = dict(zip("ab", members_of(labels, [1.0, 2.0]), strict=True))
    parts = np.arange(len(labels)) % 5
    whole = fit_candidates(members, labels, parts, FitOptions(QUICK))
    monkeypatch.setattr(sampling, "SEARCH_LESIONS", 600)
    sampled = fit_candidates(members, labels, parts, FitOptions(QUICK))
    for name, candidate in sampled.items():
        counts = np.bincount(labels[candidate.rows], minlength=C)
        np.testing.assert_array_equal(counts, np.ceil(np.bincount(labels, minlength=C) / 5))
        assert candidate.decisions.shape == (counts.sum(), C)
        assert whole[name].rows.all()
        ensemble = candidate.ensemble
        choice = Thresholding(ensemble.rule, ensemble.shrinkage, ensemble.tau)
        combined = np.tensordot(ensemble.weights, np.stack(list(members.values())), axes=1)
        np.testing.assert_allclose(ensemble.thresholds, choice.fit(combined, labels, Resamples()), rtol=1e-12)
