"""Correct several comparisons for their number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from triderm_dist.intervals.interval import NORMAL, Interval


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust p-values (m,) for their number (Holm 1979): the k-th smallest is multiplied by m - k + 1.

    Where nothing differs, the probability that any adjusted p-value is below a level is at most that level, however the
    comparisons depend on one another.
    """
    order = np.argsort(p, kind="stable")
    result = np.empty(len(p))
    result[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return result


def beyond_noise(differences: Sequence[Interval], level: float = 0.05) -> list[bool]:
    """Return which of several differences are distinct from 0, corrected for their number (`holm`).

    Their intervals are taken as normal. A difference without an interval (NaN) is not distinct.
    """
    from scipy.stats import norm

    halves = np.array([(each.high - each.low) / 2 for each in differences])
    distances = np.abs([each.value for each in differences])
    z = np.divide(
        NORMAL * distances, halves, out=np.where((distances > 0) & (halves == 0), np.inf, 0.0), where=halves > 0
    )
    return [bool(p <= level) for p in holm(2 * norm.sf(z))]
