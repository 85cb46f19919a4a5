import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triderm_dist import metrics
from triderm_dist.ensemble import calibration
from triderm_dist.schema import ConfigError


def test_probabilities_equal_the_formulas_without_overflow() -> None:
    logits = np.random.default_rng(0).normal(scale=4, size=(50, 5))
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(calibration.probabilities_of(logits, "softmax"), softmax)
    np.testing.assert_allclose(calibration.probabilities_of(logits, "sigmoid"), 1 / (1 + np.exp(-logits)))
    for head in ("softmax", "sigmoid"):
        assert np.isfinite(calibration.probabilities_of(np.array([[1e4, -1e4]]), head)).all()
        assert np.isnan(calibration.probabilities_of(np.full((1, 2), np.nan), head)).all()
    with pytest.raises(ConfigError, match="softplus"):
        calibration.probabilities_of(logits, "softplus")


@settings(deadline=None)
@given(st.floats(0.2, 5), st.sampled_from(["softmax", "sigmoid"]))
def test_temperature_recovers_a_known_one(true: float, head: str) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(scale=2, size=(4000, 4))
    if head == "softmax":
        labels = (calibration.probabilities_of(logits, head).cumsum(axis=1) > generator.random((4000, 1))).argmax(
            axis=1
        )
    else:  # exactly one positive per row, drawn from the odds of the sigmoids: their distribution given one-hot labels
        labels = (calibration.probabilities_of(logits, "softmax").cumsum(axis=1) > generator.random((4000, 1))).argmax(
            axis=1
        )
        scaled = calibration.fit_temperature(logits, labels, head)
        assert calibration.fit_temperature(logits * true, labels, head) == pytest.approx(scaled * true, rel=1e-2)
        return
    assert calibration.fit_temperature(logits * true, labels, head) == pytest.approx(true, rel=0.1)


def test_temperature_improves_the_likelihood() -> None:
    generator = np.random.default_rng(3)
    logits, labels = generator.normal(scale=6, size=(300, 6)), generator.integers(0, 6, 300)
    for head in ("softmax", "sigmoid"):
        fitted = logits / calibration.fit_temperature(logits, labels, head)
        before, after = (calibration.negative_log_likelihood(x, labels, head) for x in (logits, fitted))
        assert after < before


def test_logit_adjustment_removes_the_prior() -> None:
    """With likelihoods plus log prior as logits, tau = 1 recovers the likelihoods."""
    generator = np.random.default_rng(0)
    labels = generator.choice(3, 6000, p=[0.9, 0.08, 0.02])
    prior = calibration.class_prior(labels, 3)
    likelihood = 2.0 * np.eye(3)[labels] + generator.normal(size=(6000, 3))
    adjusted = calibration.adjust_logits(likelihood + np.log(prior), prior, 1.0)
    np.testing.assert_allclose(adjusted, likelihood)
    tau = calibration.fit_tau(likelihood + 2 * np.log(prior), labels, prior)
    assert tau > 0.5
    gained = metrics.argmax_macro_f1(calibration.adjust_logits(likelihood + 2 * np.log(prior), prior, tau), labels)
    assert gained > metrics.argmax_macro_f1(likelihood + 2 * np.log(prior), labels)


def test_prior_of_an_absent_diagnosis_is_not_zero() -> None:
    prior = calibration.class_prior(np.array([0, 0, 1]), 3)
    assert prior.sum() == pytest.approx(1) and (prior > 0).all()


def test_weighted_sum_of_a_part_is_that_of_all_rows() -> None:
    generator = np.random.default_rng(0)
    members, weights = generator.random((5, 1000, 3)), generator.random(5)
    whole = calibration.weighted_sum(weights, members)
    np.testing.assert_allclose(whole, np.tensordot(weights, members, axes=1), rtol=1e-14)
    for part in (slice(0, 1), slice(3, 20), slice(500, 777)):
        np.testing.assert_array_equal(calibration.weighted_sum(weights, [each[part] for each in members]), whole[part])
