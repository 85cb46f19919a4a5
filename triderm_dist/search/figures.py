"""Figures of a search, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from triderm_dist.report.elements import Figure
from triderm_dist.report.style import BLUE, GRAY, INK, MEDIUM, ORANGE, PAPER, WIDE
from triderm_dist.search.results import Summary
from triderm_dist.search.settings import BASELINE
from triderm_dist.search.space import Domain
from triderm_dist.search.trial import Trial

Draw = Callable[[Any, "list[_Axis]", list[Trial], Summary], None]

CAPTIONS = {
    "curves": "One line per trial. A cross marks the end of a stopped trial; a diamond marks where a trial of pbt "
    "copied a leading one: the curve before it is that trial’s.",
    "importance": "Share of the variance of the scores that a setting explains, by a random forest (fANOVA). Bars: "
    "5 to 95% over resamples of the trials; with a dozen trials only bars that do not overlap are informative. Stopped "
    "trials count with the score at which they were stopped.",
    "settings": "One point per trial. Settings vary together: a trend may be due to another setting.",
    "parallel": "One line per trial, darker for a higher macro F1; dotted: stopped.",
}


def figures_of(summary: Summary) -> list[Figure]:
    """Return the figures of a search that have data: curves, importance, settings and parallel."""
    trials = [trial for trial in summary.trials if trial.macro_f1 is not None]
    axes = [_Axis(key, domain) for key, domain in summary.space.items()]

    def figure(name: str, draw: Draw, size: tuple[float, float], alt: str) -> Figure:
        return Figure(name, lambda canvas: draw(canvas, axes, trials, summary), alt, CAPTIONS[name], size)

    figures = []
    if trials:
        alt = f"Macro F1 after each epoch of {len(trials)} trials; crosses where a trial was stopped."
        figures.append(figure("curves", _draw_curves, (WIDE, 4.8), alt))
    if summary.importance:
        shares = ", ".join(f"{key} {share.value:.2f}" for key, share in summary.importance.items())
        size = (MEDIUM, 1.3 + 0.38 * len(axes))
        figures.append(figure("importance", _draw_importance, size, f"Importance of each setting: {shares}"))
    if trials:
        alt = f"Macro F1 of {len(trials)} trials against each of {len(axes)} settings."
        figures.append(figure("settings", _draw_settings, (WIDE, 0.6 + 2.6 * math.ceil(len(axes) / 3)), alt))
        alt = f"Each of {len(trials)} trials is a line through its {len(axes)} settings, colored by macro F1."
        figures.append(figure("parallel", _draw_parallel, (2.6 + 1.35 * len(axes), 5.2), alt))
    return figures


def _draw_curves(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> None:
    plot = figure.subplots()
    labeled: set[str] = set()
    for trial in sorted(trials, key=_drawing_order(summary)):
        epochs = range(1, len(trial.curve) + 1)
        if trial is summary.best:
            style: dict[str, Any] = {"color": ORANGE, "lw": 2.6, "label": f"best: trial {trial.number}"}
        elif trial.number == BASELINE:
            style = {"color": INK, "lw": 2.2, "ls": "--", "label": "the experiment's own settings"}
        elif trial.state == "complete":
            style = {"color": BLUE, "lw": 1.2, "alpha": 0.7, "label": "complete"}
        else:
            style = {"color": GRAY, "lw": 1.0, "alpha": 0.8, "label": "stopped early"}
        style["label"] = "" if style["label"] in labeled else style["label"]
        labeled.add(style["label"])
        plot.plot(epochs, trial.curve, marker="o", ms=3, zorder=3, **style)
        if trial.state != "complete":
            plot.plot(len(trial.curve), trial.curve[-1], "x", color=style["color"], ms=7, mew=1.6, zorder=4)
        for change in trial.changes:
            plot.plot(change["epoch"], trial.curve[change["epoch"] - 1], "D", color=style["color"], ms=6, zorder=4)
    last = max(len(trial.curve) for trial in trials)
    plot.set_xlim(0.8 if last > 1 else 0.5, last + (0.2 if last > 1 else 0.5))
    plot.xaxis.get_major_locator().set_params(integer=True)
    plot.set_xlabel("epoch" if len(summary.run.search.folds) == 1 else "epoch, over all folds")
    plot.set_ylabel("macro F1 (argmax)")
    figure.legend(*plot.get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _drawing_order(summary: Summary) -> Callable[[Trial], tuple[int, float]]:
    """Return the key that draws stopped trials first, the baseline and the best trial last."""

    def order(trial: Trial) -> tuple[int, float]:
        lead = 3 if trial is summary.best else 2 if trial.number == BASELINE else int(trial.state == "complete")
        return lead, trial.macro_f1 or 0.0

    return order


def _draw_importance(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> None:
    plot = figure.subplots()
    shares = list(summary.importance.items())[::-1]
    positions = range(len(shares))
    values = [share.value for _, share in shares]
    # The range over resamples need not contain the estimate.
    errors = [[max(0.0, v - s.low) for v, (_, s) in zip(values, shares, strict=True)],
           [max(0.0, s.high - v) for v, (_, s) in zip(values, shares, strict=True)]]  # fmt: skip
    error_style = {"ecolor": INK, "elinewidth": 1, "capsize": 3}
    plot.barh(positions, values, height=0.6, color=BLUE, xerr=errors, error_kw=error_style)
    plot.set_yticks(positions, [key.removeprefix("train.") for key, _ in shares])
    plot.grid(False, axis="y")
    plot.set_xlim(0, 1)
    plot.set_xlabel(f"share of the variance of macro F1 (fANOVA, {len(trials)} trials)")


class _Axis:
    """One setting as an axis from 0 to 1: positions of values, and ticks."""

    def __init__(self, key: str, domain: Domain) -> None:
        self.key, self.domain = key, domain
        self.title = key.removeprefix("train.").replace(".", "\n")

    def position(self, value: Any) -> float:
        if self.domain.kind == "choice":
            return self.domain.values.index(value) / max(1, len(self.domain.values) - 1)
        low, high = (self._scale(end) for end in self.domain.values)
        return (self._scale(value) - low) / (high - low)

    def ticks(self) -> tuple[list[float], list[str]]:
        values = list(self.domain.values)
        if self.domain.kind != "choice":
            low, high = values
            middle = math.sqrt(low * high) if self.domain.kind == "loguniform" else (low + high) / 2
            values = [low, middle, high] if self.domain.kind != "randint" else [low, high]
        texts = [f"{value:.2g}" if isinstance(value, float) else str(value) for value in values]
        return [self.position(value) for value in values], texts

    def _scale(self, value: float) -> float:
        return math.log(value) if self.domain.kind == "loguniform" else float(value)


def _draw_settings(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> None:
    columns = min(3, len(axes))
    grid = figure.subplots(math.ceil(len(axes) / columns), columns, squeeze=False, sharey=True)
    kinds = [
        ("stopped early (at an earlier epoch)", [t for t in trials if t.state != "complete"], GRAY, "x", 30),
        ("complete", [t for t in trials if t.state == "complete"], BLUE, "o", 36),
        ("the experiment's own settings", [t for t in trials if t.number == BASELINE], INK, "D", 60),
        ("best", [t for t in trials if t is summary.best], ORANGE, "*", 160),
    ]
    for plot, axis in zip(grid.flat, axes, strict=False):
        for label, some, color, marker, size in kinds:
            x, y = [axis.position(trial.settings[axis.key]) for trial in some], [trial.macro_f1 for trial in some]
            plot.scatter(x, y, size, color, marker, label=label, zorder=3)
        plot.set_xticks(*axis.ticks())
        plot.set_xlim(-0.05, 1.05)
        plot.set_xlabel(axis.key.removeprefix("train.") + (" (log)" if axis.domain.kind == "loguniform" else ""))
    for plot in grid.flat[len(axes) :]:
        plot.set_axis_off()
    for row in grid:
        row[0].set_ylabel("macro F1 (argmax)")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _draw_parallel(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    plot = figure.subplots()
    scores = [trial.macro_f1 or 0.0 for trial in trials]
    low, high = min(scores), max(scores)
    colors = ScalarMappable(Normalize(low, high), "viridis_r")
    positions = range(len(axes))
    # Low scores first, so that high ones are drawn over them.
    for trial in sorted(trials, key=lambda trial: trial.macro_f1 or 0.0):
        complete = trial.state == "complete"
        shade = ((trial.macro_f1 or 0.0) - low) / ((high - low) or 1.0)
        style: dict[str, Any] = {"color": colors.cmap(shade), "lw": 1.6 if complete else 0.9}
        style["linestyle"] = "-" if complete else ":"
        if trial.number == BASELINE:
            style |= {"color": INK, "lw": 2.2, "linestyle": "--", "label": "the experiment's own settings"}
        if trial is summary.best:
            own = ": the experiment's own settings" if trial.number == BASELINE else ""
            style |= {"color": ORANGE, "lw": 3.0, "label": f"best{own}"}
        plot.plot(positions, [axis.position(trial.settings[axis.key]) for axis in axes], **style)
    for x, axis in enumerate(axes):
        for y, text in zip(*axis.ticks(), strict=True):
            plot.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK,
                           bbox={"facecolor": PAPER, "alpha": 0.75, "pad": 0.8, "edgecolor": "none"})  # fmt: skip
        plot.axvline(x, color=GRAY, lw=1, zorder=0)
    plot.set_xticks(list(positions), [axis.title for axis in axes])
    plot.set_yticks([])
    plot.grid(False)
    plot.spines[["left", "bottom"]].set_visible(False)
    plot.set_xlim(-0.15, len(axes) - 0.5)
    figure.colorbar(colors, ax=plot, label="macro F1 (argmax); dotted: stopped early", pad=0.02)
    if handles := plot.get_legend_handles_labels()[0]:
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
