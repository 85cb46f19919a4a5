"""Metrics: F1 per diagnosis, macro F1 by the official rule and by argmax, and the metrics of the report.

NumPy only; intervals are in `triderm_dist.intervals`. Shapes: N lesions, C diagnoses. `labels` (N,) int64 index the C
diagnoses; rows with `UNLABELED` are excluded from F1. Decisions are a (N, C) bool table: True if a diagnosis is
predicted. The metrics of the report take labeled lesions only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from triderm_dist.schema import UNLABELED, DataError

CALIBRATION_BINS = 15

OFFICIAL_THRESHOLD = 0.5
"""The challenge counts a diagnosis as predicted where its probability is strictly above this."""


@dataclass(frozen=True)
class ClassCounts:
    """Lesions per diagnosis, all (C,) int64: predicted correctly, predicted, with the diagnosis. lesions: of any."""

    true_positives: np.ndarray
    predicted: np.ndarray
    positives: np.ndarray
    lesions: int

    @property
    def f1(self) -> np.ndarray:
        """(C,) F1 = 2 TP / (predicted + positives); NaN for a diagnosis without a lesion."""
        return np.where(self.positives > 0, ratio(2 * self.true_positives, self.predicted + self.positives), np.nan)

    @property
    def precision(self) -> np.ndarray:
        """(C,) share of the predictions that are correct; NaN where nothing is predicted."""
        return ratio(self.true_positives, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """(C,) share of the lesions that are predicted correctly; NaN for a diagnosis without a lesion."""
        return ratio(self.true_positives, self.positives)

    @property
    def specificity(self) -> np.ndarray:
        """(C,) share of the lesions without the diagnosis for which it is not predicted; NaN without such a lesion."""
        return ratio(self._true_negatives, self.lesions - self.positives)

    @property
    def negative_predictive_value(self) -> np.ndarray:
        """(C,) share of the lesions for which the diagnosis is not predicted that do not have it; NaN without one."""
        return ratio(self._true_negatives, self.lesions - self.predicted)

    @property
    def _true_negatives(self) -> np.ndarray:
        return self.lesions - self.predicted - self.positives + self.true_positives


def class_counts(decisions: np.ndarray, labels: np.ndarray) -> ClassCounts:
    """Count (N, C) bool decisions against the (N,) labels of labeled lesions. Raises DataError if the shapes do not
    match.
    """
    decisions, labels = np.asarray(decisions, bool), np.asarray(labels)
    if decisions.ndim != 2 or labels.shape != decisions.shape[:1]:
        raise DataError(f"decisions {decisions.shape} and labels {labels.shape} do not match: expected (N, C) and (N,)")
    known = labels != UNLABELED
    decisions, labels = decisions[known], labels[known]
    truth = labels[:, None] == np.arange(decisions.shape[1])
    return ClassCounts((decisions & truth).sum(axis=0), decisions.sum(axis=0), truth.sum(axis=0), len(labels))


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


def balanced_accuracy(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
    """Return mean recall where only the most probable diagnosis of each lesion is predicted."""
    return mean_recall(probabilities, labels, argmax_decisions(probabilities))


def mean_area_under_roc(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
    """Return the mean over diagnoses of `areas_under_roc`."""
    return _mean(areas_under_roc(probabilities, labels))


def mean_average_precision(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
    """Return the mean over diagnoses of `average_precisions`."""
    return _mean(average_precisions(probabilities, labels))


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
    """Return the mean of -log p of the label. p: shares of a lesion's sum, at least 2.2e-16."""
    of_label = shares(probabilities)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(of_label, np.finfo(np.float64).eps)).mean())


