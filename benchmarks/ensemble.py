"""Our weights and thresholds against Nelder-Mead at 0.5 and a grid, judged on lesions that neither was fitted on.

python -m benchmarks.ensemble [oof=RUN/oof.parquet] [key=value ...]

A problem is 5,000 lesions to fit on and as many others to judge on, of 3 or 10 models: simulated (uneven diagnoses,
models of different skill whose errors are related), or, with `oof`, drawn from the real out-of-fold outputs of a run,
fitting and judging on different lesions. Nelder-Mead is the build guide's: weights normalized inside, every diagnosis
cut at 0.5, sklearn's f1_score as the objective. The last line is one JSON object: mean gain in macro F1 over the
problems with the low end of its 95% interval, how many times faster, and the same for thresholds against a 99-point
grid.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field

from triderm_dist import metrics
from triderm_dist.cli import run
from triderm_dist.ensemble import calibration
from triderm_dist.ensemble.thresholds import best_thresholds, decide, regularized_thresholds
from triderm_dist.ensemble.weights import fit_weights
from triderm_dist.intervals import Interval, percentiles
from triderm_dist.predictions import OofTable, labeled, read_oof
from triderm_dist.schema import DIAGNOSES
from triderm_dist.settings import Section

C = len(DIAGNOSES)
SHARE = np.array([303, 2522, 44, 544, 52, 50, 9, 450, 746, 473, 47]) / 5240
"""(C,) share of each diagnosis in MILK10k."""

SHRINKAGE = 30.0
"""Shrinkage of the regularized thresholds in the table; a run chooses it on inner folds."""

GRID = np.arange(1, 100) / 100
SEARCHED_EVERY = 10
"""The grid searches are timed on one of this many problems: sklearn takes seconds for each."""


class Settings(Section):
    oof: str | None = Field(None, description="oof.parquet of a finished run to draw half of the problems from")
    problems: int = Field(100, ge=4, description="problems, half of them of 3 models and half of 10")
    lesions: int = Field(5000, ge=200, description="lesions to fit on")
    seed: int = Field(0, description="seed of the problems")


class Problem(NamedTuple):
    kind: str
    fit: list[np.ndarray]
    fit_labels: np.ndarray
    judge: list[np.ndarray]
    judge_labels: np.ndarray


def main(settings: Settings) -> None:
    table = read_oof(Path(settings.oof)) if settings.oof else None
    scores: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    thresholds: dict[str, list[float]] = {}
    kinds: list[str] = []
    shortfall = 0.0
    for problem in problems(settings, table):
        kinds.append(problem.kind)
        for name, method in METHODS.items():
            started = time.perf_counter()
            decide = method(problem.fit, problem.fit_labels)
            seconds.setdefault(name, []).append(time.perf_counter() - started)
            scores.setdefault(name, []).append(metrics.macro_f1(decide(problem.judge), problem.judge_labels))
        mean = np.mean(problem.fit, axis=0)
        assert np.allclose(
            np.nan_to_num(metrics.f1_per_class(mean > best_thresholds(mean, problem.fit_labels),
                                               problem.fit_labels)),
            best_of_every_cut(mean, problem.fit_labels),
        ), "thresholds are not exact"  # fmt: skip
        if len(kinds) % SEARCHED_EVERY != 1:
            continue
        reached = {}
        for name, search in SEARCHES.items():
            started = time.perf_counter()
            cut = search(mean, problem.fit_labels)
            thresholds.setdefault(name, []).append(time.perf_counter() - started)
            reached[name] = np.nan_to_num(metrics.f1_per_class(mean > cut, problem.fit_labels))
        exact = reached["exact, by sorting"]
        shortfall = max(shortfall, float((exact - reached["99 points, sklearn"]).max()))
        assert all((exact >= other - 1e-12).all() for other in reached.values())
    print(f"macro F1 on lesions not fitted on, mean of {len(kinds)} problems; milliseconds to fit, median\n")
    print(f"{'':<34}" + "".join(f"{kind:>24}" for kind in sorted(set(kinds))))
    for name in METHODS:
        cells = ""
        for kind in sorted(set(kinds)):
            rows = [i for i, each in enumerate(kinds) if each == kind]
            took = 1000 * np.median(np.array(seconds[name])[rows])
            cells += f"{np.mean(np.array(scores[name])[rows]):>14.4f} {took:>6.0f} ms"
        print(f"{name:<34}{cells}")
    ours, guide = (np.array(scores[name]) for name in (OURS, GUIDE))
    gain = Interval(float((ours - guide).mean()), *percentiles(resampled_mean(ours - guide)))
    times = {name: np.array(seconds[name]) for name in (OURS, GUIDE)}
    speedup = float(np.median(times[GUIDE] / times[OURS]))
    print(f"\n{OURS} minus {GUIDE}: {gain}; {speedup:.1f} times faster, "
          f"at least {(times[GUIDE] / times[OURS]).min():.1f} times")  # fmt: skip
    best = np.array(thresholds["exact, by sorting"])
    for name, took in thresholds.items():
        print(f"thresholds, {name}: {1000 * np.median(took):.1f} ms ({np.median(np.array(took) / best):.0f} times)")
    print(f"equal to the best of every possible cut; up to {shortfall:.3f} F1 of a diagnosis above the grid's")
    result = {"gain": gain.value, "gain_low": gain.low, "speedup": speedup,
              "threshold_speedup": float(np.median(np.array(thresholds["99 points, sklearn"]) / best))}  # fmt: skip
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def problems(settings: Settings, table: OofTable | None) -> Iterator[Problem]:
    for number in range(settings.problems):
        generator = np.random.default_rng([settings.seed, number])
        models = (3, 10)[number % 2]
        if table is not None and number % 4 >= 2:
            yield from_real(table, models, settings.lesions, generator)
        else:
            yield simulated(models, settings.lesions, generator)


def simulated(models: int, lesions: int, generator: np.random.Generator) -> Problem:
    """Simulate models of different skill and sharpness; part of a lesion's noise is common to all of them."""
    labels = generator.choice(C, 2 * lesions, p=SHARE)
    common = generator.normal(size=(2 * lesions, C))
    tables = []
    for _ in range(models):
        noise = 0.7 * common + 0.7 * generator.normal(size=common.shape)
        logits = generator.uniform(1.0, 2.2) * np.eye(C)[labels] + noise + np.log(SHARE)
        tables.append(calibration.probabilities_of(logits * generator.uniform(0.7, 1.5), "softmax"))
    fit, judge = np.split(np.arange(2 * lesions), 2)
    return Problem(f"simulated, {models} models", [t[fit] for t in tables], labels[fit], [t[judge] for t in tables],
                   labels[judge])  # fmt: skip


