"""Decision thresholds, one per diagnosis: exactly optimal for macro F1, regularized, or by logit adjustment.

Macro F1 with one threshold per diagnosis separates into C one-dimensional problems, each solved exactly by sorting.
The exact optimum does not generalize where a diagnosis has few lesions: with nine positives the best threshold is
noise. `regularized_thresholds` and `adjusted_thresholds` are less flexible, and `choose_thresholding` picks among them
on lesions that they were not fitted on.

Shapes: N lesions, C diagnoses, R resamples. A diagnosis is predicted where its probability is above its threshold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Literal, NamedTuple

import numpy as np

from triderm_dist import metrics
from triderm_dist.config import EnsembleConfig
from triderm_dist.ensemble import calibration

Rule = Literal["any", "at_least_one", "nearest"]
RULES: tuple[Rule, ...] = ("any", "at_least_one", "nearest")
"""any: every diagnosis above its threshold. at_least_one: if none is, the one with the largest p / threshold. nearest:
only the one with the largest p / threshold; with thresholds prior ** tau it is the argmax of logits - tau * log(prior).
"""
SHRINKAGES: tuple[float, ...] = (0.0, 10.0, 30.0, 100.0)
"""Values that shrinkage=auto tries, in positives."""
NEVER = 1.0
"""The threshold of a diagnosis that is never predicted."""
_RESAMPLES = 20
_EPSILON = 1e-6


class Thresholding(NamedTuple):
    """How thresholds are fitted and applied: a rule, and either a shrinkage or the tau of logit adjustment."""

    rule: Rule
    shrinkage: float | None
    tau: float | None = None

    def fit(self, probabilities: np.ndarray, labels: np.ndarray, resamples: Resamples) -> np.ndarray:
        """Return (C,) thresholds fitted on these rows."""
        if self.tau is not None:
            return adjusted_thresholds(labels, probabilities.shape[1], self.tau)
        return regularized_thresholds(probabilities, labels, self.shrinkage or 0.0, resamples)


def best_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (C,) thresholds that maximize the F1 of each diagnosis on these rows.

    Exact, in O(C N log N): the best threshold lies right below a lesion with the diagnosis, and after the k most
    probable of those F1 = 2 k / (lesions from there on + positives), by one sort and a binary search. Equal
    probabilities are never separated, and the threshold lies midway between two of them. `NEVER` for a diagnosis
    without a positive; a probability of 0 is never predicted.
    """
    columns = np.array(probabilities.T, np.float64, order="C")
    thresholds = np.full(len(columns), NEVER)
    for label, (scores, ascending) in enumerate(zip(columns, np.sort(columns, axis=1), strict=True)):
        positives = np.sort(scores[labels == label])
        reachable = positives[np.searchsorted(positives, 0.0, side="right") :][::-1]
        if not len(reachable):
            continue
        first = np.searchsorted(ascending, reachable)  # the first of equal scores: they are predicted together
        f1 = 2 * np.arange(1, len(reachable) + 1) / (len(ascending) - first + len(positives))
        best = f1.argmax()
        below = np.append(0.0, ascending)[first[best]]
        thresholds[label] = _midway(reachable[best], below)
    return thresholds


def regularized_thresholds(
    probabilities: np.ndarray, labels: np.ndarray, shrinkage: float, resamples: Resamples | None = None
) -> np.ndarray:
    """Return (C,) thresholds that generalize better than the exact ones; both steps work on logit(threshold).

    First each exact threshold is averaged over bootstrap resamples of the lesions, stratified by diagnosis. Then the
    threshold of a diagnosis with n positives is shrunk toward a pooled one with the weight of `shrinkage` positives:
    (n t + s pooled) / (n + s). The pooled threshold is linear in the log share of the diagnosis, because the best
    threshold of a calibrated score is half the best F1 (Lipton et al. 2014), which falls with the share.
    """
    return _shrink(_averaged_thresholds(probabilities, labels, resamples or Resamples()), labels, shrinkage)


