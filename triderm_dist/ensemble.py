"""From several members' probabilities to decisions: weights on the simplex, and a threshold for each diagnosis.

Macro F1 with one threshold a diagnosis falls apart into C problems of one variable, each solved exactly by sorting.
Exact is not the same as good on new lesions: with nine positives the best cut is noise. So what decides is the guarded
form (`guarded_thresholds`), and every choice (shrinkage, rule, fitted weights or plain mean) is made on lesions that it
was not fitted on. Shapes: N lesions, C diagnoses, M members. Probabilities are in [0, 1]; labels (N,) are all known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from triderm_dist import calibration, metrics
from triderm_dist.config import EnsembleConfig
from triderm_dist.files import write_json
from triderm_dist.schema import DIAGNOSES, DataError

Rule = Literal["any", "at_least_one", "nearest"]
RULES: tuple[Rule, ...] = ("any", "at_least_one", "nearest")
"""any: each diagnosis above its threshold. at_least_one: where none is, also the one that comes nearest, by p/t.
nearest: that one and no other, which with t = prior ** tau is the argmax of logits - tau * log(prior)."""

SHRINKAGES: tuple[float, ...] = (0.0, 10.0, 30.0, 100.0)
"""What shrinkage=auto chooses from, in positives."""


class Cut(NamedTuple):
    """How decisions come about: rule, and the shrinkage of its fitted thresholds or the tau of logit adjustment."""

    rule: Rule
    shrinkage: float | None
    tau: float | None = None


MEAN, FITTED = "mean", "fitted"
NEVER = 1.0
"""The threshold of a diagnosis that is never claimed."""

FORMAT = "triderm-ensemble"
VERSION = 3

_RESAMPLES = 20
_EDGE = 1e-6


def best_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(C,) thresholds with the largest F1 of each diagnosis on these rows, claiming where p > threshold.

    Exact, O(C N log N): the best cut lies right below a lesion that has the diagnosis, and after the k likeliest of
    those F1 = 2 k / (lesions from there on + positives), by one sort and a binary search. Equal scores fall on the same
    side, and the threshold lies midway between two scores. `NEVER` for a diagnosis without a positive; a score of 0 is
    never claimed.
    """
    columns = np.array(probabilities.T, np.float64, order="C")
    found = np.full(len(columns), NEVER)
    for label, (scores, ascending) in enumerate(zip(columns, np.sort(columns, axis=1), strict=True)):
        own = np.sort(scores[labels == label])
        reachable = own[np.searchsorted(own, 0.0, side="right") :][::-1]
        if not len(reachable):
            continue
        first = np.searchsorted(ascending, reachable)  # of equal scores the first: what is claimed with them
        f1 = 2 * np.arange(1, len(reachable) + 1) / (len(ascending) - first + len(own))
        best = f1.argmax()
        below = np.append(0.0, ascending)[first[best]]
        found[label] = _midway(reachable[best], below)
    return found


def guarded_thresholds(probabilities: np.ndarray, labels: np.ndarray, shrinkage: float, seed: int = 0) -> np.ndarray:
    """(C,) thresholds made to hold on new lesions, by two means, both on the scale of logit(threshold).

    First the exact threshold is averaged over bootstrap resamples of the lesions, stratified by diagnosis. Then
    that of a diagnosis with n positives is pulled to the pooled cut with the weight of `shrinkage` positives:
    (n t + s pooled) / (n + s). The pooled cut is a line over the log share of the diagnoses, since the best cut of a
    calibrated score is half the best F1 (Lipton et al. 2014) and that falls with the share.
    """
    return _shrink(_averaged_thresholds(probabilities, labels, seed), labels, shrinkage)


def adjusted_thresholds(labels: np.ndarray, classes: int, tau: float) -> np.ndarray:
    """(C,) thresholds for the rule `nearest` that stand for logit adjustment with tau (Menon et al. 2021)."""
    power = calibration.class_prior(labels, classes) ** tau
    present = np.isin(np.arange(classes), labels)
    return np.where(present, 0.5 * power / power.max(), NEVER)


def decide(probabilities: np.ndarray, thresholds: np.ndarray, rule: Rule) -> np.ndarray:
    """(N, C) bool decisions under one of `RULES`."""
    claimed = probabilities > thresholds
    if rule == "any":
        return claimed
    if rule == "nearest":
        return _nearest(probabilities, thresholds)
    return claimed | (_nearest(probabilities, thresholds) & ~claimed.any(axis=1, keepdims=True))


