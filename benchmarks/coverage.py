"""Coverage of the intervals: how often a "95% interval" holds the true value, on simulated data sets.

python -m benchmarks.coverage [sets=1000] [candidates=true]

Data sets have the shares of MILK10k's diagnoses and 479 lesions (as its test set) or 4,717 (as the lesions of the other
benchmarks), drawn from a population of lesions whose F1 are therefore known. Sets that lack a diagnosis have no
official score and are drawn again. Four rules decide: argmax, p > 0.5, thresholds fitted on other lesions, and
thresholds fitted on the other folds of the same set (nested). A cell is the coverage of one function of
`triderm_dist.intervals` for one rule and size. candidates=true prints other methods for macro F1 and for the paired
difference, instead.

A true F1 of 0 is printed apart: it can be missed on one side only, so that 97.5% or more is the nominal coverage. That
is any diagnosis which a rule never finds, and all of a fifth rule that never finds the rare ones. The last line is one
JSON object: the lowest and the highest coverage of all other cells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from pydantic import Field

from triderm_dist import intervals, metrics
from triderm_dist.cli import run
from triderm_dist.ensemble.thresholds import regularized_thresholds
from triderm_dist.intervals import Interval
from triderm_dist.report.slices import MIN_SLICE_POSITIVES, SCORES, ScoredLesions, score_slices
from triderm_dist.settings import Section

LESIONS = (303, 2522, 44, 544, 52, 50, 9, 450, 746, 473, 47)
"""Lesions of each diagnosis in MILK10k."""
CLASSES, RARE = len(LESIONS), np.array(LESIONS) < 100
SIZES = (479, 4717)
POPULATION = 200_000
FOLDS = 5
PREVALENCE = 0.02
"""Of the predictive values at another prevalence."""


class CoverageRun(Section):
    sets: int = Field(1000, ge=20, description="simulated data sets per cell")
    candidates: bool = Field(False, description="print other methods for macro F1 and differences instead")


@dataclass(frozen=True)
class Lesions:
    """labels, groups, inside (of a slice): (N,).  networks: probabilities (N, C) of two networks."""

    labels: np.ndarray
    groups: np.ndarray
    inside: np.ndarray
    networks: tuple[np.ndarray, np.ndarray]

    def take(self, rows: np.ndarray) -> Lesions:
        networks = tuple(table[rows] for table in self.networks)
        return Lesions(self.labels[rows], self.groups[rows], self.inside[rows], networks)


@dataclass
class Cells:
    """Coverage by cell. outcomes: whether each interval holds the truth.  widths: of the intervals."""

    outcomes: dict[tuple[str, str, int], list[bool]] = field(default_factory=dict)
    widths: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)

    def add(self, what: str, rule: str, size: int, interval: Interval, truth: float) -> None:
        self.outcomes.setdefault((what, rule, size), []).append(interval.low <= truth <= interval.high)
        self.widths.setdefault((what, rule, size), []).append(interval.high - interval.low)

    def coverage(self) -> dict[tuple[str, str, int], float]:
        return {cell: float(np.mean(outcomes)) for cell, outcomes in self.outcomes.items()}

    def print(self) -> None:
        for (what, rule, size), coverage in self.coverage().items():
            width = np.mean(self.widths[what, rule, size])
            print(f"{what:<40} {rule:<18} {size:>6,} {coverage:10.3f} {width:8.3f}", flush=True)


def population(generator: np.random.Generator) -> Lesions:
    """Simulate lesions in groups of one to three, and two networks about as good as those measured on MILK10k.

    Scores are log shares of the diagnoses plus a bonus for the label plus noise, part of it common to a group. Half of
    the groups have lesions of one diagnosis only. Lesions inside the slice are a little harder.
    """
    shares = np.array(LESIONS) / sum(LESIONS)
    sizes = generator.integers(1, 4, POPULATION // 2)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    labels = generator.choice(CLASSES, len(groups), p=shares)
    first = np.cumsum(sizes) - sizes
    uniform = generator.random(len(sizes)) < 0.5
    labels = np.where(uniform[groups], labels[first[groups]], labels)
    inside = generator.random(len(groups)) < 0.3
    bonus = np.where(inside, 2.3, 2.6)[:, None] * (labels[:, None] == np.arange(CLASSES))
    common = 0.5 * generator.normal(size=(len(sizes), CLASSES))[groups]
    scores = 0.8 * np.log(shares) + bonus + common + 0.8 * generator.normal(size=(len(groups), CLASSES))
    other = scores + 0.5 * generator.normal(size=scores.shape)
    return Lesions(labels, groups, inside, (_softmax(scores), _softmax(other)))


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def draw(lesions: Lesions, size: int, generator: np.random.Generator, grouped: bool = False) -> np.ndarray:
    """Return rows of a data set with every diagnosis, drawn lesion by lesion, or group by group."""
    while True:
        if grouped:
            starts = np.searchsorted(lesions.groups, generator.integers(0, lesions.groups[-1] + 1, size // 2))
            stops = np.searchsorted(lesions.groups, lesions.groups[starts], side="right")
            rows = np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
        else:
            rows = generator.integers(0, len(lesions.labels), size)
        if len(np.unique(lesions.labels[rows])) == CLASSES:
            return rows


def fixed_rules(lesions: Lesions, generator: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Return the decisions (N, C) of both networks on the population under each rule that needs no fit on the set."""
    other = lesions.take(draw(lesions, 4717, generator))
    rules: dict[str, list[np.ndarray]] = {"argmax": [], "p > 0.5": [], "fitted elsewhere": [], "rare never": []}
    for probabilities, elsewhere in zip(lesions.networks, other.networks, strict=True):
        thresholds = regularized_thresholds(elsewhere, other.labels, 0.0)
        rules["argmax"].append(metrics.argmax_decisions(probabilities))
        rules["p > 0.5"].append(probabilities > 0.5)
        rules["fitted elsewhere"].append(probabilities > thresholds)
        rules["rare never"].append(metrics.argmax_decisions(np.where(RARE, 0.0, probabilities)))
    return rules


