"""Discrimination of the ensemble: rates, rankings, operating points and net benefit, of its nested out-of-fold rows.

Shapes: N lesions, n of them count for a target, C diagnoses, K folds, P prevalences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.ensemble.run_files import NestedRows
from triderm_dist.intervals import Interval, Rates
from triderm_dist.schema import Task

MALIGNANT = "malignant"
"""The name of the target malignant against benign."""

SENSITIVITIES = (0.90, 0.95)
"""Sensitivities of the operating points."""

MIN_POSITIVES = 20
"""A malignant diagnosis with fewer lesions has no operating point and no decision curve."""

RISKS = (0.02, 0.05, 0.10, 0.20, 0.30, 0.50)
"""Threshold probabilities of the table of net benefit."""

PREVALENCES = (0.01, 0.02, 0.05, 0.10, 0.20, 0.50)
"""Prevalences of the table of predictive values."""


@dataclass(frozen=True)
class Target:
    """A yes/no question about lesions: one diagnosis against all others, or malignant against benign.

    scores: (n,) probability of yes.  positive: (n,) bool, the truth.  decided: (n,) bool, the ensemble's decision.
    folds: (n,).  groups: (n,), None where each lesion is its own.  malignant: whether yes means a malignant lesion.
    """

    name: str
    title: str
    scores: np.ndarray
    positive: np.ndarray
    decided: np.ndarray
    folds: np.ndarray
    groups: np.ndarray | None
    malignant: bool

    @cached_property
    def ranking(self) -> metrics.Ranking:
        return metrics.Ranking.of(self.scores, self.positive)

    @property
    def prevalence(self) -> float:
        return float(self.positive.mean())

    @cached_property
    def area_under_roc(self) -> Interval:
        return intervals.area_under_roc(self.ranking, self.groups)

    @cached_property
    def average_precision(self) -> Interval:
        return intervals.average_precision(self.ranking, self.groups)

    @cached_property
    def rates(self) -> Rates:
        """Rates of the ensemble's decisions."""
        return intervals.rates(self.decided, self.positive, self.groups)


@dataclass(frozen=True)
class OperatingPoint:
    """Decisions at a threshold that reached a sensitivity on the other folds.

    aim: that sensitivity.  thresholds: (K,), one per fold.  threshold: of all lesions, for new ones.  decided: (n,)
    bool: a score of at least the threshold.  rates: of these decisions.
    """

    target: Target
    aim: float
    thresholds: np.ndarray
    threshold: float
    decided: np.ndarray
    rates: Rates

    @property
    def called(self) -> int:
        """Lesions that are called positive."""
        return int(self.decided.sum())

    @property
    def missed(self) -> int:
        """Positive lesions that are not called."""
        return int((self.target.positive & ~self.decided).sum())

    def predictive_values(self, prevalences: Sequence[float]) -> tuple[list[Interval], list[Interval]]:
        """Return positive and negative predictive values at other prevalences (P,)."""
        return intervals.predictive_values(self.decided, self.target.positive, prevalences, self.target.groups)


@dataclass(frozen=True)
class NetBenefit:
    """Net benefit of treating lesions whose probability is at least `risk`, per lesion.

    gain: minus that of the better of treating all and none.
    """

    risk: float
    of_ensemble: Interval
    of_all: float
    gain: Interval


