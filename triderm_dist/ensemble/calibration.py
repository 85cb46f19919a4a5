"""From logits to probabilities that mean what they say: temperature, and logit adjustment for rare diagnoses.

NumPy and SciPy. `logits` (N, C); `labels` (N,) int64 without `UNLABELED`. A head is "softmax" (one diagnosis a
lesion) or "sigmoid" (each diagnosis on its own).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from triderm_dist import metrics
from triderm_dist.schema import ConfigError

TAUS: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Strengths of logit adjustment that `fit_tau` tries."""


def log_probabilities(logits: np.ndarray, head: str) -> np.ndarray:
    """(N, C) log p, computed without overflow; NaN rows stay NaN."""
    logits = np.asarray(logits, np.float64)
    if head == "softmax":
        centered = logits - logits.max(axis=1, keepdims=True)
        return centered - np.log(np.exp(centered).sum(axis=1, keepdims=True))
    if head == "sigmoid":
        with np.errstate(invalid="ignore"):  # NaN rows: no model has spoken
            return -np.logaddexp(0.0, -logits)
    raise ConfigError(f"head {head!r} is unknown; there are softmax and sigmoid")


def probabilities_of(logits: np.ndarray, head: str) -> np.ndarray:
    """(N, C) probabilities of a head's logits."""
    return np.exp(log_probabilities(logits, head))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, head: str) -> float:
    """Mean over lesions: cross-entropy of the softmax, or the sum over diagnoses of the binary cross-entropies."""
    rows = np.arange(len(labels))
    right = log_probabilities(logits, head)[rows, labels]
    if head == "softmax":
        return float(-right.mean())
    wrong = log_probabilities(-np.asarray(logits, np.float64), head)
    return float(-(right + wrong.sum(axis=1) - wrong[rows, labels]).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray, head: str) -> float:
    """T > 0 such that logits / T has the least negative log-likelihood (Guo et al. 2017); sought in [0.05, 20]."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: negative_log_likelihood(np.asarray(logits) / np.exp(log_t), labels, head),
        bounds=(np.log(0.05), np.log(20.0)),
        method="bounded",
    )
    return float(np.exp(found.x))


def class_prior(labels: np.ndarray, classes: int) -> np.ndarray:
    """(C,) share of each diagnosis, with half a lesion added to each so that none is zero."""
    counts = np.bincount(labels, minlength=classes) + 0.5
    return counts / counts.sum()


def adjust_logits(logits: np.ndarray, prior: np.ndarray, tau: float) -> np.ndarray:
    """logits - tau * log(prior): tau = 1 undoes the prior of the training set (Menon et al. 2021, equation 9)."""
    return np.asarray(logits) - tau * np.log(prior)


def fit_tau(logits: np.ndarray, labels: np.ndarray, prior: np.ndarray, taus: Sequence[float] = TAUS) -> float:
    """The smallest of `taus` with the best argmax macro F1. Give it rows that neither network nor prior has seen."""
    scores = [metrics.argmax_macro_f1(adjust_logits(logits, prior, tau), labels) for tau in taus]
    return float(taus[int(np.argmax(scores))])
