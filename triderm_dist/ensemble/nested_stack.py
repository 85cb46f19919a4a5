"""Out-of-fold probabilities of a stacker, nested, so that weights and thresholds fitted on them can be judged.

Shapes: N lesions, C diagnoses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from triderm_dist import metrics
from triderm_dist.config import StackConfig
from triderm_dist.data.folds import split_parts
from triderm_dist.data.threads import openmp_threads
from triderm_dist.ensemble.fitted_stacker import FittedStacker, fit_stacker, stacker_kind
from triderm_dist.ensemble.stacker import TrainingRows
from triderm_dist.schema import DataError


@dataclass(frozen=True)
class NestedStack:
    """Probabilities of stackers that were fitted without the lesion they predict.

    out_of_fold: (N, C), row i by the stacker fitted on all folds but the fold of i.
    without: for each fold k (N, C): rows of k as in `out_of_fold`; a row of another fold j by a stacker fitted
    without j and without k. Weights and thresholds fitted on them can be judged on fold k.
    stackers: the stacker of each fold, fitted on the others.
    """

    out_of_fold: np.ndarray
    without: dict[int, np.ndarray]
    stackers: dict[int, FittedStacker]


def nested_stack(rows: TrainingRows, folds: np.ndarray, config: StackConfig, seed: int = 0) -> NestedStack:
    """Fit the stackers of every fold and of every pair of folds, and predict with them. folds: (N,) of all rows.

    A stacker without folds j and k serves both. The base networks of the other folds were trained on the labels of
    fold k: the usual second-order leak of stacking, which only retraining would remove.
    """
    shape = (len(rows), len(rows.diagnoses))
    out_of_fold = np.full(shape, np.nan)
    without: dict[int, np.ndarray] = {}
    tasks: list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]] = []  # rows to train on, to predict, where to write
    for fold, train, held_out in _fits(rows.labels, rows.groups, folds, seed):
        target = without.setdefault(fold, np.full(shape, np.nan))
        tasks.append((train, held_out, [target, out_of_fold] if (train | held_out).all() else [target]))
    training_sets = {train.tobytes(): train for train, _, _ in tasks}
    kind, settings = stacker_kind(config)
    parallel = min(kind.parallel_fits(settings, rows), len(training_sets))

    def fit(train: np.ndarray) -> FittedStacker:
        return fit_stacker(rows.take(train), config, seed, cores=openmp_threads() // parallel)

    def predict(task: tuple[np.ndarray, np.ndarray, list[np.ndarray]]) -> None:
        train, held_out, targets = task
        probabilities = fitted[train.tobytes()].predict(rows.source, rows.indices[held_out])
        for target in targets:
            target[held_out] = probabilities

    with ThreadPoolExecutor(parallel) as pool:
        fitted = dict(zip(training_sets, pool.map(fit, training_sets.values()), strict=True))
        list(pool.map(predict, tasks))
    stackers = {fold: fitted[(folds != fold).tobytes()] for fold in without}
    return NestedStack(out_of_fold, without, stackers)


def _fits(
    labels: np.ndarray, groups: np.ndarray, folds: np.ndarray, seed: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (fold, rows to train on, rows to predict) of every fit: without the fold, and without parts of the others.

    labels, groups, folds: (N,).  rows: (N,) bool; those of the first fit of a fold are all rows together.
    """
    for fold in np.unique(folds).tolist():
        others = folds != fold
        yield fold, others, ~others
        parts = inner_folds(labels, groups, folds, others, seed)
        for part in np.unique(parts[others]).tolist():
            held_out = others & (parts == part)
            yield fold, others & ~held_out, held_out


def check_stackable(labels: np.ndarray, groups: np.ndarray, folds: np.ndarray, seed: int) -> None:
    """Raise DataError where a fit of the nested stack would have lesions of one diagnosis only. All (N,)."""
    for fold, train, _ in _fits(labels, groups, folds, seed):
        if len(np.unique(labels[train])) < 2:
            raise DataError(f"the stacker needs two diagnoses outside of fold {fold} and a part of the other folds")


def choose_columns(
    variants: Mapping[str, NestedStack], labels: np.ndarray, folds: np.ndarray
) -> tuple[str, NestedStack, dict[str, float]]:
    """Choose among nested stacks on different columns by argmax macro F1; the first wins ties.

    Returns (name of the best over all folds, nested stack, macro F1 of each variant). In the nested stack, the choice
    for fold k is made on the other folds, by stackers fitted without k, so that the estimate for k stays unbiased; its
    `stackers` are those of the best over all folds.
    """
    names = list(variants)
    first = variants[names[0]]
    out_of_fold, without = first.out_of_fold.copy(), {}
    for fold in first.without:
        inside = folds == fold
        scores = [metrics.argmax_macro_f1(variants[n].without[fold][~inside], labels[~inside]) for n in names]
        best = variants[names[int(np.argmax(scores))]]
        without[fold] = best.without[fold]
        out_of_fold[inside] = best.out_of_fold[inside]
    overall = {name: metrics.argmax_macro_f1(variant.out_of_fold, labels) for name, variant in variants.items()}
    name = max(overall, key=lambda each: overall[each])
    return name, NestedStack(out_of_fold, without, variants[name].stackers), overall


def inner_folds(labels: np.ndarray, groups: np.ndarray, folds: np.ndarray, rows: np.ndarray, seed: int) -> np.ndarray:
    """Return (N,) parts for fits and choices inside `rows` (N,) bool: their folds, or three stratified parts if
    there is only one.
    """
    if len(np.unique(folds[rows])) > 1:
        return folds
    parts = np.full(len(labels), -1)
    parts[rows] = split_parts(labels[rows], groups[rows], 3, seed)
    return parts
