"""Rows of the score table: macro F1 of every member, the stacker and the ensemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from triderm_dist import metrics
from triderm_dist.ensemble import calibration
from triderm_dist.predictions import OofTable


@dataclass(frozen=True)
class Row:
    """The scores of one way to decide, macro F1 on the out-of-fold lesions.

    official: probabilities cut at 0.5, nothing fitted (members and their plain mean).  argmax: the likeliest diagnosis,
    with weights and temperatures of the other folds where there are any.  argmax_tau: the same after logit adjustment
    with tau fitted on the other folds (networks only).  fitted: thresholds fitted on the very lesions they are scored
    on, too high by nature.  nested: all fitted on the other folds.
    """

    name: str
    official: float | None
    argmax: float | None
    argmax_tau: float | None
    fitted: float
    nested: metrics.Interval
    less_than_chosen: metrics.Interval

    def json(self) -> dict[str, Any]:
        return {
            **{key: getattr(self, key) for key in ("official", "argmax", "argmax_tau", "fitted")},
            "nested": self.nested.json(),
            "chosen_minus_this": self.less_than_chosen.json(),
        }


def _nested_tau(table: OofTable, model: str) -> float:
    """Argmax macro F1 with prior and tau of logit adjustment taken from the other folds."""
    logits = calibration.log_probabilities(table.logits[model], table.heads[model])
    adjusted = np.empty_like(logits)
    for fold in np.unique(table.folds):
        inside, outside = table.folds == fold, table.folds != fold
        prior = calibration.class_prior(table.labels[outside], len(table.diagnoses))
        tau = calibration.fit_tau(logits[outside], table.labels[outside], prior)
        adjusted[inside] = calibration.adjust_logits(logits[inside], prior, tau)
    return metrics.argmax_macro_f1(adjusted, table.labels)
