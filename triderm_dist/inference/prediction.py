"""The prediction for one lesion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """The calibrated ensemble's prediction for one lesion.

    probabilities: by diagnosis.  diagnosis: the predicted one; where the rule of the task may predict several or
    none, a tuple.  decisions: by diagnosis, whether it is predicted.  members: probabilities of every network
    (calibrated, mean over its folds) and of the stacker, by name.  warnings: what makes it less certain than the
    predictions that the run was scored on, one line each.
    """

    lesion_id: str
    probabilities: Mapping[str, float]
    diagnosis: str | tuple[str, ...]
    decisions: Mapping[str, bool]
    members: Mapping[str, Mapping[str, float]]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the diagnoses and their probabilities, the most probable first, and the warnings, one line each."""
        width = max(map(len, self.probabilities))
        ordered = sorted(self.probabilities.items(), key=lambda item: -item[1])
        lines = [
            f"{name:{width}}  {value:.3f}{'  predicted' if self.decisions[name] else ''}" for name, value in ordered
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])
