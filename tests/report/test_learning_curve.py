"""The learning curve by the number of training lesions, and its extrapolation."""

import numpy as np
import pytest

from triderm_dist import metrics
from triderm_dist.report.learning_curve import fit_learning_curve

SIZES = (250.0, 500.0, 1000.0)


def decisions_with(errors: tuple[float, ...], lesions: int = 4000) -> tuple[list[np.ndarray], np.ndarray]:
    """Return decisions of two diagnoses with these shares of errors, and the labels."""
    generator = np.random.default_rng(0)
    labels = np.arange(lesions) % 2
    noise = generator.random(lesions)
    return [np.eye(2, dtype=bool)[np.where(noise < error, 1 - labels, labels)] for error in errors], labels


def test_power_law_is_recovered_and_extrapolated() -> None:
    exact = tuple(2.0 * size**-0.4 for size in SIZES)
    decisions, labels = decisions_with(exact)
    curve = fit_learning_curve("net", SIZES, decisions, labels, np.arange(len(labels)).astype(str), 200)
    scores = [metrics.macro_f1(each, labels) for each in decisions]
    slope, intercept = np.polyfit(np.log(SIZES), np.log([1 - score for score in scores]), 1)
    assert curve.exponent == pytest.approx(-slope, abs=1e-12)
    assert curve.scale == pytest.approx(np.exp(intercept), rel=1e-12)
    assert curve.exponent == pytest.approx(0.4, abs=0.1)
    assert curve.expected.value == pytest.approx(1 - 2.0 * 2000**-0.4, abs=0.01)
    assert curve.expected.low < curve.expected.value < curve.expected.high
    assert curve.gain.value == pytest.approx(float(curve.law(np.array(2000.0)) - curve.law(np.array(1000.0))))
    assert curve.helps and curve.half.value == pytest.approx(scores[2] - scores[1])


def test_a_flat_curve_promises_nothing() -> None:
    decisions, labels = decisions_with((0.2, 0.2, 0.2))
    shuffled = [
        each[np.random.default_rng(seed).permutation(len(labels) // 2) * 2] for seed, each in enumerate(decisions)
    ]
    for each, part in zip(decisions, shuffled, strict=True):
        each[::2] = part
    curve = fit_learning_curve("net", SIZES, decisions, labels, np.arange(len(labels)).astype(str), 200)
    assert not curve.helps and abs(curve.gain.value) < 0.01


def test_without_errors_the_curve_is_finite() -> None:
    decisions, labels = decisions_with((0.1, 0.0, 0.0), 200)
    curve = fit_learning_curve("net", SIZES, decisions, labels, np.arange(len(labels)).astype(str), 50)
    assert curve.expected.value <= 1 and np.isfinite(curve.exponent)
