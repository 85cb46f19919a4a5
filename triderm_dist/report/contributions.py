"""What the columns of the stacker contribute to its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triderm_dist.ensemble.fitted_stacker import FittedStacker
from triderm_dist.ensemble.run_files import ALIGNMENTS_FILE
from triderm_dist.ensemble.stack_inputs import training_columns
from triderm_dist.predictions import OofFile

CONTRIBUTION_LESIONS = 1000
"""Largest number of lesions for which contributions are computed."""


@dataclass(frozen=True)
class Contributions:
    """Contributions of the stacker's columns to its scores: values (N, C, F), columns (N, F), and their F names."""

    values: np.ndarray
    columns: np.ndarray
    names: tuple[str, ...]


def find_contributions(
    stacker: FittedStacker, run_folder: Path, oof: OofFile, lesion_ids: np.ndarray, networks: Sequence[str]
) -> Contributions | None:
    """Compute the contributions on some of the lesions (N,); None for a stacker without any."""
    rows = np.sort(np.random.default_rng(0).permutation(len(lesion_ids))[:CONTRIBUTION_LESIONS])
    features = (run_folder / ALIGNMENTS_FILE).exists()
    table = oof.table(features, lesion_ids[rows].tolist())
    columns = stacker.reduce(training_columns(run_folder, stacker.extra, table, networks))
    values = stacker.model.contributions(columns)
    return None if values is None else Contributions(values, columns, stacker.feature_names)


def column_importance(
    stacker: FittedStacker, contributions: Contributions | None
) -> tuple[str, dict[str, float]] | None:
    """Return the name of the measure, and the share of each column, largest first; None where neither is known."""
    if importance := stacker.model.importance():
        measure, values = importance
    elif contributions:
        mean = np.abs(contributions.values).mean(axis=(0, 1))
        measure, values = "mean absolute contribution", dict(zip(contributions.names, mean, strict=True))
    else:
        return None
    total = sum(values.values()) or 1.0
    return measure, {name: value / total for name, value in sorted(values.items(), key=lambda item: -item[1])}