def lift(probabilities: np.ndarray, thresholds: np.ndarray, rule: Rule) -> np.ndarray:
    """(N, C) probabilities such that `lifted > thresholds` is `decide(probabilities, thresholds, rule)`.

    Under at_least_one a row without a claim, under nearest every row, is scaled as a whole until its nearest diagnosis
    just passes.
    """
    if rule == "any":
        return probabilities
    lifted = np.array(probabilities, np.float64)
    largest = _ratio(lifted, thresholds).max(axis=1, keepdims=True)
    short = largest[:, 0] > 0
    if rule == "at_least_one":
        short &= ~(lifted > thresholds).any(axis=1)
    with np.errstate(over="ignore"):  # a row of denormal numbers
        scaled = np.minimum(lifted[short] / largest[short], thresholds)
    just_above = np.maximum(thresholds + _EDGE * (1 - thresholds), np.nextafter(thresholds, 2))
    lifted[short] = np.where(_nearest(lifted[short], thresholds), just_above, scaled)
    return lifted


@dataclass(frozen=True)
class Ensemble:
    """Weights of the members, thresholds and rule: everything between members' probabilities and a decision.

    members: M names.  weights: (M,) on the simplex.  thresholds: (C,) in (0, 1].  temperatures: (M,) that divide a
    member's logits before they become probabilities; 1 where the member is the stacker.
    """

    members: tuple[str, ...]
    weights: np.ndarray
    thresholds: np.ndarray
    rule: Rule = "any"
    shrinkage: float | None = 0.0
    tau: float | None = None
    weighting: str = FITTED
    temperatures: np.ndarray = field(default_factory=lambda: np.empty(0))
    diagnoses: tuple[str, ...] = DIAGNOSES

    def combine(self, probabilities: Sequence[np.ndarray]) -> np.ndarray:
        """(N, C) weighted mean of the members' (N, C), given in the order of `members`."""
        if len(probabilities) != len(self.members):
            raise DataError(f"the ensemble has {len(self.members)} members, here are {len(probabilities)} tables")
        return np.tensordot(self.weights, np.stack(list(probabilities)), axes=1)

    def final(self, probabilities: Sequence[np.ndarray]) -> np.ndarray:
        """(N, C) combined probabilities with the rule worked in: the decision is `final > thresholds`."""
        return lift(self.combine(probabilities), self.thresholds, self.rule)

    def decide(self, probabilities: Sequence[np.ndarray]) -> np.ndarray:
        """(N, C) bool decisions."""
        return decide(self.combine(probabilities), self.thresholds, self.rule)

    def save(self, path: Path, **more: Any) -> None:
        """Write as JSON, with `more` beside (scores, notes), whole or not at all."""
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "members": self.members,
            "weights": self.weights.tolist(),
            "temperatures": self.temperatures.tolist(),
            "weighting": self.weighting,
            "diagnoses": self.diagnoses,
            "thresholds": self.thresholds.tolist(),
            "shrinkage": self.shrinkage,
            "tau": self.tau,
            "rule": self.rule,
            **more,
        }
        write_json(path, tree)

    @staticmethod
    def load(path: Path) -> Ensemble:
        """Read what `save` wrote. Raises DataError naming the file."""
        tree = read_json(path)
        return Ensemble(
            members=tuple(tree["members"]),
            weights=np.array(tree["weights"]),
            thresholds=np.array(tree["thresholds"]),
            rule=tree["rule"],
            shrinkage=tree["shrinkage"],
            tau=tree["tau"],
            weighting=tree["weighting"],
            temperatures=np.array(tree["temperatures"]),
            diagnoses=tuple(tree["diagnoses"]),
        )


