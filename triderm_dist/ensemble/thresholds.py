"""Decision thresholds: one per diagnosis, exactly optimal for macro F1, and the rules that apply them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from triderm_dist import metrics
from triderm_dist.config import EnsembleConfig
from triderm_dist.ensemble import calibration

Rule = Literal["any", "at_least_one", "nearest"]
RULES: tuple[Rule, ...] = ("any", "at_least_one", "nearest")
"""any: each diagnosis above its threshold. at_least_one: where none is, also the one that comes nearest, by p/t.
nearest: that one and no other, which with t = prior ** tau is the argmax of logits - tau * log(prior)."""
SHRINKAGES: tuple[float, ...] = (0.0, 10.0, 30.0, 100.0)
"""What shrinkage=auto chooses from, in positives."""


class Cut(NamedTuple):
    """How decisions come about: rule, and the shrinkage of its fitted thresholds or the tau of logit adjustment."""

    rule: Rule
    shrinkage: float | None
    tau: float | None = None


NEVER = 1.0
"""The threshold of a diagnosis that is never claimed."""
_RESAMPLES = 20
_EDGE = 1e-6


def best_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(C,) thresholds with the largest F1 of each diagnosis on these rows, claiming where p > threshold.

    Exact, O(C N log N): the best cut lies right below a lesion that has the diagnosis, and after the k likeliest of
    those F1 = 2 k / (lesions from there on + positives), by one sort and a binary search. Equal scores fall on the same
    side, and the threshold lies midway between two scores. `NEVER` for a diagnosis without a positive; a score of 0 is
    never claimed.
    """
    columns = np.array(probabilities.T, np.float64, order="C")
    found = np.full(len(columns), NEVER)
    for label, (scores, ascending) in enumerate(zip(columns, np.sort(columns, axis=1), strict=True)):
        own = np.sort(scores[labels == label])
        reachable = own[np.searchsorted(own, 0.0, side="right") :][::-1]
        if not len(reachable):
            continue
        first = np.searchsorted(ascending, reachable)  # of equal scores the first: what is claimed with them
        f1 = 2 * np.arange(1, len(reachable) + 1) / (len(ascending) - first + len(own))
        best = f1.argmax()
        below = np.append(0.0, ascending)[first[best]]
        found[label] = _midway(reachable[best], below)
    return found


def guarded_thresholds(probabilities: np.ndarray, labels: np.ndarray, shrinkage: float, seed: int = 0) -> np.ndarray:
    """(C,) thresholds made to hold on new lesions, by two means, both on the scale of logit(threshold).

    First the exact threshold is averaged over bootstrap resamples of the lesions, stratified by diagnosis. Then
    that of a diagnosis with n positives is pulled to the pooled cut with the weight of `shrinkage` positives:
    (n t + s pooled) / (n + s). The pooled cut is a line over the log share of the diagnoses, since the best cut of a
    calibrated score is half the best F1 (Lipton et al. 2014) and that falls with the share.
    """
    return _shrink(_averaged_thresholds(probabilities, labels, seed), labels, shrinkage)


def adjusted_thresholds(labels: np.ndarray, classes: int, tau: float) -> np.ndarray:
    """(C,) thresholds for the rule `nearest` that stand for logit adjustment with tau (Menon et al. 2021)."""
    power = calibration.class_prior(labels, classes) ** tau
    present = np.isin(np.arange(classes), labels)
    return np.where(present, 0.5 * power / power.max(), NEVER)


def decide(probabilities: np.ndarray, thresholds: np.ndarray, rule: Rule) -> np.ndarray:
    """(N, C) bool decisions under one of `RULES`."""
    claimed = probabilities > thresholds
    if rule == "any":
        return claimed
    if rule == "nearest":
        return _nearest(probabilities, thresholds)
    return claimed | (_nearest(probabilities, thresholds) & ~claimed.any(axis=1, keepdims=True))


def lift(probabilities: np.ndarray, thresholds: np.ndarray, rule: Rule) -> np.ndarray:
    """(N, C) probabilities such that `lifted > thresholds` is `decide(probabilities, thresholds, rule)`.

    Under at_least_one a row without a claim, under nearest every row, is scaled as a whole until its nearest diagnosis
    just passes.
    """
    if rule == "any":
        return probabilities
    lifted = np.array(probabilities, np.float64)
    largest = _ratio(lifted, thresholds).max(axis=1, keepdims=True)
    short = largest[:, 0] > 0
    if rule == "at_least_one":
        short &= ~(lifted > thresholds).any(axis=1)
    with np.errstate(over="ignore"):  # a row of denormal numbers
        scaled = np.minimum(lifted[short] / largest[short], thresholds)
    just_above = np.maximum(thresholds + _EDGE * (1 - thresholds), np.nextafter(thresholds, 2))
    lifted[short] = np.where(_nearest(lifted[short], thresholds), just_above, scaled)
    return lifted