def adjusted_thresholds(labels: np.ndarray, classes: int, tau: float) -> np.ndarray:
    """Return (C,) thresholds that make the rule `nearest` equal to logit adjustment with tau (Menon et al. 2021)."""
    power = calibration.class_prior(labels, classes) ** tau
    present = np.isin(np.arange(classes), labels)
    return np.where(present, 0.5 * power / power.max(), NEVER)


def decide(probabilities: np.ndarray, thresholds: np.ndarray, rule: Rule) -> np.ndarray:
    """Return (N, C) bool decisions under one of `RULES`."""
    above = probabilities > thresholds
    if rule == "any":
        return above
    if rule == "nearest":
        return _nearest(probabilities, thresholds)
    return above | (_nearest(probabilities, thresholds) & ~above.any(axis=1, keepdims=True))


def thresholdings(decision: str, config: EnsembleConfig) -> list[Thresholding]:
    """Return the thresholdings that are possible under a decision of `schema.DECISIONS`.

    argmax: only the most probable diagnosis. fitted: exactly one diagnosis, by fitted thresholds. threshold: each
    diagnosis whose probability is above its fitted threshold, hence also several or none.
    """
    adjusted = [Thresholding("nearest", None, tau) for tau in calibration.TAUS]
    if decision == "argmax":
        return [choice for choice in adjusted if choice.tau == 0]
    shrinkages = SHRINKAGES if config.shrinkage == "auto" else (float(config.shrinkage),)
    rules = RULES[:2] if decision == "threshold" else RULES[2:]
    return [Thresholding(rule, shrinkage) for shrinkage in shrinkages for rule in rules] + adjusted


def choose_thresholding(
    members: np.ndarray,
    fit_weights: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    parts: np.ndarray,
    choices: Sequence[Thresholding],
    resamples: Resamples,
) -> tuple[Thresholding, np.ndarray]:
    """Choose among thresholdings by macro F1 over held-out parts; the first wins ties.

    Returns its decisions (N, C) bool on the held-out parts as well.

    members: (M, N, C).  fit_weights: rows (N,) bool -> (M,) weights fitted on them.  parts: (N,); weights and
    thresholds are fitted without a part and judged on it.
    """
    classes = members.shape[2]
    decisions = {choice: np.zeros((len(labels), classes), bool) for choice in choices}
    for part in np.unique(parts):
        held_out = parts == part
        combined = calibration.weighted_sum(fit_weights(~held_out), members)
        if any(choice.tau is None for choice in choices):  # once for all shrinkages
            averaged = _averaged_thresholds(combined[~held_out], labels[~held_out], resamples)
        for choice, table in decisions.items():
            if choice.tau is not None:
                thresholds = adjusted_thresholds(labels[~held_out], classes, choice.tau)
            else:
                thresholds = _shrink(averaged, labels[~held_out], choice.shrinkage or 0.0)
            table[held_out] = decide(combined[held_out], thresholds, choice.rule)
    scores = {choice: metrics.macro_f1(table, labels) for choice, table in decisions.items()}
    best = max(scores, key=lambda choice: scores[choice])
    return best, decisions[best]


