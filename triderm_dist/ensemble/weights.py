"""Weights of the members on the simplex, the choice among weightings, and its nested estimate.

Every choice (thresholding, fitted weights or plain mean) is made on lesions that it was not fitted on. Shapes: N
lesions, C diagnoses, M members. Probabilities are in [0, 1]; all labels (N,) are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.config import EnsembleConfig, Experiment, mean_of_seeds, seeds_of_models
from triderm_dist.ensemble.artifact import Ensemble
from triderm_dist.ensemble.calibration import weighted_sum
from triderm_dist.ensemble.run_files import AUTO, CHOSEN, ENSEMBLE, FITTED, MEAN, STACKER
from triderm_dist.ensemble.sampling import on_all_cores, search_rows
from triderm_dist.ensemble.thresholds import Resamples, best_thresholds, choose_thresholding, thresholdings
from triderm_dist.runtime.messages import did_you_mean
from triderm_dist.schema import ConfigError


def fit_weights(
    probabilities: Sequence[np.ndarray],
    labels: np.ndarray,
    members: Sequence[str] | None = None,
    rounds: int = 30,
) -> Ensemble:
    """Fit weights for the largest macro F1 that thresholds can reach on these rows, with those exact thresholds.

    Greedy selection with replacement (Caruana et al. 2004), then steps along each weight. The score on these rows is
    biased upward, since weights and thresholds are fitted on them: judge on others (`fit_candidates`).
    """
    weights = _fit_weights(MacroF1Objective(probabilities, labels), rounds)
    names = tuple(members) if members is not None else tuple(f"member-{i}" for i in range(len(probabilities)))
    thresholds = best_thresholds(weighted_sum(weights, probabilities), labels)
    return Ensemble(names, weights, thresholds, temperatures=np.ones(len(names)))


@dataclass(frozen=True)
class FitOptions:
    """How candidates are fitted, and what is chosen among.

    config: `ensemble` of the settings.  decision: one of `schema.DECISIONS`.  seeds: the members of each model of which
    several seeds are members.
    """

    config: EnsembleConfig
    seed: int = 0
    decision: str = "threshold"
    seeds: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Candidate:
    """An ensemble fitted on all given rows, and decisions of its weighting on rows that it was not fitted on.

    rows: (N,) bool, those searched on.  decisions: (n, C) bool on these.
    """

    ensemble: Ensemble
    decisions: np.ndarray
    rows: np.ndarray


def fit_candidates(
    members: Mapping[str, np.ndarray], labels: np.ndarray, parts: np.ndarray, options: FitOptions
) -> dict[str, Candidate]:
    """Fit one candidate per weighting: each member by its name, the mean of each model's seeds by `mean_of_seeds`, and
    with two members or more `mean` and `fitted`.

    The seeds of a model share its weight equally: `mean` is the mean over models, and one weight is fitted per model.
    More seeds of one model then neither outweigh the other models nor give the fit more to choose from.

    The thresholding of each candidate is the one of `thresholdings(decision)` with the best macro F1 over `parts` (N,):
    weights and thresholds are fitted without a part, and judged on it. Both the thresholding and the weights are
    searched on `sampling.search_rows`; then thresholds are fitted on all rows.
    """
    return _fit_candidates(tuple(members), np.stack(list(members.values())), labels, parts, options)


def _fit_candidates(
    names: tuple[str, ...], stacked: np.ndarray, labels: np.ndarray, parts: np.ndarray, options: FitOptions
) -> dict[str, Candidate]:
    """Fit the candidates of `fit_candidates` on probabilities (M, N, C)."""
    rows = search_rows(labels, options.seed)
    searched, truth, parts = (stacked, labels, parts) if rows.all() else (stacked[:, rows], labels[rows], parts[rows])
    weightings: dict[str, Callable[[np.ndarray], np.ndarray]] = {}  # rows searched on, bool -> (M,) weights fitted on
    for name, weights in zip(names, np.eye(len(names)), strict=True):
        weightings[name] = lambda _, weights=weights: weights  # type: ignore[misc]
    if len(names) > 1:
        shares = _seed_shares(names, options.seeds)
        for members in options.seeds:
            (share,) = (row for row in shares if row[names.index(members[0])])
            weightings[mean_of_seeds(members[0])] = lambda _, share=share: share  # type: ignore[misc]
        models = searched if len(shares) == len(names) else np.stack([weighted_sum(row, searched) for row in shares])
        weightings[MEAN] = lambda _: shares.mean(axis=0)
        objective = ArgmaxObjective if options.decision == "argmax" else MacroF1Objective
        weightings[FITTED] = lambda some: (
            _fit_weights(objective([table[some] for table in models], truth[some]), options.config.rounds) @ shares
        )
    choices, resamples = thresholdings(options.decision, options.config), Resamples(options.seed)

    def candidate(weighting: str) -> Candidate:
        fit = weightings[weighting]
        thresholding, decisions = choose_thresholding(searched, fit, truth, parts, choices, resamples)
        weights = fit(np.ones(len(truth), bool))
        ensemble = Ensemble(
            members=names,
            weights=weights,
            thresholds=thresholding.fit(weighted_sum(weights, stacked), labels, resamples),
            rule=thresholding.rule,
            shrinkage=thresholding.shrinkage,
            tau=thresholding.tau,
            weighting=weighting,
            temperatures=np.ones(len(names)),
        )
        return Candidate(ensemble, decisions, rows)

    order = [*reversed(weightings)]  # fitted weights take longest
    fitted = dict(zip(order, on_all_cores(candidate, order, len(labels)), strict=True))
    return {weighting: fitted[weighting] for weighting in weightings}


def _seed_shares(names: Sequence[str], seeds: Sequence[Sequence[str]]) -> np.ndarray:
    """Return (models, M): the share of each member in its model, equal for the seeds of one model."""
    model_of = {name: members[0] for members in seeds for name in members}
    models = list(dict.fromkeys(model_of.get(name, name) for name in names))
    shares = np.array([[model_of.get(name, name) == model for name in names] for model in models], dtype=float)
    return shares / shares.sum(axis=1, keepdims=True)


def check_use(config: Experiment, networks: Sequence[str]) -> None:
    """Raise ConfigError where `ensemble.use` names nothing that these networks and the stacker can be combined to."""
    use, means = config.ensemble.use, map(mean_of_seeds, seeds_of_models(config.models, networks))
    known = (AUTO, ENSEMBLE, *networks, *means, *([STACKER] if config.stack.enabled else []))
    if use not in known:
        raise ConfigError(f"ensemble.use={use}: no such member; {did_you_mean(use, known)}")


def choose_weighting(scores: Mapping[str, float]) -> str:
    """Choose the ensemble's weights by the score of each weighting: `fitted` if it beats `mean` and every member, else
    `mean`. With a single member, that member.
    """
    if MEAN not in scores:
        return next(iter(scores))
    others = [score for name, score in scores.items() if name != FITTED]
    return FITTED if scores[FITTED] > max(others) else MEAN


def best_network(scores: Mapping[str, float], seeds: Sequence[Sequence[str]] = ()) -> str:
    """Return the network with the best score; the first wins ties.

    The mean of a model's seeds stands for the model: which of the seeds scores best is chance, and their mean is rarely
    worse. seeds: the members of each model of which several seeds are members.
    """
    others = {STACKER, MEAN, FITTED, *(name for members in seeds for name in members)}
    networks = {name: score for name, score in scores.items() if name not in others}
    return max(networks, key=lambda name: networks[name])


@dataclass(frozen=True)
class Choice:
    """What predicts, and why.

    used: a weighting.  ensemble: the weighting of the ensemble, `mean` or `fitted`.  network: the best one, or the best
    mean of a model's seeds.  scores: nested macro F1 by weighting.  over_network: nested macro F1 of the ensemble minus
    that of the network.  over_stacker: minus that of the stacker, if there is one.  nested_score: macro F1 of this
    choice if it is made in each fold on the other folds too.
    """

    used: str
    ensemble: str
    network: str
    scores: Mapping[str, float]
    over_network: intervals.Interval
    over_stacker: intervals.Interval | None
    nested_score: float

    def json(self) -> dict[str, Any]:
        """Return what ensemble.json stores as `choice`."""
        return {
            "used": self.used,
            "ensemble": self.ensemble,
            "network": self.network,
            "difference": self.over_network.json(),
            "stacker": self.over_stacker.json() if self.over_stacker else None,
            "counted": self.nested_score,
        }


@dataclass(frozen=True)
class NestedEstimate:
    """Decisions on every lesion by weights and thresholds fitted on the other folds.

    decisions: (N, C) bool by weighting (those of `fit_candidates`, and `chosen`).  probabilities: (N, C) of
    the chosen weighting.  picks: what was chosen for each fold, on the other folds.  choice: what predicts; None with a
    single member.
    """

    decisions: dict[str, np.ndarray]
    probabilities: np.ndarray
    picks: dict[int, str]
    choice: Choice | None = None


def nested_estimate(
    members_without: Callable[[int], Mapping[str, np.ndarray]],
    labels: np.ndarray,
    folds: np.ndarray,
    parts_without: Callable[[int], np.ndarray],
    options: FitOptions,
    groups: np.ndarray | None = None,
) -> NestedEstimate:
    """Fit weights and thresholds, and choose among them, on the other folds of each fold; apply them to the fold.

    members_without(k): the members' (N, C), which no label of fold k has influenced.  parts_without(k): (N,) parts for
    the inner choice, used on the rows outside k.  groups: (N,), None if each lesion is its own.

    In each fold, the weights of the ensemble and the best network are chosen on the other folds. Under
    `config.use=auto` the ensemble is `chosen` if it beats the network that is best over all lesions beyond the noise of
    their paired difference, else the best network: the one choice that is made on all lesions.
    """
    decisions: dict[str, np.ndarray] = {}
    picked: dict[str, np.ndarray] = {}
    probabilities: dict[str, np.ndarray] = {}
    picks: dict[str, dict[int, str]] = {}
    for fold in np.unique(folds).tolist():
        inside, outside = folds == fold, folds != fold
        members = members_without(fold)
        names, held_out = tuple(members), [table[inside] for table in members.values()]
        stacked = np.stack([table[outside] for table in members.values()])
        del members
        parts = parts_without(fold)[outside]
        candidates = _fit_candidates(names, stacked, labels[outside], parts, options)
        shape = len(labels), stacked.shape[2]
        del stacked
        searched = np.flatnonzero(outside)[next(iter(candidates.values())).rows]
        for weighting, candidate in candidates.items():
            decisions.setdefault(weighting, np.zeros(shape, bool))[inside] = candidate.ensemble.decide(held_out)
        picks_of_fold = _pick(candidates, labels[searched], None if groups is None else groups[searched], options)
        for name, weighting in picks_of_fold.items():
            picks.setdefault(name, {})[fold] = weighting
            picked.setdefault(name, np.zeros(shape, bool))[inside] = decisions[weighting][inside]
            combined = candidates[weighting].ensemble.combine(held_out)
            probabilities.setdefault(name, np.full(shape, np.nan))[inside] = combined
    choice, given = None, ENSEMBLE
    if len(decisions) > 1:
        choice, use = _choose(decisions, picked, labels, groups, options), options.config.use
        given = use if use != AUTO else _NETWORK if choice.used == choice.network else ENSEMBLE
    return NestedEstimate({**decisions, CHOSEN: picked[given]}, probabilities[given], picks[given], choice)


_NETWORK = "network"
"""Among what is picked for a fold: the network that is best on the other folds."""


def _pick(
    candidates: Mapping[str, Candidate], labels: np.ndarray, groups: np.ndarray | None, options: FitOptions
) -> dict[str, str]:
    """Return the weighting of the ensemble, the best network, the automatic choice between these two, and the weighting
    that `config.use` names, each by its name.

    labels, groups: (n,), of the rows that the candidates' decisions are on.
    """
    config = options.config
    scores = {name: metrics.macro_f1(each.decisions, labels) for name, each in candidates.items()}
    picked = {ENSEMBLE: choose_weighting(scores)}  # of a single member, that member
    if len(candidates) > 1:
        picked[_NETWORK] = best_network(scores, options.seeds)
        first, second = (candidates[name].decisions for name in picked.values())
        gap = intervals.macro_f1_difference(first, second, labels, groups, config.bootstrap, options.seed)
        picked[AUTO] = picked[ENSEMBLE if gap.low > 0 else _NETWORK]
    if config.use not in (AUTO, ENSEMBLE):
        picked[config.use] = config.use
    return picked


def _choose(
    decisions: Mapping[str, np.ndarray],
    picked: Mapping[str, np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray | None,
    options: FitOptions,
) -> Choice:
    """Choose what predicts by the nested decisions of each weighting, and of what was picked for each fold."""
    config = options.config
    scores = {name: metrics.macro_f1(table, labels) for name, table in decisions.items()}
    ensemble, network = choose_weighting(scores), best_network(scores, options.seeds)
    over_network, over_stacker = (
        intervals.macro_f1_difference(picked[ENSEMBLE], decisions[name], labels, groups, config.bootstrap, options.seed)
        if name in scores
        else None
        for name in (network, STACKER)
    )
    assert over_network is not None
    used = {ENSEMBLE: ensemble, AUTO: ensemble if over_network.low > 0 else network}.get(config.use, config.use)
    nested_score = metrics.macro_f1(picked[AUTO], labels)
    return Choice(used, ensemble, network, scores, over_network, over_stacker, nested_score)


class MacroF1Objective:
    """Macro F1 under the best thresholds, as a function of weights; about a quarter of a millisecond per call.

    Positive floats sort as their bits do, so the label is stored in the lowest bit of the score and one plain sort of
    integers orders both. This costs the last bit of a float32: exact thresholds are fitted afterwards, from the scores.
    """

    def __init__(self, probabilities: Sequence[np.ndarray], labels: np.ndarray) -> None:
        self.tables = np.stack([np.ascontiguousarray(table.T, np.float32) for table in probabilities])
        self.truth = (labels[None] == np.arange(self.tables.shape[1])[:, None]).astype(np.int32)
        positives = self.truth.sum(axis=1, keepdims=True)
        self.occurs = positives[:, 0] > 0
        self.denominators = np.arange(1, len(labels) + 1, dtype=np.float32) + positives.astype(np.float32)

    def mix(self, weights: np.ndarray) -> np.ndarray:
        """Return the (C, N) float32 weighted mean of the members."""
        return np.tensordot(weights.astype(np.float32), self.tables, axes=1)

    def __call__(self, mixed: np.ndarray) -> float:
        keys = ((0x7FFFFFFF - mixed.view(np.int32)) & ~1) | self.truth
        keys.sort(axis=1)
        true_positives = np.cumsum(keys & 1, axis=1, dtype=np.float32)
        return float((2 * true_positives / self.denominators).max(axis=1)[self.occurs].mean())


class ArgmaxObjective(MacroF1Objective):
    """Macro F1 where the most probable diagnosis is predicted, as a function of weights."""

    def __init__(self, probabilities: Sequence[np.ndarray], labels: np.ndarray) -> None:
        super().__init__(probabilities, labels)
        self.labels = labels

    def __call__(self, mixed: np.ndarray) -> float:
        return metrics.argmax_macro_f1(mixed.T, self.labels)


def _fit_weights(objective: MacroF1Objective, rounds: int) -> np.ndarray:
    """Fit (M,) weights on the simplex: greedy selection with replacement, then refinement; equal without a lesion."""
    members = len(objective.tables)
    if not objective.occurs.any():  # of two folds, one may hold a single group of each diagnosis
        return np.full(members, 1 / members)
    counts, total = np.zeros(members), np.zeros_like(objective.tables[0])
    weights, best, rounds_without_gain = np.full(members, 1 / members), -1.0, 0
    for size in range(1, rounds + 1):
        scores = [objective((total + table) / np.float32(size)) for table in objective.tables]
        pick = int(np.argmax(scores))
        counts[pick] += 1
        total += objective.tables[pick]
        if scores[pick] > best:
            weights, best, rounds_without_gain = counts / size, scores[pick], 0
        else:
            rounds_without_gain += 1
            if rounds_without_gain == 4:  # after so many rounds without gain, no improvement was observed
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