class Discrimination:
    """What the ensemble distinguishes; each part is computed once, on first use."""

    def __init__(self, task: Task, rows: NestedRows, groups: np.ndarray | None) -> None:
        self.task, self.rows, self.groups = task, rows, groups

    @cached_property
    def diagnoses(self) -> list[Target]:
        """Each diagnosis against all others; a title that several share is followed by the name."""
        rows = self.rows
        titles = [each.title or each.name for each in self.task.diagnoses]
        return [
            Target(
                name=diagnosis.name,
                title=title if titles.count(title) == 1 else f"{title} ({diagnosis.name})",
                scores=rows.probabilities[:, index],
                positive=rows.labels == index,
                decided=rows.decisions[:, index],
                folds=rows.folds,
                groups=self.groups,
                malignant=diagnosis.malignant is True,
            )
            for index, (diagnosis, title) in enumerate(zip(self.task.diagnoses, titles, strict=True))
        ]

    @cached_property
    def kinds(self) -> np.ndarray:
        """(C,) 1 for malignant diagnoses, 0 for benign ones, NaN where the task does not say."""
        return np.array([np.nan if each.malignant is None else float(each.malignant) for each in self.task.diagnoses])

    @cached_property
    def malignancy(self) -> Target | None:
        """Malignant against benign lesions, by the diagnoses whose kind the task states; None unless both kinds occur.

        Its score is the share of the malignant diagnoses in the probability of those of a known kind; a lesion is
        decided to be malignant where a malignant diagnosis is.
        """
        of_label = self.kinds[self.rows.labels]
        if not {0.0, 1.0} <= set(np.unique(of_label)):
            return None
        counted = ~np.isnan(of_label)
        return Target(
            name=MALIGNANT,
            title="malignant against benign",
            scores=malignant_share(self.rows.probabilities[counted], self.kinds),
            positive=of_label[counted] == 1,
            decided=self.rows.decisions[counted][:, self.kinds == 1].any(axis=1),
            folds=self.rows.folds[counted],
            groups=None if self.groups is None else self.groups[counted],
            malignant=True,
        )

    @property
    def unknown_kind(self) -> int:
        """Lesions that malignant against benign leaves out."""
        return len(self.rows.labels) - len(self.malignancy.positive) if self.malignancy else 0

    @property
    def targets(self) -> list[Target]:
        """Malignant against benign where there is that, and every diagnosis that some lesion has."""
        return [*filter(None, [self.malignancy]), *(each for each in self.diagnoses if each.positive.any())]

    @property
    def to_find(self) -> list[Target]:
        """The targets that mean a malignant lesion, with at least `MIN_POSITIVES` lesions."""
        return [each for each in self.targets if each.malignant and each.positive.sum() >= MIN_POSITIVES]

    @cached_property
    def rates(self) -> list[Rates]:
        """Rates of the decisions for each diagnosis."""
        return intervals.rates_per_class(self.rows.decisions, self.rows.labels, self.groups)

    @cached_property
    def operating_points(self) -> list[OperatingPoint]:
        """The operating points of the targets to find, by target and sensitivity."""
        points = [operating_point(target, aim) for target in self.to_find for aim in SENSITIVITIES]
        return [point for point in points if point is not None]

    @cached_property
    def net_benefits(self) -> list[tuple[Target, list[NetBenefit]]]:
        """Net benefit at `RISKS` of each target to find."""
        return [(target, [net_benefit(target, risk) for risk in RISKS]) for target in self.to_find]

    @cached_property
    def macro_f1(self) -> dict[str, Interval]:
        """Macro F1 of the nested probabilities by p > 0.5, and by argmax unless the ensemble's decisions are those."""
        rows = self.rows
        rules = {"each diagnosis with p > 0.5": rows.probabilities > metrics.OFFICIAL_THRESHOLD}
        if self.task.decision != "argmax":
            rules["most probable diagnosis"] = metrics.argmax_decisions(rows.probabilities)
        return {name: intervals.macro_f1(table, rows.labels, self.groups) for name, table in rules.items()}


def malignant_share(probabilities: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return (N,) the share of the malignant diagnoses in the probability (N, C) of those of a known kind, 0 where that
    is 0. kinds: see `Discrimination.kinds`.
    """
    known = probabilities[:, ~np.isnan(kinds)].sum(axis=1)
    malignant = probabilities[:, kinds == 1].sum(axis=1)
    return np.divide(malignant, known, out=np.zeros_like(known), where=known > 0)


def operating_point(target: Target, sensitivity: float) -> OperatingPoint | None:
    """Choose for each fold the largest threshold that reaches a sensitivity on the other folds, and apply it.

    None where the other folds of some fold hold no positive lesion.
    """
    decided, thresholds = np.zeros(len(target.scores), bool), []
    for fold in np.unique(target.folds):
        inside = target.folds == fold
        positives = target.scores[~inside & target.positive]
        if not len(positives):
            return None
        thresholds.append(metrics.threshold_for(positives, sensitivity))
        decided[inside] = target.scores[inside] >= thresholds[-1]
    return OperatingPoint(
        target=target,
        aim=sensitivity,
        thresholds=np.array(thresholds),
        threshold=metrics.threshold_for(target.scores[target.positive], sensitivity),
        decided=decided,
        rates=intervals.rates(decided, target.positive, target.groups),
    )


def net_benefit(target: Target, risk: float) -> NetBenefit:
    """Return the net benefit of treating at a threshold probability, and what it gains, with their intervals."""
    of_lesions = metrics.net_benefit_of_lesions(target.scores, target.positive, risk)
    everyone = metrics.net_benefit_of_lesions(np.ones(len(of_lesions)), target.positive, risk)
    of_all = metrics.net_benefit_of_all(target.prevalence, risk)
    other = everyone if of_all > 0 else np.zeros(len(of_lesions))
    return NetBenefit(
        risk=risk,
        of_ensemble=intervals.mean(of_lesions, target.groups),
        of_all=of_all,
        gain=intervals.mean(of_lesions - other, target.groups),
    )


def net_benefit_curve(ranking: metrics.Ranking, risks: np.ndarray) -> np.ndarray:
    """Return the net benefit of treating at each of some threshold probabilities."""
    last = np.searchsorted(-ranking.thresholds, -risks, side="right")
    true_positives = np.append(0, ranking.true_positives)[last]
    false_positives = np.append(0, ranking.false_positives)[last]
    return np.asarray((true_positives - false_positives * risks / (1 - risks)) / len(ranking.positive))


def thinned(x: np.ndarray, y: np.ndarray, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Return a curve with about so many points, evenly spaced along it; both ends stay."""
    if len(x) <= points:
        return x, y
    length = np.append(0.0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], points)).clip(max=len(x) - 1))
    kept = np.union1d(kept, [0, len(x) - 1])
    return x[kept], y[kept]