class NestedThresholds:
    """Decide about a data set by thresholds fitted on its other folds, and give the true F1 of that."""

    def __init__(self, lesions: Lesions) -> None:
        self.size = len(lesions.labels)
        self.tables = [
            [(np.sort(p[:, label]), np.sort(p[lesions.labels == label, label])) for label in range(CLASSES)]
            for p in lesions.networks
        ]

    def decide(self, part: Lesions, network: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the decisions (N, C), and the true F1 (C,) of this rule."""
        probabilities, folds = part.networks[network], generator.permutation(len(part.labels)) % FOLDS
        decisions = np.zeros(probabilities.shape, bool)
        found, total = np.zeros(CLASSES), np.zeros(CLASSES)
        for fold in range(FOLDS):
            held_out = folds == fold
            thresholds = regularized_thresholds(probabilities[~held_out], part.labels[~held_out], 0.0)
            decisions[held_out] = probabilities[held_out] > thresholds
            for label, (every, positive) in enumerate(self.tables[network]):
                found[label] += len(positive) - np.searchsorted(positive, thresholds[label], side="right")
                predicted = len(every) - np.searchsorted(every, thresholds[label], side="right")
                total[label] += predicted + len(positive)
        return decisions, 2 * found / total


def measure(settings: CoverageRun, lesions: Lesions) -> tuple[Cells, Cells]:
    """Return the coverage of `triderm_dist.intervals`, and that of the rule that never finds rare diagnoses."""
    generator = np.random.default_rng(1)
    rules = fixed_rules(lesions, generator)
    truth = {name: [metrics.f1_per_class(table, lesions.labels) for table in tables] for name, tables in rules.items()}
    true_rates = rates_of(lesions, rules["argmax"][0])
    nested = NestedThresholds(lesions)
    cells, one_sided = Cells(), Cells()
    for size in SIZES:
        for name in (*rules, "nested"):
            target = one_sided if name == "rare never" else cells
            for _ in range(settings.sets // (3 if name == "nested" else 1)):  # fitting takes a quarter of a second
                rows = draw(lesions, size, generator)
                part = lesions.take(rows)
                if name == "nested":
                    (first, f1), (second, other) = (nested.decide(part, network, generator) for network in (0, 1))
                else:
                    (first, second), (f1, other) = (table[rows] for table in rules[name]), truth[name]
                target.add("macro F1", name, size, intervals.macro_f1(first, part.labels), f1.mean())
                difference = intervals.macro_f1_difference(first, second, part.labels, resamples=400)
                target.add("difference of two networks", name, size, difference, f1.mean() - other.mean())
                each = intervals.f1_per_class(first, part.labels)
                for label in range(CLASSES):
                    kind = "one diagnosis, rare" if RARE[label] else "one diagnosis, common"
                    where = cells if f1[label] > 0 else one_sided
                    where.add(kind, name, size, each[label], f1[label])
        for name in ("argmax", "fitted elsewhere"):
            for _ in range(settings.sets):
                slice_cells(cells, name, size, lesions, rules[name][0], draw(lesions, size, generator))
                rows = draw(lesions, size, generator, grouped=True)
                group_cells(cells, name, size, lesions.take(rows), [table[rows] for table in rules[name]], truth[name])
        for grouped in (False, True):
            for _ in range(settings.sets // 3):
                rows = draw(lesions, size, generator, grouped)
                rate_cells(cells, size, lesions.take(rows), rules["argmax"][0][rows], true_rates, grouped)
    nine_lesions(cells, settings.sets, generator)
    return cells, one_sided


def slice_cells(cells: Cells, rule: str, size: int, lesions: Lesions, table: np.ndarray, rows: np.ndarray) -> None:
    """Add macro F1 of a slice, and its gaps in macro F1 and recall, over diagnoses with 5 lesions on both sides."""
    part, decisions = lesions.take(rows), table[rows]
    counts = [np.bincount(part.labels[mask], minlength=CLASSES) for mask in (part.inside, ~part.inside)]
    kept = (counts[0] >= MIN_SLICE_POSITIVES) & (counts[1] >= MIN_SLICE_POSITIVES)
    inside = metrics.class_counts(table[lesions.inside], lesions.labels[lesions.inside])
    outside = metrics.class_counts(table[~lesions.inside], lesions.labels[~lesions.inside])
    scored = ScoredLesions(part.networks[0], part.labels, decisions, np.arange(size), np.full(CLASSES, np.nan))
    found = {each.score_name: each for each in score_slices(scored, {"slice": {"inside": part.inside}})}
    cells.add("slice, macro F1", rule, size, found["macro_f1"].score, inside.f1[kept].mean())
    for name, gap in (("macro_f1", inside.f1 - outside.f1), ("recall", inside.recall - outside.recall)):
        title = f"slice, {SCORES[name]} inside minus outside"
        cells.add(title, rule, size, found[name].gap, gap[kept].mean())


def group_cells(
    cells: Cells, rule: str, size: int, part: Lesions, decisions: list[np.ndarray], truth: list[np.ndarray]
) -> None:
    """Add macro F1, the difference of the networks, and F1 of each diagnosis, of lesions in groups."""
    first, second = decisions
    cells.add("groups, macro F1", rule, size, intervals.macro_f1(first, part.labels, part.groups), truth[0].mean())
    difference = intervals.macro_f1_difference(first, second, part.labels, part.groups, resamples=400)
    cells.add("groups, difference of two networks", rule, size, difference, truth[0].mean() - truth[1].mean())
    for interval, f1 in zip(intervals.f1_per_class(first, part.labels, part.groups), truth[0], strict=True):
        cells.add("groups, one diagnosis", rule, size, interval, f1)


def rates_of(lesions: Lesions, decisions: np.ndarray) -> dict[str, np.ndarray]:
    """Return the true rates, areas and Brier scores of a network in the population, (C,) each."""
    counts, probabilities = metrics.class_counts(decisions, lesions.labels), lesions.networks[0]
    truth = lesions.labels[:, None] == np.arange(CLASSES)
    pairs = zip(counts.recall, counts.specificity, strict=True)
    elsewhere = np.array([np.ravel(metrics.predictive_values(*pair, np.array([PREVALENCE]))) for pair in pairs])
    return {
        "sensitivity": counts.recall,
        "specificity": counts.specificity,
        "positive predictive value": counts.precision,
        "negative predictive value": counts.negative_predictive_value,
        f"positive predictive value at {PREVALENCE:.0%}": elsewhere[:, 0],
        f"negative predictive value at {PREVALENCE:.0%}": elsewhere[:, 1],
        "area under ROC": metrics.areas_under_roc(probabilities, lesions.labels),
        "average precision": metrics.average_precisions(probabilities, lesions.labels),
        "Brier score": ((probabilities - truth) ** 2).mean(axis=0),
    }


def rate_cells(
    cells: Cells, size: int, part: Lesions, decisions: np.ndarray, truth: dict[str, np.ndarray], grouped: bool
) -> None:
    """Add rates, areas and Brier score of each diagnosis against all others, where a set has them."""
    groups = part.groups if grouped else None
    rates = intervals.rates_per_class(decisions, part.labels, groups)
    for label in range(CLASSES):
        positive, scores = part.labels == label, part.networks[0][:, label]
        ranking = metrics.Ranking.of(scores, positive)
        found = [
            *vars(rates[label]).values(),
            *(each[0] for each in intervals.predictive_values(decisions[:, label], positive, [PREVALENCE], groups)),
            intervals.area_under_roc(ranking, groups),
            intervals.average_precision(ranking, groups),
            intervals.mean((scores - positive) ** 2, groups),
        ]
        kind = "rare" if RARE[label] else "common"
        for (name, values), interval in zip(truth.items(), found, strict=True):
            if np.isfinite(interval.value):
                cells.add(f"{'groups, ' if grouped else ''}{name}, {kind}", "", size, interval, values[label])


def nine_lesions(cells: Cells, sets: int, generator: np.random.Generator) -> None:
    """Add F1 of a diagnosis of nine lesions whose true recall is anything from 0 to 1, none or all found included."""
    labels = np.repeat([0, 1], [9, 91])
    for recall in generator.random(4 * sets):
        found = generator.random(9) < recall
        decisions = np.zeros((100, 2), bool)
        decisions[:9, 0] = found
        interval = intervals.f1_per_class(decisions, labels)[0]
        cells.add("one diagnosis, 9 lesions, any recall", "", 100, interval, 2 * recall / (1 + recall))


def measure_candidates(settings: CoverageRun, lesions: Lesions) -> None:
    """Print the coverage of other methods."""
    generator = np.random.default_rng(1)
    rules = fixed_rules(lesions, generator)
    cells = Cells()
    for size in SIZES:
        for name, tables in rules.items():
            f1, other = (metrics.f1_per_class(table, lesions.labels).mean() for table in tables)
            for _ in range(settings.sets):
                rows = draw(lesions, size, generator)
                labels, (first, second) = lesions.labels[rows], (table[rows] for table in tables)
                for method, (score, difference) in candidates(labels, first, second, generator).items():
                    cells.add(f"macro F1, {method}", name, size, score, f1)
                    cells.add(f"difference, {method}", name, size, difference, f1 - other)
    cells.print()
    print(json.dumps({method: _extremes(cells, method) for method in sorted({cell[0] for cell in cells.outcomes})}))


def candidates(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, generator: np.random.Generator, resamples: int = 400
) -> Mapping[str, tuple[Interval, Interval]]:
    """Return intervals of macro F1 of `first`, and of the difference, by each method."""
    from scipy.stats import norm

    rows = np.concatenate([labels[:, None], first, second], axis=1)
    patterns, frequency = np.unique(rows, axis=0, return_counts=True)
    label, tables = patterns[:, 0], (patterns[:, 1 : CLASSES + 1] > 0, patterns[:, CLASSES + 1 :] > 0)
    truth = label[:, None] == np.arange(CLASSES)

    def scores(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        f1 = []
        for table in tables:
            value = metrics.ratio(2 * weights @ (table & truth), weights @ (table.astype(float) + truth))
            value[weights @ truth.astype(float) == 0] = np.nan
            f1.append(np.nanmean(value, axis=1))
        return f1[0], f1[0] - f1[1]

    lesions = frequency.sum()
    stratified = np.zeros((resamples, len(patterns)))
    for each in np.unique(label):
        inside = frequency[label == each]
        stratified[:, label == each] = generator.multinomial(inside.sum(), inside / inside.sum(), size=resamples)
    plain = generator.multinomial(lesions, frequency / lesions, size=resamples).astype(float)
    weights = {
        "stratified bootstrap": stratified,
        "percentile bootstrap": plain,
        "Bayesian bootstrap": generator.standard_gamma(frequency, size=(resamples, len(patterns))),
    }
    found = {name: [intervals.percentiles(draws) for draws in scores(each)] for name, each in weights.items()}
    jackknife = scores(frequency - np.eye(len(patterns)))
    accelerated = []
    for draws, value, left in zip(scores(plain), scores(frequency[None].astype(float)), jackknife, strict=True):
        below = np.clip((np.mean(draws < value) + np.mean(draws <= value)) / 2, 0.001, 0.999)
        gaps = np.average(left, weights=frequency) - left
        scale = (frequency @ gaps**2) ** 1.5
        skew = (frequency @ gaps**3) / (6 * scale) if scale else 0.0
        shifted = norm.ppf(below) + norm.ppf([0.025, 0.975])
        accelerated.append(np.quantile(draws, norm.cdf(norm.ppf(below) + shifted / (1 - skew * shifted))))
    found["BCa bootstrap"] = accelerated
    result = {name: (Interval(0.0, *ends[0]), Interval(0.0, *ends[1])) for name, ends in found.items()}
    chosen = (
        intervals.macro_f1(first, labels),
        intervals.macro_f1_difference(first, second, labels, resamples=resamples),
    )
    return result | {"triderm_dist.intervals": chosen}


def _extremes(cells: Cells, method: str) -> list[float]:
    coverage = [value for (what, _, _), value in cells.coverage().items() if what == method]
    return [round(min(coverage), 3), round(max(coverage), 3)]


def main(settings: CoverageRun) -> None:
    lesions = population(np.random.default_rng(0))
    print(f"{settings.sets:,} data sets per cell\n{'interval of':<40} {'rule':<18} {'lesions':>6} coverage    width")
    if settings.candidates:
        measure_candidates(settings, lesions)
        return
    cells, one_sided = measure(settings, lesions)
    cells.print()
    print(
        "\ntrue F1 of 0, of one diagnosis or of all rare ones: can be missed on one side only (nominal: 0.975 or more)"
    )
    one_sided.print()
    coverage = cells.coverage().values()
    print(json.dumps({"lowest": round(min(coverage), 3), "highest": round(max(coverage), 3)}))


if __name__ == "__main__":
    run(CoverageRun, main, __doc__)
