"""The score table: macro F1 of every member, of the weightings, and of the final model.

Shapes: N lesions, C diagnoses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.ensemble import calibration
from triderm_dist.ensemble.artifact import Ensemble
from triderm_dist.ensemble.run_files import CHOSEN, ENSEMBLE, FITTED, MEAN
from triderm_dist.ensemble.sampling import on_all_cores
from triderm_dist.ensemble.thresholds import best_thresholds, decide
from triderm_dist.ensemble.weights import Candidate, NestedEstimate
from triderm_dist.predictions import OofTable

TITLES = {MEAN: "plain mean", FITTED: "fitted weights", CHOSEN: ENSEMBLE}
"""Rows that are not members, by weighting."""

FINAL_MODEL = "final model"
"""What predicts new lesions, in texts: the ensemble, or the network or mean of seeds that predicts in its place."""

COLUMNS = {
    "official": "p > 0.5",
    "argmax": "argmax",
    "argmax_tau": "argmax, tau",
    "nested": "nested",
    "interval": "95% interval",
    "ensemble_minus_this": f"{FINAL_MODEL} minus this, 95%",
    "fitted": "fitted (too high)",
}
"""Columns of the score table in order, with their titles; `cells` fills them."""

SHOWN: dict[str, tuple[str, ...]] = {
    "threshold": tuple(COLUMNS),
    "fitted": ("argmax", "argmax_tau", "nested", "interval", "ensemble_minus_this"),
    "argmax": ("nested", "interval", "argmax_tau", "ensemble_minus_this"),
}
"""The columns of `COLUMNS` that say something about a decision of `schema.DECISIONS`."""


_PLAIN = ("official", "argmax", "argmax_tau", "fitted")
"""The scores of a row without an interval."""


@dataclass(frozen=True)
class ScoreRow:
    """Macro F1 of one member or weighting on the out-of-fold lesions, by how decisions are made.

    official: p > 0.5, nothing fitted (members and their plain mean).  argmax: the most probable diagnosis, with
    weights and temperatures of the other folds if there are any.  argmax_tau: the same after logit adjustment with
    tau fitted on the other folds (networks only).  fitted: thresholds fitted on the lesions they are scored on, so too
    high.  nested: everything fitted on the other folds.  ensemble_minus_this: paired difference of nested scores.
    """

    name: str
    official: float | None
    argmax: float | None
    argmax_tau: float | None
    fitted: float
    nested: intervals.Interval
    ensemble_minus_this: intervals.Interval

    @property
    def title(self) -> str:
        return FINAL_MODEL if self.name == ENSEMBLE else self.name

    def json(self) -> dict[str, Any]:
        """Return what ensemble.json stores under scores.NAME."""
        return {
            **{key: getattr(self, key) for key in _PLAIN},
            "nested": self.nested.json(),
            "chosen_minus_this": self.ensemble_minus_this.json(),
        }

    @staticmethod
    def from_json(name: str, scores: Mapping[str, Any]) -> ScoreRow:
        """Read what `json` returned."""
        return ScoreRow(
            name=name,
            **{key: scores[key] for key in _PLAIN},
            nested=intervals.Interval(**scores["nested"]),
            ensemble_minus_this=intervals.Interval(**scores["chosen_minus_this"]),
        )

    def cells(self) -> dict[str, str]:
        """Return the text of each of `COLUMNS`, empty if there is no value."""
        scores = {key: getattr(self, key) for key in _PLAIN}
        _, low, high = self.ensemble_minus_this.signed()
        return {
            **{key: "" if value is None else f"{value:.3f}" for key, value in scores.items()},
            "nested": f"{self.nested.value:.3f}",
            "interval": f"{self.nested.low:.3f} to {self.nested.high:.3f}",
            "ensemble_minus_this": "" if self.name == ENSEMBLE else f"{low} to {high}",
        }


@dataclass(frozen=True)
class ScoreTable:
    """The inputs of the score table, and its rows.

    members: calibrated (N, C) by name; uncalibrated: the same with temperature 1.  candidates: fitted on all lesions.
    resamples, seed: of the bootstrap behind the intervals of differences.
    """

    table: OofTable
    members: Mapping[str, np.ndarray]
    uncalibrated: Mapping[str, np.ndarray]
    candidates: Mapping[str, Candidate]
    nested: NestedEstimate
    resamples: int
    seed: int

    def rows(self, chosen: Ensemble) -> list[ScoreRow]:
        """Return a row for every candidate, and the last for the chosen weighting, whose ensemble is `chosen`."""
        ensembles = {**{weighting: each.ensemble for weighting, each in self.candidates.items()}, CHOSEN: chosen}
        return on_all_cores(lambda weighting: self._row(weighting, ensembles[weighting]), ensembles, len(self.table))

    def pairs(self) -> list[dict[str, Any]]:
        """Return the paired differences of nested macro F1 between members, as ensemble.json stores them."""
        pairs = list(combinations(self.members, 2))
        differences = on_all_cores(lambda pair: self._difference(*pair), pairs, len(self.table))
        return [
            {"first": first, "second": second, "difference": difference.json()}
            for (first, second), difference in zip(pairs, differences, strict=True)
        ]

    def _row(self, weighting: str, ensemble: Ensemble) -> ScoreRow:
        labels = self.table.labels
        combined = ensemble.combine(list(self.members.values()))
        fitted = decide(combined, best_thresholds(combined, labels), "any")
        # Fitted weights have seen these lesions; the weighting chosen on the other folds has not.
        plain = None if weighting in (FITTED, CHOSEN) else ensemble.combine(list(self.uncalibrated.values()))
        unseen = self.nested.probabilities if weighting == CHOSEN else plain
        return ScoreRow(
            name=TITLES.get(weighting, weighting),
            official=None if plain is None else metrics.official_macro_f1(plain, labels),
            argmax=None if unseen is None else metrics.argmax_macro_f1(unseen, labels),
            argmax_tau=nested_tau_macro_f1(self.table, weighting) if weighting in self.table.models else None,
            fitted=metrics.macro_f1(fitted, labels),
            nested=intervals.macro_f1(self.nested.decisions[weighting], labels, self.table.groups),
            ensemble_minus_this=self._difference(CHOSEN, weighting),
        )

    def _difference(self, first: str, second: str) -> intervals.Interval:
        decisions = self.nested.decisions
        return intervals.macro_f1_difference(
            decisions[first], decisions[second], self.table.labels, self.table.groups, self.resamples, self.seed
        )


def nested_tau_macro_f1(table: OofTable, model: str) -> float:
    """Return argmax macro F1 with the prior and the tau of logit adjustment fitted on the other folds."""
    logits = calibration.log_probabilities(table.logits[model], table.heads[model])
    adjusted = np.empty_like(logits)
    for fold in np.unique(table.folds):
        inside, outside = table.folds == fold, table.folds != fold
        prior = calibration.class_prior(table.labels[outside], len(table.diagnoses))
        tau = calibration.fit_tau(logits[outside], table.labels[outside], prior)
        adjusted[inside] = calibration.adjust_logits(logits[inside], prior, tau)
    return metrics.argmax_macro_f1(adjusted, table.labels)