def _choose_cut(
    stacked: np.ndarray,
    weigh: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    parts: np.ndarray,
    config: EnsembleConfig,
    seed: int,
) -> tuple[Cut, float]:
    """The best cut and its macro F1 over the parts; of equal ones the first."""
    shrinkages = SHRINKAGES if config.shrinkage == "auto" else (float(config.shrinkage),)
    cuts = [Cut(rule, shrinkage) for shrinkage in shrinkages for rule in RULES[:2]]
    cuts += [Cut("nearest", None, tau) for tau in calibration.TAUS]
    classes = stacked.shape[2]
    tables = {cut: np.zeros((len(labels), classes), bool) for cut in cuts}
    for part in np.unique(parts):
        judge = parts == part
        combined = np.tensordot(weigh(~judge), stacked, axes=1)
        averaged = _averaged_thresholds(combined[~judge], labels[~judge], seed)
        for cut, table in tables.items():
            if cut.tau is not None:
                thresholds = adjusted_thresholds(labels[~judge], classes, cut.tau)
            else:
                thresholds = _shrink(averaged, labels[~judge], cut.shrinkage or 0.0)
            table[judge] = decide(combined[judge], thresholds, cut.rule)
    scores = {cut: metrics.macro_f1(table, labels) for cut, table in tables.items()}
    best = max(scores, key=lambda cut: scores[cut])
    return best, scores[best]


def _nearest(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(N, C) bool, one True a row at the largest p/t; none where that is 0. What is `NEVER` claimed is no candidate."""
    ratio = _ratio(probabilities, thresholds)
    return metrics.argmax_decisions(ratio) & (ratio > 0)


def _ratio(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return np.where(thresholds < NEVER, probabilities / thresholds, 0.0)


def _thresholds(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R, C) exact thresholds under R weightings (R, N) of the lesions, each with the same weight a diagnosis.

    With weights of 1 they are `best_thresholds`, which needs no sums over all lesions and is three times as fast.
    """
    probabilities = np.asarray(probabilities, np.float64)
    found = np.full((len(weights), probabilities.shape[1]), NEVER)
    for column, scores in enumerate(probabilities.T):
        truth = labels == column
        if not truth.any():
            continue
        positives = weights[:, truth].sum(axis=1, keepdims=True)
        order = np.argsort(-scores)
        order = order[: np.count_nonzero(scores)]
        if not len(order):
            continue
        sorted_scores = np.append(scores[order], 0.0)
        weight = weights[:, order]
        true_positives = np.cumsum(weight * truth[order], axis=1)
        f1 = 2 * true_positives / (np.cumsum(weight, axis=1) + positives)
        f1[:, sorted_scores[:-1] == sorted_scores[1:]] = -1.0  # a cut can't separate equal scores
        cut = f1.argmax(axis=1)
        found[:, column] = _midway(sorted_scores[cut], sorted_scores[cut + 1])
    return found


def _midway(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Between two scores, and below the upper one also where they are neighbors among the floats."""
    middle = (above + below) / 2
    return np.where(middle < above, middle, below)


def _averaged_thresholds(probabilities: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """(C,) logit of the exact thresholds, mean over bootstrap resamples; NaN for a diagnosis without positives."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((_RESAMPLES, len(labels)))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        weights[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_RESAMPLES)
    logits = _logit(_thresholds(probabilities, labels, weights)).mean(axis=0)
    logits[~np.isin(np.arange(probabilities.shape[1]), labels)] = np.nan
    return logits


def _shrink(logits: np.ndarray, labels: np.ndarray, shrinkage: float) -> np.ndarray:
    """(C,) thresholds from averaged logits (C,), pulled to the pooled line; `NEVER` where the logit is NaN."""
    positives = np.bincount(labels, minlength=len(logits))
    known = np.isfinite(logits)
    thresholds = np.full(len(logits), NEVER)
    n, own = positives[known], logits[known]
    if shrinkage > 0 and known.sum() > 1:
        line = np.stack([np.ones(len(n)), np.log(n / n.sum())], axis=1)
        weight = n[:, None] ** 0.25  # least squares weighted by the root of the positives
        slope = np.linalg.lstsq(line * weight, own * weight[:, 0], rcond=None)[0]
        own = (n * own + shrinkage * (line @ slope)) / (n + shrinkage)
    thresholds[known] = 1 / (1 + np.exp(-own))
    return thresholds


def _logit(thresholds: np.ndarray) -> np.ndarray:
    inside = np.clip(thresholds, _EDGE, 1 - _EDGE)
    return np.log(inside / (1 - inside))
