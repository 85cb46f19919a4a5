"""Metrics: F1 per diagnosis, macro F1 by the official rule and by argmax, and bootstrap intervals over lesions.

NumPy only. Shapes: N lesions, C diagnoses, R resamples. `labels` (N,) int64 index the C diagnoses; rows with
`UNLABELED` are excluded from every metric. Decisions are a (N, C) bool table: True where a diagnosis is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from triderm_dist.schema import UNLABELED, DataError

OFFICIAL_THRESHOLD = 0.5
"""The challenge counts a diagnosis as predicted where its probability is strictly above this."""


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class ClassCounts:
    """Lesions per diagnosis, all (C,) int64: predicted correctly, predicted, and with the diagnosis."""

    true_positives: np.ndarray
    predicted: np.ndarray
    positives: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """(C,) F1 = 2 TP / (predicted + positives); NaN for a diagnosis without a lesion."""
        return _f1(self.true_positives, self.predicted, self.positives)

    @property
    def precision(self) -> np.ndarray:
        """(C,) share of the predictions that are correct; NaN where nothing is predicted."""
        return _ratio(self.true_positives, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """(C,) share of the lesions that are predicted correctly; NaN for a diagnosis without a lesion."""
        return _ratio(self.true_positives, self.positives)


def class_counts(decisions: np.ndarray, labels: np.ndarray) -> ClassCounts:
    """Count (N, C) bool decisions against (N,) labels. Raises DataError where their shapes differ."""
    decisions, labels = _labeled(np.asarray(decisions, bool), labels)
    truth = labels[:, None] == np.arange(decisions.shape[1])
    return ClassCounts((decisions & truth).sum(axis=0), decisions.sum(axis=0), truth.sum(axis=0))


def f1_per_class(decisions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the (C,) F1 of each diagnosis, NaN without a lesion."""
    return class_counts(decisions, labels).f1


def macro_f1(decisions: np.ndarray, labels: np.ndarray) -> float:
    """Return the unweighted mean of F1 over the diagnoses that occur among the labels; NaN without any label.

    A diagnosis without a lesion has no F1 and is excluded. (The official scorer crashes there; on complete ground
    truth the two agree.)
    """
    f1 = f1_per_class(decisions, labels)
    return float(np.nanmean(f1)) if np.isfinite(f1).any() else float("nan")


def official_macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the score of the challenge: macro F1 where each diagnosis is predicted if p > 0.5.

    Equals `isic-challenge-scoring` 5.8.0, `classification -m dice`, on (N, C) probabilities.
    """
    return macro_f1(np.asarray(probabilities) > OFFICIAL_THRESHOLD, labels)


def argmax_macro_f1(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return macro F1 where only the most probable diagnosis of each lesion is predicted. Also takes logits."""
    return macro_f1(argmax_decisions(probabilities), labels)


def argmax_decisions(scores: np.ndarray) -> np.ndarray:
    """Return (N, C) bool with one True per row, at the first largest score."""
    scores = np.asarray(scores)
    return np.argmax(scores, axis=1)[:, None] == np.arange(scores.shape[1])


