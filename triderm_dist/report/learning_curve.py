"""Learning curve: macro F1 of a network by the number of lesions it was trained on, and what twice as many would give.

Shapes: T sizes, N lesions, C diagnoses, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from pydantic import BaseModel

from triderm_dist import intervals, metrics
from triderm_dist.checksums import DamagedFile, read_checked_json
from triderm_dist.intervals import Interval
from triderm_dist.predictions import PARTS, OofTable, gather_part, part_folder
from triderm_dist.schema import DataError

BEYOND = 2
"""The multiple of the lesions to which the curve is extrapolated."""
_MIN_ERROR = 1e-3
"""The least error, 1 - macro F1, whose logarithm is fitted."""


@dataclass(frozen=True)
class LearningCurve:
    """Out-of-fold macro F1 (most probable diagnosis) of a network by the number of training lesions.

    lesions: (T,) mean over the folds, smallest first; the last is all.  macro_f1: of each.  half: macro F1 with all
    lesions minus that with half of them.  scale, exponent: of the power law 1 - macro F1 = scale * lesions **
    -exponent, by least squares of the logarithms.  expected: macro F1 by the law with `BEYOND` times the lesions.
    gain: expected minus the law with all lesions.
    """

    model: str
    lesions: tuple[float, ...]
    macro_f1: tuple[Interval, ...]
    half: Interval
    scale: float
    exponent: float
    expected: Interval
    gain: Interval

    @property
    def helps(self) -> bool:
        """Whether the extrapolated gain is beyond the noise."""
        return self.gain.low > 0

    def power_law(self, lesions: np.ndarray) -> np.ndarray:
        """Return macro F1 by the power law for numbers of lesions (n,)."""
        return 1 - self.scale * lesions**-self.exponent


def read_learning_curve(
    run_folder: Path, model: str, table: OofTable, groups: np.ndarray, resamples: int
) -> LearningCurve | None:
    """Read the predictions of a network that was trained on parts of the lesions; None where it was not.

    table: the out-of-fold table of the run, lesions with a label only.  groups: (N,) theirs.
    """
    folds = np.unique(table.folds)
    parts = {percent: gather_part(run_folder, model, percent, table) for percent in PARTS}
    if any(part is None for part in parts.values()):
        return None
    sizes = [
        fmean(_lesions(part_folder(run_folder, model, percent, fold) / "fold.json") for fold in folds)
        for percent in PARTS
    ]
    sizes.append(len(table) * (len(folds) - 1) / len(folds))
    decisions = [metrics.argmax_decisions(part.logits[model]) for part in (*parts.values(), table) if part]
    return fit_learning_curve(model, sizes, decisions, table.labels, groups, resamples)


def fit_learning_curve(
    model: str,
    lesions: Sequence[float],
    decisions: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray,
    resamples: int = intervals.RESAMPLES,
) -> LearningCurve:
    """Fit the power law to macro F1 by the number of training lesions (T,); decisions: of each, (N, C) bool.

    The ends of the extrapolation are percentiles over bootstrap resamples of the held-out lesions, the same for all
    sizes. The power law of the error is that of Hestness et al. (2017) without an irreducible error, which three sizes
    cannot distinguish: the extrapolation is optimistic where there is one.
    """
    draws = intervals.macro_f1_draws(decisions, labels, groups, resamples)
    values = np.array([[metrics.macro_f1(each, labels) for each in decisions]])
    size = float(lesions[-1])
    scale, exponent = _fit(np.asarray(lesions), values)
    scales, exponents = _fit(np.asarray(lesions), draws)

    def extrapolated(scales: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        now, then = (1 - scales * number**-exponents for number in (size, BEYOND * size))
        return then, then - now

    (expected, gain), (expected_draws, gain_draws) = extrapolated(scale, exponent), extrapolated(scales, exponents)
    return LearningCurve(
        model=model,
        lesions=tuple(map(float, lesions)),
        macro_f1=tuple(intervals.macro_f1(each, labels, groups) for each in decisions),
        half=intervals.macro_f1_difference(decisions[-1], decisions[-2], labels, groups, resamples),
        scale=float(scale[0]),
        exponent=float(exponent[0]),
        expected=Interval(float(expected[0]), *intervals.percentiles(expected_draws)),
        gain=Interval(float(gain[0]), *intervals.percentiles(gain_draws)),
    )


def _fit(lesions: np.ndarray, macro_f1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and exponent (R,) of the power law through errors 1 - macro_f1 (R, T) at lesions (T,)."""
    x, y = np.log(lesions), np.log(np.maximum(1 - macro_f1, _MIN_ERROR))
    centered = x - x.mean()
    slope = y @ centered / (centered @ centered)
    return np.exp(y.mean(axis=1) - slope * x.mean()), -slope


class _Keys(BaseModel):
    lesions: int


def _lesions(path: Path) -> int:
    try:
        return int(read_checked_json(path, _Keys)["lesions"])
    except (FileNotFoundError, DamagedFile) as error:
        raise DataError(
            f"{path}: {error}; delete its folder and run triderm report learning_curve=true again"
        ) from None