def brier_score(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
    """Return the mean over lesions of the squared distance between shares (C,) and the label's unit vector: 0 to 2."""
    p = shares(probabilities)
    of_label = p[np.arange(len(labels)), labels]
    return float(((p**2).sum(axis=1) - 2 * of_label + 1).mean())


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
    """Return the expected calibration error of the most probable diagnosis, in equal bins (Guo et al. 2017).

    The mean over lesions of the distance between the mean largest share and the accuracy in the lesion's bin.
    """
    p = shares(probabilities)
    largest, correct = p.max(axis=1), p.argmax(axis=1) == labels
    bins = np.searchsorted(np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1], largest)
    gaps = np.bincount(bins, largest - correct, CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


METRICS: dict[str, Metric] = {
    "mean_recall": Metric("Mean recall over diagnoses", mean_recall),
    "accuracy": Metric("Accuracy of the most probable diagnosis", accuracy),
    "balanced_accuracy": Metric("Balanced accuracy of the most probable diagnosis", balanced_accuracy),
    "auc": Metric("Area under the ROC curve, mean over diagnoses", mean_area_under_roc),
    "average_precision": Metric("Average precision, mean over diagnoses", mean_average_precision),
    "nll": Metric("Negative log-likelihood", negative_log_likelihood),
    "brier": Metric("Brier score, sum over diagnoses", brier_score),
    "calibration_error": Metric("Calibration error of the most probable diagnosis", calibration_error),
}
"""Metrics that the report shows in addition to macro F1. Plugins may add others."""


def areas_under_roc(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (C,) `area_under_roc` of each diagnosis against all others."""
    return np.array([area_under_roc(scores, labels == label) for label, scores in enumerate(probabilities.T)])


def average_precisions(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (C,) average precision of each diagnosis; NaN without a lesion.

    The mean over its lesions of the precision where all lesions with at least their probability are predicted.
    """
    result = np.full(probabilities.shape[1], np.nan)
    for label, scores in enumerate(probabilities.T):
        positives = np.sort(scores[labels == label])
        if len(positives):
            true_positives = len(positives) - np.searchsorted(positives, positives)
            result[label] = (true_positives / (len(scores) - np.searchsorted(np.sort(scores), positives))).mean()
    return result


def shares(probabilities: np.ndarray) -> np.ndarray:
    """Return (N, C) probabilities divided by their sum; equal shares where the sum is 0."""
    total = probabilities.sum(axis=1, keepdims=True)
    return np.divide(
        probabilities, total, out=np.full(probabilities.shape, 1 / probabilities.shape[1]), where=total > 0
    )


def area_under_roc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the area under the ROC curve of scores (N,) for `positive` (N,) bool; NaN without both kinds.

    It is the share of pairs of a positive and a negative in which the positive has the larger score; ties count half.
    """
    negatives, positives = np.sort(scores[~positive]), scores[positive]
    if not (len(negatives) and len(positives)):
        return float("nan")
    below = np.searchsorted(negatives, positives, "left") + np.searchsorted(negatives, positives, "right")
    return float(below.mean() / (2 * len(negatives)))


@dataclass(frozen=True)
class Ranking:
    """Lesions sorted by the score of one diagnosis: how many have at least each of the T distinct scores.

    thresholds: (T,) the scores, largest first.  true_positives, predicted: (T,) int64, lesions with the diagnosis and
    all lesions whose score is at least the threshold.  rank: (N,) the place of each lesion's score in `thresholds`.
    positive: (N,) bool.
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    positive: np.ndarray

    @staticmethod
    def of(scores: np.ndarray, positive: np.ndarray) -> Ranking:
        """Sort scores (N,) of lesions that are `positive` (N,) bool."""
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order]
        last = np.append(np.flatnonzero(np.diff(ordered)), len(scores) - 1)
        rank = np.empty(len(scores), np.int64)
        rank[order] = np.repeat(np.arange(len(last)), np.diff(last, prepend=-1))
        return Ranking(ordered[last], np.cumsum(positive[order])[last], last + 1, rank, positive)

    @property
    def positives(self) -> int:
        return int(self.true_positives[-1])

    @property
    def negatives(self) -> int:
        return len(self.positive) - self.positives

    @property
    def false_positives(self) -> np.ndarray:
        return self.predicted - self.true_positives

    @property
    def roc_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(T + 1,) each: 1 - specificity and sensitivity, from (0, 0) to (1, 1)."""
        rates = ratio(self.false_positives, self.negatives), ratio(self.true_positives, self.positives)
        return np.append(0.0, rates[0]), np.append(0.0, rates[1])

    @property
    def precision_recall_curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(T,) each: recall, which rises, and precision."""
        return ratio(self.true_positives, self.positives), self.true_positives / self.predicted

    @property
    def placements(self) -> np.ndarray:
        """(N,) share of the lesions of the other kind that the lesion is ranked correctly against; ties count half.

        Their mean over the positives, and over the negatives, is the area under the ROC curve (DeLong et al. 1988).
        NaN without both kinds.
        """
        both_kinds = {True: self.true_positives, False: self.false_positives}
        above = {kind: np.append(0, counts[:-1]) + counts for kind, counts in both_kinds.items()}  # twice, with ties
        of_positives = 1 - ratio(above[False], 2 * self.negatives)
        of_negatives = ratio(above[True], 2 * self.positives)
        return np.where(self.positive, of_positives[self.rank], of_negatives[self.rank])

    @property
    def area_under_roc(self) -> float:
        return float(self.placements[self.positive].mean()) if self.positives and self.negatives else float("nan")

    @property
    def average_precision(self) -> float:
        if not self.positives:
            return float("nan")
        found = np.diff(self.true_positives, prepend=0)
        return float((found * (self.true_positives / self.predicted)).sum() / self.positives)


def threshold_for(scores: np.ndarray, sensitivity: float) -> float:
    """Return the largest of the scores (P,) of positives that at least this share of them has or exceeds."""
    needed = max(int(np.ceil(sensitivity * len(scores) - 1e-9)), 1)
    return float(np.partition(scores, len(scores) - needed)[len(scores) - needed])


def net_benefit_of_lesions(scores: np.ndarray, positive: np.ndarray, threshold: float) -> np.ndarray:
    """Return (N,) what each lesion adds to the net benefit of treating lesions with a score of at least `threshold`.

    1 for a true positive, -t / (1 - t) for a false positive, 0 for a lesion that is not treated; the mean is the net
    benefit TP / N - FP / N * t / (1 - t) (Vickers and Elkin 2006). The score is the probability of being positive; a
    threshold t says that missing a positive is (1 - t) / t times as bad as treating a negative.
    """
    return np.where(scores >= threshold, np.where(positive, 1.0, -threshold / (1 - threshold)), 0.0)


def net_benefit_of_all(prevalence: float, threshold: float) -> float:
    """Return the net benefit of treating every lesion."""
    return prevalence - (1 - prevalence) * threshold / (1 - threshold)


def predictive_values(sensitivity: float, specificity: float, prevalence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positive and negative predictive value at other prevalences, by Bayes' rule; NaN where nothing is called.

    Assumes that sensitivity and specificity stay the same, that is, that only the shares of the two kinds change.
    """
    true_positives, false_negatives = prevalence * sensitivity, prevalence * (1 - sensitivity)
    true_negatives, false_positives = (1 - prevalence) * specificity, (1 - prevalence) * (1 - specificity)
    return (
        ratio(true_positives, true_positives + false_positives),
        ratio(true_negatives, true_negatives + false_negatives),
    )


@dataclass(frozen=True)
class Reliability:
    """Lesions in equal bins of the probability, all (B,): lesions, mean probability, and share that is positive; the
    latter two NaN in an empty bin. variance: of the number of positives if the probabilities were true.
    """

    lesions: np.ndarray
    probability: np.ndarray
    positive: np.ndarray
    variance: np.ndarray

    @staticmethod
    def of(probabilities: np.ndarray, positive: np.ndarray, bins: int = CALIBRATION_BINS) -> Reliability:
        """Sort probabilities (N,) of lesions that are `positive` (N,) bool into bins [low, high], the first wins."""
        bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probabilities)
        lesions = np.bincount(bin_of, minlength=bins)
        total, found, variance = (
            np.bincount(bin_of, weights, bins)
            for weights in (probabilities, positive, probabilities * (1 - probabilities))
        )
        return Reliability(lesions, ratio(total, lesions), ratio(found, lesions), variance)

    @property
    def error(self) -> float:
        """The expected calibration error: mean over lesions of the distance of the two shares (Naeini et al. 2015)."""
        used = self.lesions > 0
        gaps = np.abs(self.probability - self.positive)[used] * self.lesions[used]
        return float(gaps.sum() / self.lesions.sum())

    @property
    def error_by_chance(self) -> float:
        """The calibration error to expect of true probabilities with so many lesions: normal approximation per bin."""
        return float(np.sqrt(2 * self.variance / np.pi).sum() / self.lesions.sum())


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values, NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def ratio(part: np.ndarray, total: np.ndarray | int) -> np.ndarray:
    """Return part / total, NaN where total is 0."""
    return np.divide(part, total, out=np.full(np.broadcast(part, total).shape, np.nan), where=np.greater(total, 0))