def bootstrap_f1(decisions: np.ndarray, labels: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Return (R, C) F1 under a bootstrap over lesions, stratified by diagnosis so that none vanishes.

    Lesions of one diagnosis with the same decisions are exchangeable: a resample is a multinomial draw over the
    distinct rows of each diagnosis, which is exact and needs no pass over the N lesions.
    """
    return _bootstrap([np.asarray(decisions, bool)], labels, resamples, seed)[0]


def bootstrap_interval(
    decisions: np.ndarray, labels: np.ndarray, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Return macro F1 with its percentile interval under `bootstrap_f1`."""
    return interval_of(macro_f1(decisions, labels), _macro(bootstrap_f1(decisions, labels, resamples, seed)), level)


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return macro F1 of `first` minus macro F1 of `second`, (N, C) bool, with an interval over shared resamples."""
    draws = _bootstrap([np.asarray(first, bool), np.asarray(second, bool)], labels, resamples, seed)
    return interval_of(macro_f1(first, labels) - macro_f1(second, labels), _macro(draws[0]) - _macro(draws[1]), level)


def recall_difference(first: ClassCounts, second: ClassCounts, kept: np.ndarray) -> Interval:
    """Return mean recall of `first` minus mean recall of `second`, on different lesions, with a 95% interval.

    kept: (C,) bool, the diagnoses to average over. The interval is normal. The variance of each recall is taken after
    adding four lesions with the recall of both sides together (Agresti and Caffo 2000 add them with a recall of a
    half). So five correct of five do not count as certain, and a small side is not pulled away from a large one.
    """
    positives, correct = first.positives + second.positives, first.true_positives + second.true_positives
    common = (correct + 0.5) / (positives + 1)
    variance = np.zeros(len(kept))
    for counts in (first, second):
        recall = (counts.true_positives + 4 * common) / (counts.positives + 4)
        variance += recall * (1 - recall) / np.maximum(counts.positives, 1)
    value = float((first.recall[kept] - second.recall[kept]).mean())
    width = float(1.959964 * np.sqrt(variance[kept].sum()) / np.count_nonzero(kept))
    return Interval(value, value - width, value + width)


def interval_of(value: float, draws: np.ndarray, level: float = 0.95) -> Interval:
    """Return `value` with the percentiles of its bootstrap draws (R,) as interval; NaN where a draw is not finite."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]) if np.isfinite(draws).all() else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


@dataclass(frozen=True)
class Metric:
    """A metric of the report: its title, and a function of probabilities (N, C), labels (N,), decisions (N, C) bool."""

    title: str
    function: Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def mean_recall(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
    """Return the mean over diagnoses of the share of lesions that the decisions find."""
    positives = np.bincount(labels)
    correct = np.bincount(labels, decisions[np.arange(len(labels)), labels])
    return float(np.mean(correct[positives > 0] / positives[positives > 0]))


def accuracy(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
    """Return the share of lesions whose most probable diagnosis is correct."""
    return float((probabilities.argmax(axis=1) == labels).mean())


METRICS: dict[str, Metric] = {
    "mean_recall": Metric("Mean recall over diagnoses", mean_recall),
    "accuracy": Metric("Accuracy of the most probable diagnosis", accuracy),
}
"""Metrics that the report shows in addition to macro F1. Plugins may add others."""


def malignancy_metrics(malignant: np.ndarray) -> dict[str, Metric]:
    """Return metrics of malignant against benign lesions, all of whose labels are of a known kind.

    malignant: (C,) float, 1 for malignant, 0 for benign, NaN for unknown. A lesion is called malignant where a
    malignant diagnosis is decided; its score for the area under the ROC curve is the share of the malignant diagnoses
    in the probability of those of a known kind.
    """
    is_malignant, is_known = malignant == 1, ~np.isnan(malignant)

    def sensitivity(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
        return float(decisions[is_malignant[labels]][:, is_malignant].any(axis=1).mean())

    def specificity(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
        return float(1 - decisions[~is_malignant[labels]][:, is_malignant].any(axis=1).mean())

    def auc(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
        known = probabilities[:, is_known].sum(axis=1)
        score = np.divide(probabilities[:, is_malignant].sum(axis=1), known, out=np.zeros_like(known), where=known > 0)
        return area_under_roc(score, is_malignant[labels])

    return {
        "sensitivity": Metric("Sensitivity: malignant lesions with a malignant decision", sensitivity),
        "specificity": Metric("Specificity: benign lesions without a malignant decision", specificity),
        "auc": Metric("Area under the ROC curve of the malignant share of the probability", auc),
    }


def area_under_roc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve of scores (N,) for `positive` (N,) bool; NaN without both kinds.

    It is the share of pairs of a positive and a negative in which the positive has the larger score; ties count half.
    """
    negatives, positives = np.sort(scores[~positive]), scores[positive]
    if not (len(negatives) and len(positives)):
        return float("nan")
    below = np.searchsorted(negatives, positives, "left") + np.searchsorted(negatives, positives, "right")
    return float(below.mean() / (2 * len(negatives)))


def bootstrap_metrics(
    probabilities: np.ndarray,
    labels: np.ndarray,
    decisions: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    metrics: Mapping[str, Metric] = METRICS,
) -> dict[str, Interval]:
    """Return each metric on labeled lesions, with its percentile interval over shared resamples of the lesions.

    Resamples are stratified by diagnosis, as in `bootstrap_f1`, but drawn lesion by lesion: a metric may depend on more
    than the decisions.
    """
    generator = np.random.default_rng(seed)
    strata = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    draws: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(resamples):
        rows = np.concatenate([generator.choice(stratum, len(stratum)) for stratum in strata])
        resample = probabilities[rows], labels[rows], decisions[rows]
        for name, metric in metrics.items():
            draws[name].append(metric.function(*resample))
    return {
        name: interval_of(metric.function(probabilities, labels, decisions), np.array(draws[name]))
        for name, metric in metrics.items()
    }


def _bootstrap(tables: list[np.ndarray], labels: np.ndarray, resamples: int, seed: int) -> list[np.ndarray]:
    """Return F1 (R, C) of several decision tables under the same resamples."""
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
    """Return the (R,) mean over the diagnoses that occur."""
    occurs = np.isfinite(f1).all(axis=0)
    return f1[:, occurs].mean(axis=1) if occurs.any() else np.full(len(f1), np.nan)


def _labeled(decisions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return decisions and labels of the labeled lesions. Raises DataError where their shapes do not match."""
    labels = np.asarray(labels)
    if decisions.ndim != 2 or labels.shape != decisions.shape[:1]:
        raise DataError(f"decisions {decisions.shape} and labels {labels.shape} do not match: expected (N, C) and (N,)")
    known = labels != UNLABELED
    return decisions[known], labels[known]


def _f1(true_positives: np.ndarray, predicted: np.ndarray, positives: np.ndarray) -> np.ndarray:
    return np.where(positives > 0, _ratio(2 * true_positives, predicted + positives), np.nan)


def _ratio(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.divide(part, total, out=np.full(np.broadcast(part, total).shape, np.nan), where=total > 0)