def _nearest(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return (N, C) bool, one True per row at the largest p / threshold, none where that is 0. `NEVER` is excluded."""
    ratio = np.where(thresholds < NEVER, probabilities / thresholds, 0.0)
    return metrics.argmax_decisions(ratio) & (ratio > 0)


def _weighted_thresholds(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (R, C) exact thresholds under R weightings (R, N) of the lesions, small whole numbers.

    With weights of 1 they equal `best_thresholds`, which needs no sums of weights and is three times as fast.
    """
    probabilities = np.asarray(probabilities, np.float64)
    thresholds = np.full((len(weights), probabilities.shape[1]), NEVER)
    for column, scores in enumerate(probabilities.T):
        truth = labels == column
        if not truth.any():
            continue
        order = np.argsort(-scores)
        order = order[: np.count_nonzero(scores)]
        if not len(order):
            continue
        sorted_scores = np.append(scores[order], 0.0)
        # A threshold can't separate equal scores. Among the sets of equal scores F1 is best at one that holds a lesion
        # with the diagnosis, or, where all of these weigh nothing, 0 from the first set on.
        ends = np.flatnonzero(sorted_scores[:-1] != sorted_scores[1:])
        found = np.flatnonzero(truth[order])
        ends = ends[np.unique(np.append(0, np.searchsorted(ends, found)))]
        up_to = np.searchsorted(found, ends, side="right")
        true_positives = _running_sums(np.take(weights, order[found], axis=1))[:, up_to]
        weight = np.take(weights, order[: ends[-1] + 1], axis=1)
        predicted = np.add.reduceat(weight, np.append(0, ends[:-1] + 1), axis=1, dtype=np.int32)
        np.cumsum(predicted, axis=1, out=predicted)
        positives = weights[:, truth].sum(axis=1, dtype=np.int32, keepdims=True)
        best = ends[(2 * true_positives / (predicted + positives)).argmax(axis=1)]
        thresholds[:, column] = _midway(sorted_scores[best], sorted_scores[best + 1])
    return thresholds


def _running_sums(weights: np.ndarray) -> np.ndarray:
    """Return (R, N + 1) int32, the sums of the first 0 to N of the weights (R, N)."""
    sums = np.zeros((len(weights), weights.shape[1] + 1), np.int32)
    np.cumsum(weights, axis=1, dtype=np.int32, out=sums[:, 1:])
    return sums


def _midway(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return the middle of two scores, strictly below the upper one even if they are adjacent floats."""
    middle = (above + below) / 2
    return np.where(middle < above, middle, below)


class Resamples:
    """Bootstrap resamples of some of the lesions, stratified by diagnosis; drawn once for the same lesions."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._drawn: dict[bytes, np.ndarray] = {}
        self._lock = Lock()

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Return (R, n) uint8, how often each of the lesions with these labels (n,) is drawn."""
        key = hashlib.sha256(labels.tobytes()).digest()
        with self._lock:
            if key not in self._drawn:
                self._drawn[key] = self._draw(labels)
            return self._drawn[key]

    def _draw(self, labels: np.ndarray) -> np.ndarray:
        generator = np.random.default_rng(self.seed)
        weights = np.zeros((_RESAMPLES, len(labels)), np.uint8)  # a lesion is drawn once on average, and never so often
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            weights[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_RESAMPLES)
        return weights


def _averaged_thresholds(probabilities: np.ndarray, labels: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Return the (C,) mean logit of the exact thresholds over bootstrap resamples; NaN without positives."""
    weights = resamples.of(labels)
    logits = _logit(_weighted_thresholds(probabilities, labels, weights)).mean(axis=0)
    logits[~np.isin(np.arange(probabilities.shape[1]), labels)] = np.nan
    return logits


def _shrink(logits: np.ndarray, labels: np.ndarray, shrinkage: float) -> np.ndarray:
    """Return (C,) thresholds from averaged logits (C,), shrunk toward the pooled line; `NEVER` for a NaN logit."""
    positives = np.bincount(labels, minlength=len(logits))
    has_positives = np.isfinite(logits)
    thresholds = np.full(len(logits), NEVER)
    n, shrunk = positives[has_positives], logits[has_positives]
    if shrinkage > 0 and has_positives.sum() > 1:
        line = np.stack([np.ones(len(n)), np.log(n / n.sum())], axis=1)
        weight = n[:, None] ** 0.25  # least squares weighted by the root of the positives
        slope = np.linalg.lstsq(line * weight, shrunk * weight[:, 0], rcond=None)[0]
        shrunk = (n * shrunk + shrinkage * (line @ slope)) / (n + shrinkage)
    thresholds[has_positives] = 1 / (1 + np.exp(-shrunk))
    return thresholds


def _logit(thresholds: np.ndarray) -> np.ndarray:
    clipped = np.clip(thresholds, _EPSILON, 1 - _EPSILON)
    return np.log(clipped / (1 - clipped))
