"""Nested decisions for the benchmarks on real lesions: thresholds of each fold fitted on the other folds."""

from __future__ import annotations

import numpy as np

from triderm_dist.config import Experiment
from triderm_dist.ensemble.nested_stack import inner_folds
from triderm_dist.ensemble.run_files import CHOSEN
from triderm_dist.ensemble.weights import Fitting, nested_estimate
from triderm_dist.predictions import OofTable


def nested_decisions(probabilities: np.ndarray, table: OofTable, config: Experiment) -> np.ndarray:
    """Return (N, C) decisions with thresholds fitted on the other folds, by the same rules as the ensemble's."""
    estimate = nested_estimate(
        lambda fold: {"method": probabilities},
        table.labels,
        table.folds,
        lambda fold: inner_folds(table.labels, table.groups, table.folds, table.folds != fold, config.seed),
        Fitting(config.ensemble, config.seed, table.task.decision),
    )
    return estimate.decisions[CHOSEN]
