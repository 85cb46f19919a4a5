"""What came out: the table of trials, the best settings, and how sure their gain is."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triderm_dist.config import save
from triderm_dist.files import whole
from triderm_dist.search.settings import BASELINE, SearchRun
from triderm_dist.search.space import with_settings
from triderm_dist.search.trial import Trial, read_trials

if TYPE_CHECKING:
    from triderm_dist.metrics import Interval


@dataclass(frozen=True)
class Summary:
    """The trials of a search, best first; the baseline and the best of those that ran to their end, if there are any;
    and the gain of the best in macro F1 (argmax), with an interval over validation lesions.
    """

    folder: Path
    trials: list[Trial]
    baseline: Trial | None
    best: Trial | None
    gain: Interval | None
    lesions: int


def conclude(run: SearchRun) -> Summary:
    """Write OUTPUT/search/trials.csv and, once a trial ran to its end, OUTPUT/best.yaml; also of a search that is
    not over.
    """
    trials = read_trials(run.search_folder)
    baseline, best = outcome(trials)
    if best is not None:
        save(with_settings(run.experiment, run.model, best.settings), run.folder / "best.yaml")
    _write_table(run.search_folder / "trials.csv", trials, baseline)
    gain, lesions = _gain(run, baseline, best) if baseline and best else (None, 0)
    rank = {"complete": 0, "stopped": 1, "running": 2, "failed": 3}
    ordered = sorted(trials, key=lambda trial: (rank[trial.state], -(trial.macro_f1 or 0.0)))
    return Summary(run.search_folder, ordered, baseline, best, gain, lesions)


def outcome(trials: Sequence[Trial]) -> tuple[Trial | None, Trial | None]:
    """The baseline and the best of those that ran to their end."""
    complete = [trial for trial in trials if trial.state == "complete"]
    baseline = next((trial for trial in complete if trial.number == BASELINE), None)
    return baseline, max(complete, key=lambda trial: trial.macro_f1 or 0.0, default=None)


def _gain(run: SearchRun, baseline: Trial, best: Trial) -> tuple[Interval, int]:
    """Macro F1 of the best less that of the baseline over the validation lesions of all folds, and their number."""
    import numpy as np

    from triderm_dist.metrics import argmax_decisions, paired_difference
    from triderm_dist.oof import read_predictions

    logits, labels = [], []
    for trial in (best, baseline):
        folder = run.trial_folder(trial.number) / run.model
        parts = [read_predictions(folder / f"fold-{fold}" / "predictions.parquet") for fold in run.search.folds]
        logits.append(argmax_decisions(np.concatenate([part.logits for part in parts])))
        labels.append(np.concatenate([part.labels for part in parts]))
    return paired_difference(logits[0], logits[1], labels[1]), len(labels[1])


def _write_table(path: Path, trials: Sequence[Trial], baseline: Trial | None) -> None:
    keys = list(dict.fromkeys(key for trial in trials for key in trial.settings))
    with whole(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "epochs", "macro_f1", "official", "gain", "seconds", *keys, "error"])
        for trial in trials:
            gain = _gain_over(baseline, trial)
            scores = ["" if value is None else f"{value:.6f}" for value in (trial.macro_f1, trial.official, gain)]
            values = [trial.settings.get(key, "") for key in keys]
            writer.writerow([trial.number, trial.state, trial.epochs, *scores, trial.seconds, *values, trial.error])


def _gain_over(baseline: Trial | None, trial: Trial) -> float | None:
    """Of trials that ran to their end: an earlier epoch says nothing about the last."""
    if baseline is None or baseline.macro_f1 is None or trial.macro_f1 is None or trial.state != "complete":
        return None
    return trial.macro_f1 - baseline.macro_f1


def describe(settings: Mapping[str, Any]) -> str:
    """Settings on one line, by the last part of their names."""
    return "  ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in settings.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_summary(summary: Summary) -> None:
    """The table of trials, the best settings, and how sure the gain is, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"trials of {summary.folder}", title_justify="left")
    for name in ("trial", "epochs", "macro F1", "gain", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for trial in summary.trials:
        over = _gain_over(summary.baseline, trial)
        style = "bold green" if trial is summary.best else "dim" if trial.state != "complete" else ""
        table.add_row(
            str(trial.number), str(trial.epochs), "" if trial.macro_f1 is None else f"{trial.macro_f1:.3f}",
            "baseline" if trial.number == BASELINE else "" if over is None else f"{over:+.3f}", f"{trial.seconds:.0f}",
            trial.state, trial.error or describe(trial.settings), style=style,
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    best, gain = summary.best, summary.gain
    if best is None:
        return
    if best.number == BASELINE:
        console.print("no trial beats the experiment's own settings")
    elif gain is None:
        console.print(f"best: trial {best.number}; the baseline did not come to its end, so the gain is not known")
    else:
        beyond = "beyond" if gain.low > 0 else "within"
        console.print(
            f"best: trial {best.number}, {gain.value:+.3f} over the baseline on {summary.lesions} validation lesions, "
            f"95 % interval over lesions [{gain.low:+.3f}, {gain.high:+.3f}]: {beyond} the noise of the lesions"
        )
        console.print(
            f"the best of {sum(trial.state == 'complete' for trial in summary.trials)} on the lesions that chose it: "
            "expect less on new ones; training noise (other seeds) comes on top"
        )
    console.print(f"{summary.folder.parent / 'best.yaml'}: python -m launch.train --config takes it")
