"""Samples of a large set of lesions, on which the choices of an ensemble are searched and a stacker is fitted.

Shapes: N lesions, C diagnoses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from triderm_dist.data.threads import openmp_threads

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

SEARCH_LESIONS = 50_000
"""Lesions on which temperatures, weights and thresholdings are searched, at most; a larger set is sampled. Thresholds,
and every score, are computed from all lesions. The largest of the tasks that ship with the package has 10,015 lesions.
"""


def search_rows(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return which lesions (N,) bool to search on: all, or `SEARCH_LESIONS` of them with the same share of each
    diagnosis, rounded up.

    labels: (N,) int64.
    """
    return draw_rows(labels, np.bincount(labels) * min(1.0, SEARCH_LESIONS / len(labels)), seed)


def draw_rows(labels: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
    """Return a random choice of the lesions (N,) bool, of each diagnosis as many as wanted (C,), rounded up."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label, count in enumerate(np.ceil(wanted - 1e-9).astype(np.int64)):
        rows = np.flatnonzero(labels == label)
        chosen[rows if count >= len(rows) else generator.choice(rows, count, replace=False)] = True
    return chosen


def shares_of(counts: np.ndarray, most: int) -> np.ndarray:
    """Divide `most` lesions among diagnoses that have `counts` (C,), by the square roots of these; none gets more than
    it has.
    """
    wanted = np.zeros(len(counts))
    for place, label in enumerate(order := np.argsort(counts)):  # what a rare diagnosis lacks is divided among the rest
        roots = np.sqrt(counts[order[place:]])
        wanted[label] = min(counts[label], (most - wanted.sum()) * roots[0] / max(roots.sum(), 1e-9))
    return wanted


def on_all_cores(work: Callable[[_Item], _Result], items: Iterable[_Item], lesions: int) -> list[_Result]:
    """Return the results of `work` on the items, in their order.

    Threads share the items if there are more than `SEARCH_LESIONS` lesions; shorter arrays gain nothing from them.
    """
    pool = ThreadPoolExecutor(openmp_threads() if lesions > SEARCH_LESIONS else 1)
    try:
        return [future.result() for future in [pool.submit(work, item) for item in items]]
    finally:
        pool.shutdown(cancel_futures=True)
