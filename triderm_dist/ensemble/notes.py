"""Notes on a fit, one sentence each: what was chosen, and why."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from triderm_dist import metrics
from triderm_dist.config import Experiment, seeds_of_models
from triderm_dist.ensemble.run_files import AUTO, ENSEMBLE, FITTED
from triderm_dist.ensemble.score_table import TITLES
from triderm_dist.ensemble.weights import Choice, NestedEstimate
from triderm_dist.intervals import MOST_DECIMALS, Interval


def explain_columns(kept: str, scores: Mapping[str, float]) -> str:
    """Describe the choice of extra columns. scores: nested macro F1 by argmax of each choice, "" for none."""
    others = ", ".join(f"{score:.3f} with {extra}" for extra, score in scores.items() if extra)
    return f"extra columns of the stacker, nested macro F1 by argmax: {scores['']:.3f} without, {others}; " + (
        f"{kept} are kept" if kept else "none is kept"
    )


def explain_choice(choice: Choice, use: str) -> list[str]:
    """Describe the choice of the ensemble's weights and of what predicts, one sentence each. use: `ensemble.use`."""
    scores, network = choice.scores, choice.network
    others = {name: score for name, score in scores.items() if name != FITTED}
    best = max(others, key=lambda name: others[name])
    fitted, other = _distinct_texts(scores[FITTED], others[best])
    other = f"{TITLES.get(best, best)} ({other})"
    if choice.ensemble == FITTED:
        weights = f"the ensemble has fitted weights: their nested score {fitted} on these lesions beats {other}"
    else:
        weights = f"the ensemble is the plain mean: the nested score of fitted weights ({fitted}) does not beat {other}"
    # Of the ensemble, whose weights are chosen in each fold on the other folds, so that it may equal no row.
    own = scores[network] + choice.over_network.value
    compared = f"the ensemble ({own:.3f}, its weights chosen for each fold on the other folds) "
    compared += _beats(f"its best network, {network} ({scores[network]:.3f}),", choice.over_network)
    if choice.over_stacker:
        compared += f"; it {_beats('the stacker', choice.over_stacker)}"
    if use != AUTO:
        what = "the ensemble" if use == ENSEMBLE else use
        return [weights, f"as ensemble.use says, {what} predicts; {compared}"]
    nested = (
        f"this choice was made on all these lesions; made for each fold on the other folds, it scores "
        f"{choice.nested_score:.3f}"
    )
    if choice.used == network:
        return [weights, f"one model predicts: {network}; {compared}; {nested}"]
    return [weights, f"the ensemble predicts; {compared}; {nested}"]


def seed_spread(models: tuple[str, ...], nested: NestedEstimate, labels: np.ndarray, config: Experiment) -> list[str]:
    """Return notes on the nested macro F1 of models that were trained with several seeds."""
    notes = []
    for name, seeds in seeds_of_models(config.models, models).items():
        scores = [metrics.macro_f1(nested.decisions[each], labels) for each in seeds]
        spread = f"{min(scores):.3f} to {max(scores):.3f}, standard deviation {np.std(scores, ddof=1):.3f}"
        notes.append(f"{name}: nested macro F1 of its {len(seeds)} seeds {spread}; they share one weight")
    return notes


def biased_scores(models: tuple[str, ...], config: Experiment) -> list[str]:
    """Return notes on models whose epoch was selected on the lesions that they predict."""
    return [
        f"{model} kept the epoch that was best on the fold it predicts (train.select=best): its scores are too high"
        for model in models
        if model in config.models and config.models[model].train.select == "best"
    ]


def _distinct_texts(one: float, other: float) -> tuple[str, str]:
    """Return the texts of two scores, with more decimals than three where these are the same."""
    texts = ((f"{one:.{decimals}f}", f"{other:.{decimals}f}") for decimals in range(3, MOST_DECIMALS + 1))
    return next((pair for pair in texts if pair[0] != pair[1]), (f"{one:.3f}", f"{other:.3f}"))


def _beats(rival: str, gap: Interval) -> str:
    """Say whether the ensemble beats a rival. gap: their difference."""
    beats = f"{'beats' if gap.low > 0 else 'does not beat'} {rival} beyond the noise"
    value, low, high = gap.signed()
    return f"{beats} (nested difference {value}, {low} to {high})"