def read_json(path: Path) -> dict[str, Any]:
    """All of ensemble.json, scores and notes included. Raises DataError naming the file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run launch.stack first") from None
    except ValueError:
        raise DataError(f"{path}: not readable as JSON; run launch.stack again") from None
    if (tree.get("format"), tree.get("version")) != (FORMAT, VERSION):
        raise DataError(f"{path}: not {FORMAT} version {VERSION}; run launch.stack again")
    return tree


def fit_weights(
    probabilities: Sequence[np.ndarray],
    labels: np.ndarray,
    members: Sequence[str] | None = None,
    rounds: int = 30,
    diagnoses: Sequence[str] = DIAGNOSES,
) -> Ensemble:
    """Weights for the largest macro F1 that thresholds can reach on these rows, with those exact thresholds.

    Greedy selection with replacement (Caruana et al. 2004), then steps along each weight. The score it ends with
    is fitted on these very rows: judge it on others (`fit_candidates`).
    """
    weights = _fit_weights(probabilities, labels, rounds)
    names = tuple(members) if members is not None else tuple(f"member-{i}" for i in range(len(probabilities)))
    thresholds = best_thresholds(np.tensordot(weights, np.stack(list(probabilities)), axes=1), labels)
    return Ensemble(names, weights, thresholds, temperatures=np.ones(len(names)), diagnoses=tuple(diagnoses))


@dataclass(frozen=True)
class Candidate:
    """A way to combine members, fitted on all given rows, and its macro F1 on rows that it was not fitted on."""

    ensemble: Ensemble
    score: float


def fit_candidates(
    members: Mapping[str, np.ndarray],
    labels: np.ndarray,
    parts: np.ndarray,
    config: EnsembleConfig,
    seed: int = 0,
    diagnoses: Sequence[str] = DIAGNOSES,
) -> dict[str, Candidate]:
    """Every member alone by its name, their plain `mean` and the `fitted` weights, each with guarded thresholds.

    The `Cut` of each (rule, shrinkage, or logit adjustment) is that with the best macro F1 over `parts` (N,):
    thresholds (and weights) fitted without a part, decisions judged on it. `mean` and `fitted` are there with two
    members or more.
    """
    tables = list(members.values())
    names = tuple(members)
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    for index, name in enumerate(names):
        alone = np.eye(len(names))[index]
        ways[name] = lambda rows, alone=alone: alone  # type: ignore[misc]
    if len(names) > 1:
        ways[MEAN] = lambda rows: np.full(len(names), 1 / len(names))
        ways[FITTED] = lambda rows: _fit_weights([table[rows] for table in tables], labels[rows], config.rounds)
    stacked = np.stack(tables)
    every = np.ones(len(labels), bool)
    result = {}
    for way, weigh in ways.items():
        cut, score = _choose_cut(stacked, weigh, labels, parts, config, seed)
        weights = weigh(every)
        combined = np.tensordot(weights, stacked, axes=1)
        ensemble = Ensemble(
            members=names,
            weights=weights,
            thresholds=(
                adjusted_thresholds(labels, combined.shape[1], cut.tau)
                if cut.tau is not None
                else guarded_thresholds(combined, labels, cut.shrinkage or 0.0, seed)
            ),
            rule=cut.rule,
            shrinkage=cut.shrinkage,
            tau=cut.tau,
            weighting=way,
            temperatures=np.ones(len(names)),
            diagnoses=tuple(diagnoses),
        )
        result[way] = Candidate(ensemble, score)
    return result


def choose(scores: Mapping[str, float]) -> str:
    """The way to take by the score of each: the fitted weights if they beat the plain mean and every single member,
    else the plain mean; of one member alone, that.
    """
    if MEAN not in scores:
        return next(iter(scores))
    others = [score for name, score in scores.items() if name != FITTED]
    return FITTED if scores[FITTED] > max(others) else MEAN


@dataclass(frozen=True)
class NestedEstimate:
    """Decisions about every lesion by what was fitted on the other folds.

    decisions: for each way (a member's name, `mean`, `fitted`, and `chosen`) a (N, C) bool table.
    probabilities: (N, C) of the chosen way.  final: (N, C) the same with rule and thresholds worked in, so that the
    decision is `final > thresholds`, with (N, C) thresholds.  picks: the chosen way of each fold.
    """

    decisions: dict[str, np.ndarray]
    probabilities: np.ndarray
    final: np.ndarray
    thresholds: np.ndarray
    picks: dict[int, str]


CHOSEN = "chosen"


def nested_estimate(
    members_without: Callable[[int], Mapping[str, np.ndarray]],
    labels: np.ndarray,
    folds: np.ndarray,
    parts_without: Callable[[int], np.ndarray],
    config: EnsembleConfig,
    seed: int = 0,
    diagnoses: Sequence[str] = DIAGNOSES,
) -> NestedEstimate:
    """Fit weights, thresholds, shrinkage, rule, and the choice among them on the other folds; apply to each fold.

    members_without(k): members' (N, C), in which no fit has used a label of fold k.  parts_without(k): (N,) parts for
    the inner choice, read on the rows outside k.
    """
    shape = (len(labels), len(diagnoses))
    decisions: dict[str, np.ndarray] = {}
    probabilities, final, thresholds = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    picks = {}
    for fold in np.unique(folds).tolist():
        inside, outside = folds == fold, folds != fold
        members = members_without(fold)
        candidates = fit_candidates(
            {name: table[outside] for name, table in members.items()},
            labels[outside],
            parts_without(fold)[outside],
            config,
            seed,
            diagnoses,
        )
        held = [table[inside] for table in members.values()]
        best = candidates[choose({way: candidate.score for way, candidate in candidates.items()})]
        for way, candidate in [*candidates.items(), (CHOSEN, best)]:
            decisions.setdefault(way, np.zeros(shape, bool))[inside] = candidate.ensemble.decide(held)
        probabilities[inside] = best.ensemble.combine(held)
        final[inside] = best.ensemble.final(held)
        thresholds[inside] = best.ensemble.thresholds
        picks[fold] = best.ensemble.weighting
    return NestedEstimate(decisions, probabilities, final, thresholds, picks)


def with_temperatures(ensemble: Ensemble, temperatures: Mapping[str, float]) -> Ensemble:
    """The ensemble with the members' temperatures noted; members that are not named have 1."""
    return replace(ensemble, temperatures=np.array([temperatures.get(name, 1.0) for name in ensemble.members]))


def _choose_cut(
    stacked: np.ndarray,
    weigh: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    parts: np.ndarray,
    config: EnsembleConfig,
    seed: int,
) -> tuple[Cut, float]:
    """The best cut and its macro F1 over the parts; of equal ones the first."""
    shrinkages = SHRINKAGES if config.shrinkage == "auto" else (float(config.shrinkage),)
    cuts = [Cut(rule, shrinkage) for shrinkage in shrinkages for rule in RULES[:2]]
    cuts += [Cut("nearest", None, tau) for tau in calibration.TAUS]
    classes = stacked.shape[2]
    tables = {cut: np.zeros((len(labels), classes), bool) for cut in cuts}
    for part in np.unique(parts):
        judge = parts == part
        combined = np.tensordot(weigh(~judge), stacked, axes=1)
        averaged = _averaged_thresholds(combined[~judge], labels[~judge], seed)
        for cut, table in tables.items():
            if cut.tau is not None:
                thresholds = adjusted_thresholds(labels[~judge], classes, cut.tau)
            else:
                thresholds = _shrink(averaged, labels[~judge], cut.shrinkage or 0.0)
            table[judge] = decide(combined[judge], thresholds, cut.rule)
    scores = {cut: metrics.macro_f1(table, labels) for cut, table in tables.items()}
    best = max(scores, key=lambda cut: scores[cut])
    return best, scores[best]


def _nearest(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(N, C) bool, one True a row at the largest p/t; none where that is 0. What is `NEVER` claimed is no candidate."""
    ratio = _ratio(probabilities, thresholds)
    return metrics.argmax_decisions(ratio) & (ratio > 0)


def _ratio(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return np.where(thresholds < NEVER, probabilities / thresholds, 0.0)


def _thresholds(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R, C) exact thresholds under R weightings (R, N) of the lesions, each with the same weight a diagnosis.

    With weights of 1 they are `best_thresholds`, which needs no sums over all lesions and is three times as fast.
    """
    probabilities = np.asarray(probabilities, np.float64)
    found = np.full((len(weights), probabilities.shape[1]), NEVER)
    for column, scores in enumerate(probabilities.T):
        truth = labels == column
        if not truth.any():
            continue
        positives = weights[:, truth].sum(axis=1, keepdims=True)
        order = np.argsort(-scores)
        order = order[: np.count_nonzero(scores)]
        if not len(order):
            continue
        sorted_scores = np.append(scores[order], 0.0)
        weight = weights[:, order]
        true_positives = np.cumsum(weight * truth[order], axis=1)
        f1 = 2 * true_positives / (np.cumsum(weight, axis=1) + positives)
        f1[:, sorted_scores[:-1] == sorted_scores[1:]] = -1.0  # a cut can't separate equal scores
        cut = f1.argmax(axis=1)
        found[:, column] = _midway(sorted_scores[cut], sorted_scores[cut + 1])
    return found


def _midway(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Between two scores, and below the upper one also where they are neighbours among the floats."""
    middle = (above + below) / 2
    return np.where(middle < above, middle, below)


def _averaged_thresholds(probabilities: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """(C,) logit of the exact thresholds, mean over bootstrap resamples; NaN for a diagnosis without positives."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((_RESAMPLES, len(labels)))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        weights[:, rows] = generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=_RESAMPLES)
    logits = _logit(_thresholds(probabilities, labels, weights)).mean(axis=0)
    logits[~np.isin(np.arange(probabilities.shape[1]), labels)] = np.nan
    return logits


def _shrink(logits: np.ndarray, labels: np.ndarray, shrinkage: float) -> np.ndarray:
    """(C,) thresholds from averaged logits (C,), pulled to the pooled line; `NEVER` where the logit is NaN."""
    positives = np.bincount(labels, minlength=len(logits))
    known = np.isfinite(logits)
    thresholds = np.full(len(logits), NEVER)
    n, own = positives[known], logits[known]
    if shrinkage > 0 and known.sum() > 1:
        line = np.stack([np.ones(len(n)), np.log(n / n.sum())], axis=1)
        weight = n[:, None] ** 0.25  # least squares weighted by the root of the positives
        slope = np.linalg.lstsq(line * weight, own * weight[:, 0], rcond=None)[0]
        own = (n * own + shrinkage * (line @ slope)) / (n + shrinkage)
    thresholds[known] = 1 / (1 + np.exp(-own))
    return thresholds


def _logit(thresholds: np.ndarray) -> np.ndarray:
    inside = np.clip(thresholds, _EDGE, 1 - _EDGE)
    return np.log(inside / (1 - inside))


class _Objective:
    """Macro F1 under the best thresholds, as a function of the mixed scores; about a quarter of a millisecond a look.

    Positive floats sort as their bits do, so the label rides in the lowest bit of the score and one plain sort of
    integers orders both. (It costs the last bit of a float32: exact thresholds are sought afterwards, from the scores.)
    """

    def __init__(self, probabilities: Sequence[np.ndarray], labels: np.ndarray) -> None:
        self.tables = np.stack([np.ascontiguousarray(table.T, np.float32) for table in probabilities])
        self.truth = (labels[None] == np.arange(self.tables.shape[1])[:, None]).astype(np.int32)
        positives = self.truth.sum(axis=1, keepdims=True)
        self.occurs = positives[:, 0] > 0
        self.whole = np.arange(1, len(labels) + 1, dtype=np.float32) + positives.astype(np.float32)

    def mix(self, weights: np.ndarray) -> np.ndarray:
        """(C, N) float32 weighted mean of the members."""
        return np.tensordot(weights.astype(np.float32), self.tables, axes=1)

    def __call__(self, mixed: np.ndarray) -> float:
        keys = ((0x7FFFFFFF - mixed.view(np.int32)) & ~1) | self.truth
        keys.sort(axis=1)
        true_positives = np.cumsum(keys & 1, axis=1, dtype=np.float32)
        return float((2 * true_positives / self.whole).max(axis=1)[self.occurs].mean())


def _fit_weights(probabilities: Sequence[np.ndarray], labels: np.ndarray, rounds: int) -> np.ndarray:
    """(M,) weights on the simplex: greedy selection with replacement, then refinement."""
    objective = _Objective(probabilities, labels)
    members = len(probabilities)
    counts, total = np.zeros(members), np.zeros_like(objective.tables[0])
    weights, best, since = np.full(members, 1 / members), -1.0, 0
    for size in range(1, rounds + 1):
        scores = [objective((total + table) / np.float32(size)) for table in objective.tables]
        pick = int(np.argmax(scores))
        counts[pick] += 1
        total += objective.tables[pick]
        if scores[pick] > best:
            weights, best, since = counts / size, scores[pick], 0
        else:
            since += 1
            if since == 4:  # a longer row of additions has not been seen to gain again
                break
    for step in (0.1, 0.05, 0.02):
        for index in range(members):
            for change in (step, -step):
                trial = weights.copy()
                trial[index] = max(0.0, trial[index] + change)
                if trial.sum() > 0:
                    trial /= trial.sum()
                    score = objective(objective.mix(trial))
                    if score > best:
                        weights, best = trial, score
    return weights
