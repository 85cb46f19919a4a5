"""From several members' probabilities to decisions: weights on the simplex, and a threshold for each diagnosis.

Macro F1 with one threshold a diagnosis falls apart into C problems of one variable, each solved exactly by sorting.
Exact is not the same as good on new lesions: with nine positives the best cut is noise. So what decides is the guarded
form (`guarded_thresholds`), and every choice (shrinkage, rule, fitted weights or plain mean) is made on lesions that it
was not fitted on. Shapes: N lesions, C diagnoses, M members. Probabilities are in [0, 1]; labels (N,) are all known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from triderm_dist.config import EnsembleConfig
from triderm_dist.ensemble.artifact import FITTED, MEAN, Ensemble
from triderm_dist.ensemble.thresholds import _choose_cut, adjusted_thresholds, best_thresholds, guarded_thresholds
from triderm_dist.schema import DIAGNOSES


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
