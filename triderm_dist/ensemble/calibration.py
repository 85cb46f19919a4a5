"""Calibrate probabilities: temperature scaling, and logit adjustment for rare diagnoses.

NumPy and SciPy. `logits` (N, C); `labels` (N,) int64 without `UNLABELED`. A head is "softmax" (one diagnosis per
lesion) or "sigmoid" (each diagnosis independently).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from triderm_dist import metrics
from triderm_dist.predictions import OofTable
from triderm_dist.schema import ConfigError

TAUS: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Strengths of logit adjustment that are tried."""


def log_probabilities(logits: np.ndarray, head: str) -> np.ndarray:
    """Return (N, C) log p, computed without overflow; NaN rows stay NaN."""
    logits = np.asarray(logits, np.float64)
    if head == "softmax":
        centered = logits - logits.max(axis=1, keepdims=True)
        return centered - np.log(np.exp(centered).sum(axis=1, keepdims=True))
    if head == "sigmoid":
        with np.errstate(invalid="ignore"):  # NaN rows: the model has no prediction for the lesion
            return -np.logaddexp(0.0, -logits)
    raise ConfigError(f"head: {head!r} is not a head; known: softmax, sigmoid")


def probabilities_of(logits: np.ndarray, head: str) -> np.ndarray:
    """Return (N, C) probabilities of a head's logits."""
    return np.exp(log_probabilities(logits, head))


def member_probabilities(table: OofTable, model: str, temperature: float = 1.0) -> np.ndarray:
    """Return (N, C) probabilities of one of the table's models, its logits divided by the temperature."""
    return probabilities_of(table.logits[model] / temperature, table.heads[model])


def weighted_sum(weights: np.ndarray, members: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return (N, C): the sum of the (N, C) of M members, each times its weight (M,).

    Member by member: the last bit of a product by BLAS depends on the number of rows and their place in memory.
    """
    total = weights[0] * members[0]
    for weight, member in zip(weights[1:], members[1:], strict=True):
        total = total + weight * member
    return np.asarray(total)


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, head: str) -> float:
    """Return the mean over lesions of the cross-entropy (softmax), or of the sum over diagnoses of the binary
    cross-entropies (sigmoid).
    """
    rows = np.arange(len(labels))
    log_p = log_probabilities(logits, head)[rows, labels]
    if head == "softmax":
        return float(-log_p.mean())
    log_not_p = log_probabilities(-np.asarray(logits, np.float64), head)
    return float(-(log_p + log_not_p.sum(axis=1) - log_not_p[rows, labels]).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray, head: str) -> float:
    """Return T > 0 that minimizes the negative log-likelihood of logits / T (Guo et al. 2017), within [0.05, 20]."""
    from scipy.optimize import minimize_scalar

    result = minimize_scalar(
        lambda log_t: negative_log_likelihood(np.asarray(logits) / np.exp(log_t), labels, head),
        bounds=(np.log(0.05), np.log(20.0)),
        method="bounded",
    )
    return float(np.exp(result.x))


def class_prior(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the (C,) share of each diagnosis, with half a lesion added to each so that none is zero."""
    counts = np.bincount(labels, minlength=classes) + 0.5
    return counts / counts.sum()


def adjust_logits(logits: np.ndarray, prior: np.ndarray, tau: float) -> np.ndarray:
    """Return logits - tau * log(prior); tau = 1 removes the prior of the training set (Menon et al. 2021, eq. 9)."""
    return np.asarray(logits) - tau * np.log(prior)


def fit_tau(logits: np.ndarray, labels: np.ndarray, prior: np.ndarray) -> float:
    """Return the smallest of `TAUS` with the best argmax macro F1. Network and prior must not have seen the rows."""
    scores = [metrics.argmax_macro_f1(adjust_logits(logits, prior, tau), labels) for tau in TAUS]
    return float(TAUS[int(np.argmax(scores))])
