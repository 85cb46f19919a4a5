"""Comparison of runs on the same lesions, as numbers: paired differences, McNemar tests, and settings that differ.

Shapes: N lesions, C diagnoses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from triderm_dist import intervals
from triderm_dist.intervals import Interval
from triderm_dist.metrics import METRICS, macro_f1
from triderm_dist.predictions import rows_of
from triderm_dist.report.content import Content
from triderm_dist.schema import DataError, InputError, Task
from triderm_dist.settings import flatten, yaml_text

RESAMPLES = 4000
"""Resamples of a difference in macro F1: its corrected interval needs its far tails."""

PLACES = ("output", "run", "data.source", "data.test", "data.shards", "data.test_shards", "data.test_truth", "tokens")
"""Settings that say where files lie, in which runs that do the same differ."""


@dataclass(frozen=True)
class ComparedRun:
    """A run, its lesions in the order of the first run.

    probabilities (N, C) and decisions (N, C) bool: nested.  folds: (N,).  settings: by dotted key.
    """

    name: str
    folder: Path
    probabilities: np.ndarray
    decisions: np.ndarray
    folds: np.ndarray
    settings: Mapping[str, str]


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of the lesions that one of two runs decides correctly.

    both, first, second, neither: lesions decided correctly by both, by the first only, by the second only, by none.
    p: two-sided, of the binomial distribution with share 1/2 of the lesions that one of them decides correctly.
    adjusted: by Holm's method over all pairs of a comparison.
    """

    both: int
    first: int
    second: int
    neither: int
    p: float
    adjusted: float = math.nan


@dataclass(frozen=True)
class Pair:
    """The first of two runs minus the second.

    macro_f1: the difference with its 95% interval.  corrected: with the interval of Bonferroni's method, so that those
    of all pairs together cover with 95%.  metrics: by name.
    """

    first: str
    second: str
    macro_f1: Interval
    corrected: Interval
    metrics: Mapping[str, Interval]
    mcnemar: McNemar

    @property
    def beyond_noise(self) -> bool:
        """Whether macro F1 differs, also after correction for the number of pairs."""
        return self.corrected.excludes_zero


