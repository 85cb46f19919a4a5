"""Lists of lesions that the report shows: whose label the ensemble finds improbable, and typical ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from triderm_dist import metrics
from triderm_dist.ensemble.run_files import NestedRows
from triderm_dist.report.label_errors import LabelErrors, find_label_errors

PICTURED_LESIONS = 12
"""Lesions of a list whose photos are shown, at most."""
HARDEST_LESIONS = 20
TYPICAL_DIAGNOSES = 12
"""Diagnoses of which the best and the median lesion are shown, at most."""
MISLABELED_LESIONS = 30
"""Lesions in the list of probable label errors, at most."""


@dataclass(frozen=True)
class DoubtfulLesion:
    """A lesion whose label the ensemble finds improbable.

    alternative: a more probable diagnosis.  predicted: the decisions, comma-separated.  agree: how many networks find
    the alternative most probable. Probabilities are shares of the lesion's sum.
    """

    lesion_id: str
    label: str
    alternative: str
    label_probability: float
    alternative_probability: float
    predicted: str
    agree: int


class LesionLists:
    """Lists of lesions by the probability of their label; each is computed once, on first use.

    logits: (N, C) of each network.
    """

    def __init__(self, rows: NestedRows, logits: Sequence[np.ndarray], diagnoses: Sequence[str]) -> None:
        self._rows, self._labels, self._logits, self._diagnoses = rows, rows.labels, logits, diagnoses

    @property
    def pictured(self) -> list[DoubtfulLesion]:
        """The lesions whose photos are shown; a lesion of several lists more than once."""
        return [*self.hardest[:PICTURED_LESIONS], *self.mislabeled[:PICTURED_LESIONS], *self.typical]

    @cached_property
    def hardest(self) -> list[DoubtfulLesion]:
        """The lesions whose label has the smallest probability."""
        of_label = self._shares[np.arange(len(self._labels)), self._labels]
        order = np.argsort(of_label, kind="stable")[:HARDEST_LESIONS]
        return [self._doubtful(int(row), int(self._shares[row].argmax())) for row in order]

    @cached_property
    def label_errors(self) -> LabelErrors:
        """What confident learning finds in the probabilities of the ensemble."""
        return find_label_errors(self._shares, self._labels)

    @cached_property
    def agreed_errors(self) -> np.ndarray:
        """(n,) bool: of which suspects of `label_errors` every network finds the alternative most probable."""
        suspects, alternatives = self.label_errors.suspects, self.label_errors.alternatives
        agree = np.ones(len(suspects), bool)
        for logits in self._logits:
            agree &= logits[suspects].argmax(axis=1) == alternatives
        return agree

    @cached_property
    def mislabeled(self) -> list[DoubtfulLesion]:
        """The suspects of `label_errors` whose alternative every network finds most probable, at most
        `MISLABELED_LESIONS`.
        """
        found, agreed = self.label_errors, np.flatnonzero(self.agreed_errors)[:MISLABELED_LESIONS]
        return [self._doubtful(int(found.suspects[each]), int(found.alternatives[each])) for each in agreed]

    @cached_property
    def typical(self) -> list[DoubtfulLesion]:
        """Of each of the `TYPICAL_DIAGNOSES` most frequent diagnoses, the lesion whose label has the largest
        probability, and the one with the median probability.
        """
        of_label, lesions = self._shares[np.arange(len(self._labels)), self._labels], np.bincount(self._labels)
        result = []
        for label in np.sort(np.argsort(-lesions, kind="stable")[:TYPICAL_DIAGNOSES]):
            rows = np.flatnonzero(self._labels == label)
            if len(rows):
                ordered = rows[np.argsort(-of_label[rows], kind="stable")]
                chosen = dict.fromkeys([ordered[0], ordered[len(rows) // 2]])
                result += [self._doubtful(int(row), int(self._shares[row].argmax())) for row in chosen]
        return result

    @cached_property
    def _shares(self) -> np.ndarray:
        """(N, C) probabilities of the ensemble, divided by their sum."""
        return metrics.shares(self._rows.probabilities)

    def _doubtful(self, row: int, alternative: int) -> DoubtfulLesion:
        predicted = [self._diagnoses[column] for column in np.flatnonzero(self._rows.decisions[row]).tolist()]
        return DoubtfulLesion(
            lesion_id=str(self._rows.lesion_ids[row]),
            label=self._diagnoses[int(self._labels[row])],
            alternative=self._diagnoses[alternative],
            label_probability=float(self._shares[row, self._labels[row]]),
            alternative_probability=float(self._shares[row, alternative]),
            predicted=", ".join(predicted) or "nothing",
            agree=sum(int(logits[row].argmax()) == alternative for logits in self._logits),
        )
