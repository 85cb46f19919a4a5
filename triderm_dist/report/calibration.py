"""Calibration of the ensemble and of its networks, with and without temperature.

Shapes: N lesions, n of them count for a target, C diagnoses, B bins of the probability.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.ensemble.artifact import Ensemble
from triderm_dist.ensemble.calibration import fit_temperature, member_probabilities, probabilities_of
from triderm_dist.ensemble.run_files import STACKER, NestedRows
from triderm_dist.intervals import Interval
from triderm_dist.metrics import Reliability
from triderm_dist.predictions import OofTable
from triderm_dist.report.discrimination import Discrimination

MOST_PROBABLE = "most probable diagnosis"
"""The name of the target whether the most probable diagnosis is correct."""

FIT_LESIONS = 20_000
"""Lesions of the other folds that a temperature is fitted on, at most."""


@dataclass(frozen=True)
class Calibration:
    """Agreement of probabilities (n,) with what is true of the lesions, (n,) bool.

    brier: the mean squared distance of the probability from 0 or 1.
    """

    reliability: Reliability
    brier: Interval


@dataclass(frozen=True)
class BeforeAndAfter:
    """Calibration without and with temperature. brier_change: the Brier score with minus that without.

    name: of a diagnosis, `discrimination.MALIGNANT`, or `MOST_PROBABLE`.  positives: lesions of which it is true.
    """

    name: str
    positives: int
    before: Calibration
    after: Calibration
    brier_change: Interval


@dataclass(frozen=True)
class NetworkCalibration:
    """A network without (first) and with (second) its temperature.

    temperature: that of ensemble.json; of a network that is no member, fitted as those are.  nll, error, brier:
    negative log-likelihood, calibration error of the most probable diagnosis, and Brier score summed over diagnoses.
    brier_change: second minus first.
    """

    name: str
    temperature: float
    nll: tuple[float, float]
    error: tuple[float, float]
    brier: tuple[float, float]
    brier_change: Interval


class EnsembleCalibration:
    """What the probabilities of an ensemble are worth as probabilities; each part is computed once, on first use."""

    def __init__(
        self, discrimination: Discrimination, table: OofTable, ensemble: Ensemble, networks: tuple[str, ...]
    ) -> None:
        """discrimination: of the nested rows.  table: the networks' predictions of the same lesions."""
        self.discrimination, self.table, self.ensemble, self.networks = discrimination, table, ensemble, networks

    @cached_property
    def targets(self) -> list[BeforeAndAfter]:
        """The ensemble: its most probable diagnosis, malignant against benign, and each diagnosis that occurs."""
        after, groups = self.discrimination, self.discrimination.groups
        before = Discrimination(after.task, self._without_temperatures, groups)
        result = [_before_and_after(MOST_PROBABLE, _most_probable(before.rows), _most_probable(after.rows), groups)]
        for first, second in zip(before.targets, after.targets, strict=True):
            scores = (first.scores, first.positive), (second.scores, second.positive)
            result.append(_before_and_after(second.name, *scores, second.groups))
        return result

    @cached_property
    def by_network(self) -> list[NetworkCalibration]:
        """Each network, with temperatures fitted on the other folds."""
        temperatures = dict(zip(self.ensemble.members, self.ensemble.temperatures, strict=True))
        labels, nothing, result = self.table.labels, np.empty(0), []
        for name in self.networks:
            if name not in temperatures:  # of an ensemble of which another network predicts alone
                temperatures[name] = fit_temperature(self.table.logits[name], labels, self.table.heads[name])
            before, after = member_probabilities(self.table, name), self._with_temperature(name)
            errors = _squared_errors(before, labels), _squared_errors(after, labels)
            result.append(
                NetworkCalibration(
                    name=name,
                    temperature=float(temperatures[name]),
                    nll=(
                        metrics.negative_log_likelihood(before, labels, nothing),
                        metrics.negative_log_likelihood(after, labels, nothing),
                    ),
                    error=(
                        metrics.calibration_error(before, labels, nothing),
                        metrics.calibration_error(after, labels, nothing),
                    ),
                    brier=(float(errors[0].mean()), float(errors[1].mean())),
                    brier_change=intervals.mean(errors[1] - errors[0], self.discrimination.groups),
                )
            )
        return result

    @cached_property
    def _without_temperatures(self) -> NestedRows:
        """The nested rows with the mean of the members' probabilities at temperature 1, by the ensemble's weights."""
        rows = self.discrimination.rows
        members = [
            rows.stack if name == STACKER else member_probabilities(self.table, name) for name in self.ensemble.members
        ]
        return replace(rows, probabilities=self.ensemble.combine(members))

    def _with_temperature(self, model: str) -> np.ndarray:
        """Return (N, C) probabilities of a network, each fold's by a temperature fitted on the other folds."""
        table, logits = self.table, self.table.logits[model].astype(np.float64)
        for fold in np.unique(table.folds):
            outside = np.flatnonzero(table.folds != fold)
            outside = outside[:: -(-len(outside) // FIT_LESIONS)]
            temperature = fit_temperature(table.logits[model][outside], table.labels[outside], table.heads[model])
            logits[table.folds == fold] /= temperature
        return probabilities_of(logits, table.heads[model])


def _before_and_after(
    name: str,
    before: tuple[np.ndarray, np.ndarray],
    after: tuple[np.ndarray, np.ndarray],
    groups: np.ndarray | None,
) -> BeforeAndAfter:
    """Compare two pairs of probabilities (n,) and what is true of the lesions, (n,) bool."""
    errors = [(probabilities - positive) ** 2 for probabilities, positive in (before, after)]
    first, second = (
        Calibration(Reliability.of(*pair), intervals.mean(error, groups))
        for pair, error in zip((before, after), errors, strict=True)
    )
    return BeforeAndAfter(name, int(after[1].sum()), first, second, intervals.mean(errors[1] - errors[0], groups))


def _most_probable(rows: NestedRows) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) the largest share of each lesion, and (N,) bool whether its diagnosis is that of the lesion."""
    shares = metrics.shares(rows.probabilities)
    return shares.max(axis=1), shares.argmax(axis=1) == rows.labels


def _squared_errors(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (N,) squared distances whose mean is `metrics.brier_score`."""
    shares = metrics.shares(probabilities)
    return np.asarray(((shares - np.eye(shares.shape[1])[labels]) ** 2).sum(axis=1))