def from_real(table: OofTable, models: int, lesions: int, generator: np.random.Generator) -> Problem:
    """Draw a problem from real outputs: half of the lesions of each diagnosis to fit on, the other half to judge.

    Lesions are drawn with replacement up to the size. A run has few networks: each model of the problem is one of their
    heads, with independent noise added to its logits.
    """
    table = table.take(table.complete() & labeled(table))
    half = np.zeros(len(table), bool)
    for label in range(C):
        rows = generator.permutation(np.flatnonzero(table.labels == label))
        half[rows[: (len(rows) + generator.integers(2)) // 2]] = True
    fit, judge = (generator.choice(np.flatnonzero(side), lesions) for side in (half, ~half))
    heads = [(model, part) for model in table.models for part in (table.logits, table.aux_clinical,
                                                                  table.aux_dermoscopic)]  # fmt: skip
    chosen = [heads[i] for i in generator.permutation(np.arange(models) % len(heads))]
    tables = []
    for model, part in chosen:
        logits = part[model].astype(np.float64)
        logits = logits + generator.uniform(0, 0.5) * logits.std() * generator.normal(size=logits.shape)
        tables.append(calibration.probabilities_of(logits, table.heads[model]))
    return Problem(f"real, {models} models", [t[fit] for t in tables], table.labels[fit], [t[judge] for t in tables],
                   table.labels[judge])  # fmt: skip


Decide = Callable[[list[np.ndarray]], np.ndarray]


def nelder_mead(tables: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Return (M,) weights as in the build guide, whose bounds have no effect and are omitted."""
    from scipy.optimize import minimize
    from sklearn.metrics import f1_score

    truth = np.eye(C, dtype=int)[labels]

    def objective(weights: np.ndarray) -> float:
        mixed = sum(w * table for w, table in zip(weights / weights.sum(), tables, strict=True))
        return -f1_score(truth, (mixed > 0.5).astype(int), average="macro", zero_division=0)

    start = [0.4, 0.3, 0.3] if len(tables) == 3 else [1 / len(tables)] * len(tables)
    found = minimize(objective, start, method="Nelder-Mead", options={"maxiter": 1000}).x
    return found / found.sum()


def by_nelder_mead(tables: list[np.ndarray], labels: np.ndarray) -> Decide:
    weights = nelder_mead(tables, labels)
    return lambda judged: np.tensordot(weights, judged, axes=1) > 0.5


def by_plain_mean(tables: list[np.ndarray], labels: np.ndarray) -> Decide:
    cut = best_thresholds(np.mean(tables, axis=0), labels)
    return lambda judged: np.mean(judged, axis=0) > cut


def by_ours(tables: list[np.ndarray], labels: np.ndarray) -> Decide:
    return fit_weights(tables, labels).decide


def by_ours_regularized(tables: list[np.ndarray], labels: np.ndarray) -> Decide:
    fitted = fit_weights(tables, labels)
    cut = regularized_thresholds(fitted.combine(tables), labels, SHRINKAGE)
    return lambda judged: decide(fitted.combine(judged), cut, "at_least_one")


GUIDE, OURS = "Nelder-Mead, cut at 0.5", "fit_weights, exact thresholds"
METHODS: dict[str, Callable[[list[np.ndarray], np.ndarray], Decide]] = {
    GUIDE: by_nelder_mead,
    "plain mean, exact thresholds": by_plain_mean,
    OURS: by_ours,
    "fit_weights, regularized thresholds": by_ours_regularized,
}


def sklearn_grid(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (C,) the best of 99 points for each diagnosis, by one f1_score per point."""
    from sklearn.metrics import f1_score

    best = np.zeros(C)
    for column in range(C):
        truth = labels == column
        scores = [f1_score(truth, probabilities[:, column] > cut, zero_division=0) for cut in GRID]
        best[column] = GRID[int(np.argmax(scores))]
    return best


def numpy_grid(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (C,) the best of 99 points, counted with NumPy for all diagnoses at once."""
    truth = labels[:, None] == np.arange(C)
    positives, scores = truth.sum(axis=0), []
    for cut in GRID:
        predicted = probabilities > cut
        scores.append(2 * (predicted & truth).sum(axis=0) / np.maximum(predicted.sum(axis=0) + positives, 1))
    return GRID[np.argmax(scores, axis=0)]


SEARCHES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "99 points, sklearn": sklearn_grid,
    "99 points, NumPy": numpy_grid,
    "exact, by sorting": best_thresholds,
}


def best_of_every_cut(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (C,) the largest F1 over every cut, counted with searchsorted, independently of the measured method."""
    best = np.zeros(C)
    for column, scores in enumerate(probabilities.T):
        positives = np.sort(scores[labels == column])
        cuts = np.unique(np.append(scores, 0.0))
        predicted = len(scores) - np.searchsorted(np.sort(scores), cuts, side="right")
        correct = len(positives) - np.searchsorted(positives, cuts, side="right")
        if len(positives):
            best[column] = (2 * correct / (predicted + len(positives))).max()
    return best


def resampled_mean(values: np.ndarray, resamples: int = 10_000) -> np.ndarray:
    """Return (R,) means of the problems drawn with replacement."""
    return np.random.default_rng(0).choice(values, (resamples, len(values))).mean(axis=1)


if __name__ == "__main__":
    run(Settings, main, __doc__)
