"""Nested scores for the benchmarks on real lesions: thresholds of each fold fitted on the other folds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.config import Experiment
from triderm_dist.ensemble.nested_stack import inner_folds
from triderm_dist.ensemble.run_files import CHOSEN
from triderm_dist.ensemble.weights import FitOptions, nested_estimate
from triderm_dist.intervals import Interval
from triderm_dist.predictions import OofTable


def nested_decisions(probabilities: np.ndarray, table: OofTable, config: Experiment) -> np.ndarray:
    """Return (N, C) decisions with thresholds fitted on the other folds, by the same rules as the ensemble's."""
    estimate = nested_estimate(
        lambda fold: {"method": probabilities},
        table.labels,
        table.folds,
        lambda fold: inner_folds(table.labels, table.groups, table.folds, table.folds != fold, config.seed),
        FitOptions(config.ensemble, config.seed, table.task.decision),
    )
    return estimate.decisions[CHOSEN]


@dataclass(frozen=True)
class SeedScores:
    """Scores of S trainings that differ in their seed, each a list of S numbers; decisions: S of (N, C).

    without_rarest: nested macro F1 without the diagnosis of the fewest lesions.  area: mean area under the ROC curve.
    loss: negative log-likelihood.
    """

    decisions: list[np.ndarray]
    nested: list[float]
    without_rarest: list[float]
    argmax: list[float]
    area: list[float]
    loss: list[float]

    @classmethod
    def of(cls, probabilities: Sequence[np.ndarray], table: OofTable, config: Experiment) -> SeedScores:
        """Score the probabilities (N, C) of each training. config: how thresholds are fitted."""
        labels, rarest = table.labels, rarest_diagnosis(table)
        decisions = [nested_decisions(p, table, config) for p in probabilities]
        both = list(zip(probabilities, decisions, strict=True))
        return cls(
            decisions,
            nested=[metrics.macro_f1(each, labels) for each in decisions],
            without_rarest=[float(np.delete(metrics.f1_per_class(each, labels), rarest).mean()) for each in decisions],
            argmax=[metrics.argmax_macro_f1(p, labels) for p in probabilities],
            area=[metrics.mean_area_under_roc(p, labels, each) for p, each in both],
            loss=[metrics.negative_log_likelihood(p, labels, each) for p, each in both],
        )

    def minus(self, other: SeedScores, table: OofTable, config: Experiment) -> Interval:
        """Return the mean difference of nested macro F1, with its interval over lesions and seeds."""
        return intervals.mean_over_seeds(
            [
                intervals.macro_f1_difference(
                    one, two, table.labels, table.groups, config.ensemble.bootstrap, config.seed
                )
                for one, two in zip(self.decisions, other.decisions, strict=True)
            ]
        )

    def row(self, name: str) -> str:
        """Return the means over seeds as a line of the table that `header` begins."""
        deviation = np.std(self.nested, ddof=1) if len(self.nested) > 1 else np.nan
        score = f"{np.mean(self.nested):.3f} \u00b1 {deviation:.3f}"
        return (
            f"{name:<38}{score:>16}{np.mean(self.without_rarest):>16.3f}"
            f"{np.mean(self.argmax):>8.3f}{np.mean(self.area):>8.3f}{np.mean(self.loss):>8.3f}"
        )


def header(table: OofTable) -> str:
    """Return the heading of a table of `SeedScores.row`."""
    rarest = table.diagnoses[rarest_diagnosis(table)]
    return f"{'':<38}{'nested':>16}{'without ' + rarest:>16}{'argmax':>8}{'AUC':>8}{'NLL':>8}"


def rarest_diagnosis(table: OofTable) -> int:
    """Return the number of the diagnosis of the fewest lesions."""
    return int(np.bincount(table.labels, minlength=len(table.diagnoses)).argmin())