class Comparison:
    """Two or more runs that were stacked, on the same lesions; each part is computed once, on first use.

    Raises DataError where a folder is not that of a stacked run, or the runs are not of the same task, lesions and
    labels, and InputError for fewer than two runs or a run named twice.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        if len(folders) < 2:
            raise InputError("compare: name two or more runs, as in triderm compare RUN RUN")
        if len({folder.resolve() for folder in folders}) < len(folders):
            raise InputError("compare: a run is named twice")
        contents = [Content(folder) for folder in folders]
        first = contents[0]
        for other in contents[1:]:
            if not first.task.matches(other.task):
                raise DataError(
                    f"{other.folder}: its task {other.task.name!r} has other diagnoses or fields than that of "
                    f"{first.folder}, {first.task.name!r}; compare runs of one task"
                )
        self.task: Task = first.task
        self.lesion_ids, self.labels, self.groups = first.rows.lesion_ids, first.rows.labels, first.groups
        self.resamples = first.resamples
        self.runs = tuple(
            _aligned(content, name, first) for content, name in zip(contents, _names(folders), strict=True)
        )

    @property
    def diagnoses(self) -> tuple[str, ...]:
        return self.task.diagnosis_names

    @cached_property
    def macro_f1(self) -> list[Interval]:
        """Nested macro F1 of each run."""
        return [intervals.macro_f1(run.decisions, self.labels, self.groups) for run in self.runs]

    @cached_property
    def metrics(self) -> list[dict[str, Interval]]:
        """The metrics of `metrics.METRICS` of each run."""
        return [
            {name: Interval(self._value(name, run), *intervals.percentiles(draws[name])) for name in METRICS}
            for run, draws in zip(self.runs, self._draws, strict=True)
        ]

    @cached_property
    def f1(self) -> list[list[Interval]]:
        """F1 of each diagnosis (C) by each run."""
        return [intervals.f1_per_class(run.decisions, self.labels, self.groups) for run in self.runs]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every pair of runs, the later one minus the earlier one."""
        every = [(second, first) for first, second in combinations(range(len(self.runs)), 2)]
        tests = [self._mcnemar(*pair) for pair in every]
        adjusted = intervals.holm(np.array([test.p for test in tests]))
        return [
            self._pair(*pair, len(every), replace(test, adjusted=float(p)))
            for pair, test, p in zip(every, tests, adjusted, strict=True)
        ]

    @cached_property
    def settings(self) -> list[tuple[str, tuple[str, ...]]]:
        """Dotted key and values by run of the settings that differ; "" where a run lacks the model or the setting.

        A setting that some version does not have is no difference.
        """
        keys = list(dict.fromkeys(key for run in self.runs for key in run.settings))
        rows = [(key, tuple(run.settings.get(key, "") for run in self.runs)) for key in keys]

        def differs(key: str, values: tuple[str, ...]) -> bool:
            known = values if self._of_one_model(key) else [value for value in values if value]
            return len(set(known)) > 1

        return [(key, values) for key, values in rows if differs(key, values)]

    def _of_one_model(self, key: str) -> bool:
        """Return whether a setting is one of a model that some runs do not have."""
        section, _, rest = key.partition(".")
        model = rest.partition(".")[0]
        has = [any(each.startswith(f"models.{model}.") for each in run.settings) for run in self.runs]
        return section == "models" and not all(has)

    @property
    def other_folds(self) -> bool:
        """Whether lesions are in other folds of another run: then training sets differ, too."""
        return any(_partition(run.folds) != _partition(self.runs[0].folds) for run in self.runs[1:])

    @property
    def grouped(self) -> int:
        """Lesions that share their group with another one."""
        return int((np.bincount(self.groups)[self.groups] > 1).sum())

    @cached_property
    def _draws(self) -> list[dict[str, np.ndarray]]:
        return [
            intervals.metric_draws(METRICS, run.probabilities, self.labels, run.decisions, self.groups, self.resamples)
            for run in self.runs
        ]

    def _value(self, metric: str, run: ComparedRun) -> float:
        return METRICS[metric].function(run.probabilities, self.labels, run.decisions)

    def _pair(self, one: int, two: int, pairs: int, mcnemar: McNemar) -> Pair:
        first, second = self.runs[one], self.runs[two]
        value = macro_f1(first.decisions, self.labels) - macro_f1(second.decisions, self.labels)
        draws = intervals.macro_f1_difference_draws(
            first.decisions, second.decisions, self.labels, self.groups, RESAMPLES
        )
        return Pair(
            first=first.name,
            second=second.name,
            macro_f1=Interval(value, *intervals.percentiles(draws)),
            corrected=Interval(value, *intervals.percentiles(draws, 1 - 0.05 / pairs)),
            metrics={
                name: Interval(
                    self._value(name, first) - self._value(name, second),
                    *intervals.percentiles(self._draws[one][name] - self._draws[two][name]),
                )
                for name in METRICS
            },
            mcnemar=mcnemar,
        )

    def _mcnemar(self, one: int, two: int) -> McNemar:
        truth = self.labels[:, None] == np.arange(len(self.diagnoses))
        first, second = ((self.runs[number].decisions == truth).all(axis=1) for number in (one, two))
        return mcnemar(first, second)


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Return the exact McNemar test of which lesions (N,) bool two runs decide correctly (McNemar 1947)."""
    from scipy.stats import binom

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differ = only_first + only_second
    p = min(1.0, 2 * float(binom.cdf(min(only_first, only_second), differ, 0.5))) if differ else 1.0
    return McNemar(int((first & second).sum()), only_first, only_second, int((~first & ~second).sum()), p)


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that distinguish the runs."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]).removeprefix("//") for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("paths differ")


def _aligned(content: Content, name: str, first: Content) -> ComparedRun:
    """Return a run with its lesions in the order of the first. Raises DataError where lesions or labels differ."""
    rows, wanted = content.rows, first.rows
    order = rows_of(wanted.lesion_ids, rows.lesion_ids)
    if (order < 0).any():
        raise DataError(_other_lesions(content, first, wanted.lesion_ids[order < 0]))
    if len(rows.lesion_ids) > len(order):
        extra = np.sort(np.delete(rows.lesion_ids, order))
        raise DataError(_other_lesions(first, content, extra))
    if (differs := np.flatnonzero(rows.labels[order] != wanted.labels)).size:
        raise DataError(
            f"{content.folder}: lesion {wanted.lesion_ids[differs[0]]} has another label than in {first.folder} "
            f"({len(differs):,} such lesions); compare runs on the same labels"
        )
    settings = {key: yaml_text(value) for key, value in flatten(content.settings_tree).items() if key not in PLACES}
    return ComparedRun(
        name, content.folder, rows.probabilities[order], rows.decisions[order], rows.folds[order], settings
    )


def _other_lesions(lacks: Content, has: Content, missing: Sequence[str] | np.ndarray) -> str:
    return (
        f"{lacks.folder}: lacks lesion {missing[0]} of {has.folder} ({len(missing):,} such lesions); compare runs that "
        "were stacked on the same lesions"
    )


def _partition(folds: np.ndarray) -> bytes:
    """Return what is equal for folds (N,) that hold the same lesions, whatever their numbers."""
    _, first, inverse = np.unique(folds, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[inverse]).tobytes()
