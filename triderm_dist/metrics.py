"""Scores: F1 a diagnosis, its macro mean by the official rule and by argmax, and intervals over lesions.

NumPy only. Shapes: N lesions, C diagnoses, R resamples. `labels` (N,) int64 index the C diagnoses; rows with
`UNLABELED` are left out of every score. A decision is a (N, C) bool table: True where a diagnosis is claimed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from triderm_dist.schema import UNLABELED, DataError

OFFICIAL_THRESHOLD = 0.5
"""The challenge claims a diagnosis where its probability is strictly above this."""


@dataclass(frozen=True)
class Interval:
    """A score with the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class ClassCounts:
    """For each of the C diagnoses: lesions claimed rightly, lesions claimed, lesions that have it; all (C,) int64."""

    true_positives: np.ndarray
    predicted: np.ndarray
    positives: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """(C,) F1 = 2 TP / (predicted + positives); NaN for a diagnosis that no lesion has."""
        return _f1(self.true_positives, self.predicted, self.positives)

    @property
    def precision(self) -> np.ndarray:
        """(C,) share of the claims that are right; NaN where nothing is claimed."""
        return _ratio(self.true_positives, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """(C,) share of the lesions that are found; NaN for a diagnosis that no lesion has."""
        return _ratio(self.true_positives, self.positives)


def class_counts(decisions: np.ndarray, labels: np.ndarray) -> ClassCounts:
    """Counts of a (N, C) bool table against (N,) labels. Raises DataError where their shapes differ."""
    decisions, labels = _labeled(np.asarray(decisions, bool), labels)
    truth = labels[:, None] == np.arange(decisions.shape[1])
    return ClassCounts((decisions & truth).sum(axis=0), decisions.sum(axis=0), truth.sum(axis=0))


def f1_per_class(decisions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(C,) F1 of each diagnosis, NaN where no lesion has it."""
    return class_counts(decisions, labels).f1


def macro_f1(decisions: np.ndarray, labels: np.ndarray) -> float:
    """Plain mean of F1 over the diagnoses that occur among the labels; NaN where there is no label at all.

    A diagnosis without a lesion has no F1 and is left out. (The official scorer crashes there; on complete ground
    truth the two agree.)
    """
    f1 = f1_per_class(decisions, labels)
    return float(np.nanmean(f1)) if np.isfinite(f1).any() else float("nan")


def official_macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The challenge's score: macro F1 with every diagnosis cut on its own at p > 0.5, strictly.

    Equals `isic-challenge-scoring` 5.8.0, `classification -m dice`, on (N, C) probabilities.
    """
    return macro_f1(np.asarray(probabilities) > OFFICIAL_THRESHOLD, labels)


def argmax_macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Macro F1 when the likeliest diagnosis of each lesion, and only it, is claimed. Takes logits as well."""
    return macro_f1(argmax_decisions(probabilities), labels)


def argmax_decisions(scores: np.ndarray) -> np.ndarray:
    """(N, C) bool with one True a row, at the first largest score."""
    scores = np.asarray(scores)
    return np.argmax(scores, axis=1)[:, None] == np.arange(scores.shape[1])


def bootstrap_f1(decisions: np.ndarray, labels: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """(R, C) F1 of each diagnosis under a bootstrap over lesions, stratified by diagnosis so that none vanishes.

    Lesions of one diagnosis with the same decisions are exchangeable: a resample is a multinomial draw over the
    distinct rows of each diagnosis, which is exact and needs no pass over the N lesions.
    """
    return _bootstrap([np.asarray(decisions, bool)], labels, resamples, seed)[0]


def bootstrap_interval(
    decisions: np.ndarray, labels: np.ndarray, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Macro F1 of the decisions with its percentile interval under `bootstrap_f1`."""
    return interval_of(macro_f1(decisions, labels), _macro(bootstrap_f1(decisions, labels, resamples, seed)), level)


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Macro F1 of `first` less that of `second`, both (N, C) bool; its interval is over the same resamples of both."""
    draws = _bootstrap([np.asarray(first, bool), np.asarray(second, bool)], labels, resamples, seed)
    return interval_of(macro_f1(first, labels) - macro_f1(second, labels), _macro(draws[0]) - _macro(draws[1]), level)


def recall_difference(first: ClassCounts, second: ClassCounts, kept: np.ndarray) -> Interval:
    """Mean recall over the kept diagnoses, (C,) bool, of `first` less that of `second`, on other lesions; 95% interval.

    Normal; the variance of each recall is taken at a share that four more lesions, as often found as those of both
    sides, pull to the common one (after Agresti and Caffo 2000, who pull to a half). So five of five do not count as
    certain, and a small side is not pulled away from a large one.
    """
    of, found = first.positives + second.positives, first.true_positives + second.true_positives
    common = (found + 0.5) / (of + 1)
    variance = np.zeros(len(kept))
    for counts in (first, second):
        near = (counts.true_positives + 4 * common) / (counts.positives + 4)
        variance += near * (1 - near) / np.maximum(counts.positives, 1)
    value = float((first.recall[kept] - second.recall[kept]).mean())
    width = float(1.959964 * np.sqrt(variance[kept].sum()) / np.count_nonzero(kept))
    return Interval(value, value - width, value + width)


def interval_of(value: float, draws: np.ndarray, level: float = 0.95) -> Interval:
    """`value` between the percentiles of its bootstrap draws (R,)."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]) if np.isfinite(draws).all() else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


def _bootstrap(tables: list[np.ndarray], labels: np.ndarray, resamples: int, seed: int) -> list[np.ndarray]:
    """F1 (R, C) of several decision tables under the same resamples."""
    decisions, labels = _labeled(np.concatenate(tables, axis=1), labels)
    classes = tables[0].shape[1]
    generator = np.random.default_rng(seed)
    predicted = np.zeros((resamples, decisions.shape[1]), np.int64)
    true_positives = np.zeros_like(predicted)
    for label in range(classes):
        rows = decisions[labels == label]
        if len(rows):
            patterns, frequency = np.unique(rows, axis=0, return_counts=True)
            counts = generator.multinomial(len(rows), frequency / len(rows), size=resamples) @ patterns.astype(np.int64)
            predicted += counts
            true_positives[:, label::classes] = counts[:, label::classes]
    positives = np.bincount(labels, minlength=classes)
    return [
        _f1(true_positives[:, start : start + classes], predicted[:, start : start + classes], positives)
        for start in range(0, decisions.shape[1], classes)
    ]


def _macro(f1: np.ndarray) -> np.ndarray:
    """(R,) mean over the diagnoses that occur."""
    occurs = np.isfinite(f1).all(axis=0)
    return f1[:, occurs].mean(axis=1) if occurs.any() else np.full(len(f1), np.nan)


def _labeled(decisions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(labels)
    if decisions.ndim != 2 or labels.shape != decisions.shape[:1]:
        raise DataError(f"decisions {decisions.shape} and labels {labels.shape} do not fit: (N, C) and (N,) are needed")
    known = labels != UNLABELED
    return decisions[known], labels[known]


def _f1(true_positives: np.ndarray, predicted: np.ndarray, positives: np.ndarray) -> np.ndarray:
    return np.where(positives > 0, _ratio(2 * true_positives, predicted + positives), np.nan)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)
