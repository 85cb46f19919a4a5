"""Results of a search: table of trials, best settings, uncertainty of their gain, importance of each setting."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from triderm_dist.config import save
from triderm_dist.files import atomic_path
from triderm_dist.runtime.extras import require
from triderm_dist.search.settings import BASELINE, SearchRun
from triderm_dist.search.space import Space, read_space, with_settings
from triderm_dist.search.trial import Trial, read_trials

if TYPE_CHECKING:
    from triderm_dist.intervals import Interval

MIN_TRIALS = 8
"""Importance is estimated from at least this many trials."""
RESAMPLES = 40


@dataclass(frozen=True)
class Repeats:
    """Macro F1 of the baseline and of the best trial, trained again with other seeds.

    seeds, baseline, best: of equal length, one entry per seed.  gain: mean of best - baseline with its 95% interval
    over seeds (paired t), NaN for a single seed.
    """

    seeds: list[int]
    baseline: list[float]
    best: list[float]
    gain: Interval


@dataclass(frozen=True)
class Summary:
    """The results of a search.

    trials: best first.  baseline, best: of the complete trials, None if there is none.  gain: of the best in macro
    F1 (argmax), with a 95% interval over the `lesions` validation lesions.  repeats: with other seeds.  importance: of
    each setting, the most important first, with its range over resamples of the trials.
    """

    run: SearchRun
    space: Space
    trials: list[Trial]
    baseline: Trial | None
    best: Trial | None
    gain: Interval | None
    lesions: int
    repeats: Repeats | None
    importance: dict[str, Interval]

    @property
    def folder(self) -> Path:
        return self.run.search_folder


def summarize(run: SearchRun) -> Summary:
    """Summarize a search, also an unfinished one.

    Writes OUTPUT/search/trials.csv and, once a trial is complete, OUTPUT/best.yaml.
    """
    folder, space = run.search_folder, read_space(run.search_folder / "space.yaml")
    trials = read_trials(folder)
    baseline, best = baseline_and_best(trials)
    if best is not None:
        save(with_settings(run.experiment, run.model, best.settings), run.folder / "best.yaml")
    _write_table(folder / "trials.csv", [*trials, *read_trials(folder, repeats=True)], baseline)
    gain, lesions = _gain(run, baseline, best) if baseline and best else (None, 0)
    repeats = _read_repeats(folder, baseline, best) if baseline and best else None
    rank = {"complete": 0, "stopped": 1, "running": 2, "failed": 3}
    ordered = sorted(trials, key=lambda trial: (rank[trial.state], -(trial.macro_f1 or 0.0)))
    return Summary(run, space, ordered, baseline, best, gain, lesions, repeats, importance(trials, space))


def baseline_and_best(trials: Sequence[Trial]) -> tuple[Trial | None, Trial | None]:
    """Return the baseline and the best of the complete trials."""
    complete = [trial for trial in trials if trial.state == "complete"]
    baseline = next((trial for trial in complete if trial.number == BASELINE), None)
    return baseline, max(complete, key=lambda trial: trial.macro_f1 or 0.0, default=None)


def _gain(run: SearchRun, baseline: Trial, best: Trial) -> tuple[Interval, int]:
    """Return the difference in macro F1 over the validation lesions of all folds, and the number of lesions."""
    from triderm_dist.intervals import macro_f1_difference
    from triderm_dist.metrics import argmax_decisions
    from triderm_dist.predictions import read_predictions

    logits, labels = [], []
    for trial in (best, baseline):
        folder = run.trial_folder(trial.number) / run.model
        parts = [read_predictions(folder / f"fold-{fold}" / "predictions.parquet") for fold in run.search.folds]
        logits.append(argmax_decisions(np.concatenate([part.logits for part in parts])))
        labels.append(np.concatenate([part.labels for part in parts]))
    groups = np.concatenate([part.groups for part in parts])
    return macro_f1_difference(logits[0], logits[1], labels[1], groups), len(labels[1])


def _read_repeats(folder: Path, baseline: Trial, best: Trial) -> Repeats | None:
    from triderm_dist.intervals import student_mean

    done = {
        (trial.number, trial.seed): trial.macro_f1
        for trial in read_trials(folder, repeats=True)
        if trial.state == "complete"
        and trial.macro_f1 is not None
        and any(trial.settings == one.settings for one in (baseline, best) if one.number == trial.number)
    }
    seeds = sorted(seed for number, seed in done if number == best.number and (baseline.number, seed) in done)
    if best.number == baseline.number or not seeds:
        return None
    first, second = ([done[trial.number, seed] for seed in seeds] for trial in (baseline, best))
    return Repeats(seeds, first, second, student_mean(np.subtract(second, first)))


def importance(trials: Sequence[Trial], space: Space) -> dict[str, Interval]:
    """Return the share of the scores' variance that each setting explains, with a range over resamples of the trials.

    By fANOVA (Hutter et al. 2014; a random forest, Optuna's implementation). The range is from the 5% to the 95%
    quantile, and wide with a dozen trials. Stopped trials count with their last score. Empty for fewer than
    `MIN_TRIALS` trials, for a single setting, if all scores are equal, and if settings changed during training.
    """
    scored = [(trial.settings, float(trial.macro_f1)) for trial in trials if trial.macro_f1 is not None]
    if len(scored) < MIN_TRIALS or len(space) < 2 or any(trial.changes for trial in trials):
        return {}
    from triderm_dist.intervals import Interval

    estimate = _fanova(scored, space)
    generator = np.random.default_rng(0)
    draws = [_fanova([scored[i] for i in generator.integers(0, len(scored), len(scored))], space)
             for _ in range(RESAMPLES)]  # fmt: skip
    found = {}
    for key in sorted(estimate, key=lambda key: -estimate[key]):
        low, high = np.quantile([draw[key] for draw in draws if draw], [0.05, 0.95])
        found[key] = Interval(estimate[key], float(low), float(high))
    return found


def _fanova(scored: Sequence[tuple[Mapping[str, Any], float]], space: Space) -> dict[str, float]:
    require("the importance of settings", "optuna", "sklearn")
    import optuna
    from optuna.importance import FanovaImportanceEvaluator

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: domain.distribution() for key, domain in space.items()}
    study = optuna.create_study(direction="maximize")
    for settings, score in scored:
        # Rounded to six digits, a setting may be outside its range.
        params = {key: domain.clipped(settings[key]) for key, domain in space.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
    try:
        found = FanovaImportanceEvaluator(seed=0).evaluate(study)
    except RuntimeError:  # all scores are equal
        return {}
    return {key: float(found.get(key, 0.0)) for key in space}


def _write_table(path: Path, trials: Sequence[Trial], baseline: Trial | None) -> None:
    keys = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "seed", "state", "epochs", "macro_f1", "official", "gain", "seconds", *keys, "error"])
        for trial in trials:
            gain = gain_over(baseline, trial)
            scores = ["" if value is None else f"{value:.6f}" for value in (trial.macro_f1, trial.official, gain)]
            values = [trial.settings.get(key, "") for key in keys]
            about = [trial.number, trial.seed, trial.state, trial.epochs]
            writer.writerow([*about, *scores, trial.seconds, *values, trial.error])


def gain_over(baseline: Trial | None, trial: Trial) -> float | None:
    """Return the gain of a complete trial with the baseline's seed; None for others, whose epochs differ."""
    if baseline is None or baseline.macro_f1 is None or trial.macro_f1 is None:
        return None
    return trial.macro_f1 - baseline.macro_f1 if trial.state == "complete" and not trial.seed else None


def format_settings(settings: Mapping[str, Any]) -> str:
    """Format settings on one line, by the last part of their names."""
    return "  ".join(f"{key.rpartition('.')[2]} {format_value(value)}" for key, value in settings.items())


def format_value(value: Any) -> str:
    """Format the value of a setting with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def remarks(trial: Trial) -> str:
    """Format a trial's settings on one line, or its error; and the trials that it copied."""
    copied = "".join(f"  (copied trial {change['trial']} at epoch {change['epoch']})" for change in trial.changes)
    return trial.error or format_settings(trial.settings) + copied


def verdict(summary: Summary) -> list[str]:
    """Summarize a search in sentences: the gain of the best trial, and its noise over lesions and seeds."""
    best, gain, repeats = summary.best, summary.gain, summary.repeats
    states = Counter(trial.state for trial in summary.trials)
    complete = states["complete"]
    sentences = [
        f"{len(summary.trials)} trials: {complete} complete, {states['stopped']} stopped early, "
        f"{states['failed']} failed" + (f", {states['running']} running." if states["running"] else ".")
    ]
    if best is None:
        return sentences
    if best.number == BASELINE:
        return [*sentences, "No trial is better than the experiment's own settings."]
    if gain is None:
        return [*sentences, f"Best: trial {best.number}; the baseline is not complete, so the gain is unknown."]
    value, low, high = gain.signed()
    sentences += [
        f"Best: trial {best.number}, {value} over the baseline on {summary.lesions} validation lesions, "
        f"95% interval over lesions [{low}, {high}]: {_noise(gain)} the noise of the lesions.",
        f"It was selected among {complete} on these lesions: expect a smaller gain on new ones.",
    ]
    if best.changes:
        sentences.append(
            "It changed its settings during training (see trial.json); best.yaml has the last ones, and trains "
            "with them from the start."
        )
    if repeats is None:
        sentences.append("Other seeds were not trained; search.seeds=3 resume=true trains them.")
    elif len(repeats.seeds) == 1:
        sentences.append(
            f"With one other seed the difference is {repeats.gain.signed()[0]}; more seeds would show its noise."
        )
    else:
        first, second = (f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}"
                         for scores in (repeats.baseline, repeats.best))  # fmt: skip
        value, low, high = repeats.gain.signed()
        sentences.append(
            f"With {len(repeats.seeds)} other seeds the baseline has {first}, the best settings have {second}; mean "
            f"difference {value}, 95% interval over seeds [{low}, {high}]: {_noise(repeats.gain)} the noise of the "
            "seeds."
        )
    return sentences


def _noise(gain: Interval) -> str:
    return "beyond" if gain.excludes_zero else "within"


def print_summary(summary: Summary) -> None:
    """Print the table of trials and the summary."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"trials of {summary.folder}", title_justify="left")
    for name in ("trial", "epochs", "macro F1", "gain", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for trial in summary.trials:
        gain = gain_over(summary.baseline, trial)
        style = "bold green" if trial is summary.best else "dim" if trial.state != "complete" else ""
        table.add_row(
            str(trial.number), str(trial.epochs), "" if trial.macro_f1 is None else f"{trial.macro_f1:.3f}",
            "baseline" if trial.number == BASELINE else "" if gain is None else f"{gain:+.3f}", f"{trial.seconds:.0f}",
            trial.state, remarks(trial), style=style,
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    for sentence in verdict(summary):
        console.print(sentence)
    if summary.importance:
        shares = [f"{key.rpartition('.')[2]} {share.value:.2f} [{share.low:.2f}, {share.high:.2f}]"
                  for key, share in summary.importance.items()]  # fmt: skip
        console.print("Importance (fANOVA; range over resamples of the trials): " + ", ".join(shares))
    if summary.best is not None:
        console.print(f"{summary.run.folder / 'best.yaml'}: the best settings, for --config")
