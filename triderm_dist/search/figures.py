"""Pictures of a search."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triderm_dist.search.results import Summary
from triderm_dist.search.settings import BASELINE
from triderm_dist.search.space import Domain
from triderm_dist.search.trial import Trial


def draw_summary(summary: Summary) -> dict[Path, str]:
    """Draw SEARCH/curves.png, importance.png, settings.png and parallel.png: {path: what it shows}. Pictures without
    data are left out, and removed where they are of an earlier time.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from triderm_dist.report.figures import STYLE

    trials = [trial for trial in summary.trials if trial.macro_f1 is not None]
    # Every trial has the same settings.
    axes = [_Axis(key, domain) for key, domain in summary.space.items()]
    rows = math.ceil(len(axes) / 3)
    pictures: list[tuple[str, tuple[float, float], Callable[..., str], bool]] = [
        ("curves", (9.0, 4.8), _draw_curves, bool(trials)),
        ("importance", (7.2, 1.3 + 0.38 * len(axes)), _draw_importance, bool(summary.importance)),
        ("settings", (10.0, 0.6 + 2.8 * rows), _draw_settings, bool(trials)),
        ("parallel", (2.6 + 1.35 * len(axes), 5.2), _draw_parallel, bool(trials)),
    ]
    words = {}
    with matplotlib.rc_context(dict[Any, Any](STYLE)):
        for name, size, draw, wanted in pictures:
            path = summary.folder / f"{name}.png"
            if not wanted:
                path.unlink(missing_ok=True)
                continue
            figure = Figure(figsize=size, layout="constrained")
            words[path] = draw(figure, axes, trials, summary)
            beside = path.with_name(f"{name}.part.png")
            figure.savefig(beside, metadata={"Software": None})
            beside.replace(path)
    return words


def _draw_curves(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> str:
    from triderm_dist.report.figures import BLUE, GRAY, INK, ORANGE

    place = figure.subplots()
    said: set[str] = set()
    for trial in sorted(trials, key=_on_top(summary)):
        epochs = range(1, len(trial.curve) + 1)
        if trial is summary.best:
            style: dict[str, Any] = {"color": ORANGE, "lw": 2.6, "label": f"best: trial {trial.number}"}
        elif trial.number == BASELINE:
            style = {"color": INK, "lw": 2.2, "ls": "--", "label": "the experiment's own settings"}
        elif trial.state == "complete":
            style = {"color": BLUE, "lw": 1.2, "alpha": 0.7, "label": "ran to the end"}
        else:
            style = {"color": GRAY, "lw": 1.0, "alpha": 0.8, "label": "stopped early"}
        style["label"] = "" if style["label"] in said else style["label"]
        said.add(style["label"])
        place.plot(epochs, trial.curve, marker="o", ms=3, zorder=3, **style)
        if trial.state != "complete":
            place.plot(len(trial.curve), trial.curve[-1], "x", color=style["color"], ms=7, mew=1.6, zorder=4)
        for change in trial.changes:
            place.plot(change["epoch"], trial.curve[change["epoch"] - 1], "D", color=style["color"], ms=6, zorder=4)
    last = max(len(trial.curve) for trial in trials)
    place.set_xlim(0.8 if last > 1 else 0.5, last + (0.2 if last > 1 else 0.5))
    place.xaxis.get_major_locator().set_params(integer=True)
    place.set_xlabel("epoch" if len(summary.run.search.folds) == 1 else "epoch, over all folds")
    place.set_ylabel("macro F1 (argmax)")
    figure.legend(*place.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return f"Macro F1 after each epoch of {len(trials)} trials; crosses where a trial was stopped."


def _on_top(summary: Summary) -> Callable[[Trial], tuple[int, float]]:
    """Stopped trials lie below, the baseline and the best on top."""

    def order(trial: Trial) -> tuple[int, float]:
        lead = 3 if trial is summary.best else 2 if trial.number == BASELINE else int(trial.state == "complete")
        return lead, trial.macro_f1 or 0.0

    return order


def _draw_importance(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> str:
    from triderm_dist.report.figures import BLUE, INK

    place = figure.subplots()
    shares = list(summary.importance.items())[::-1]
    at = range(len(shares))
    values = [share.value for _, share in shares]
    # The range over resamples need not hold the value itself.
    off = [[max(0.0, v - s.low) for v, (_, s) in zip(values, shares, strict=True)],
           [max(0.0, s.high - v) for v, (_, s) in zip(values, shares, strict=True)]]  # fmt: skip
    place.barh(at, values, height=0.6, color=BLUE, xerr=off, error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3})
    place.set_yticks(at, [key.removeprefix("train.") for key, _ in shares])
    place.grid(False, axis="y")
    place.set_xlim(0, 1)
    place.set_xlabel(f"share of the variance of macro F1 (fANOVA, {len(trials)} trials)")
    return "Importance of each setting: " + ", ".join(f"{key} {share.value:.2f}" for key, share in shares[::-1])


class _Axis:
    """One setting on a picture: where a value lies between 0 and 1, and the ticks."""

    def __init__(self, key: str, domain: Domain) -> None:
        self.key, self.domain = key, domain
        self.title = key.removeprefix("train.").replace(".", "\n")

    def place(self, value: Any) -> float:
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
        return [self.place(value) for value in values], texts

    def _scale(self, value: float) -> float:
        return math.log(value) if self.domain.kind == "loguniform" else float(value)


def _draw_settings(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> str:
    from triderm_dist.report.figures import BLUE, GRAY, INK, ORANGE

    columns = min(3, len(axes))
    grid = figure.subplots(math.ceil(len(axes) / columns), columns, squeeze=False, sharey=True)
    kinds = [
        ("stopped early (at an earlier epoch)", [t for t in trials if t.state != "complete"], GRAY, "x", 30),
        ("ran to the end", [t for t in trials if t.state == "complete"], BLUE, "o", 36),
        ("the experiment's own settings", [t for t in trials if t.number == BASELINE], INK, "D", 60),
        ("best", [t for t in trials if t is summary.best], ORANGE, "*", 160),
    ]
    for place, axis in zip(grid.flat, axes, strict=False):
        for label, some, color, marker, size in kinds:
            x, y = [axis.place(trial.settings[axis.key]) for trial in some], [trial.macro_f1 for trial in some]
            place.scatter(x, y, size, color, marker, label=label, zorder=3)
        place.set_xticks(*axis.ticks())
        place.set_xlim(-0.05, 1.05)
        place.set_xlabel(axis.key.removeprefix("train.") + (" (log)" if axis.domain.kind == "loguniform" else ""))
    for place in grid.flat[len(axes) :]:
        place.set_axis_off()
    for row in grid:
        row[0].set_ylabel("macro F1 (argmax)")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return f"Macro F1 of {len(trials)} trials against each of {len(axes)} settings."


def _draw_parallel(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> str:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    from triderm_dist.report.figures import GRAY, INK, ORANGE

    place = figure.subplots()
    scores = [trial.macro_f1 or 0.0 for trial in trials]
    low, high = min(scores), max(scores)
    colors = ScalarMappable(Normalize(low, high), "viridis_r")
    at = range(len(axes))
    # Low scores first, so that the good ones lie on top.
    for trial in sorted(trials, key=lambda trial: trial.macro_f1 or 0.0):
        ends = trial.state == "complete"
        shade = ((trial.macro_f1 or 0.0) - low) / ((high - low) or 1.0)
        style: dict[str, Any] = {"color": colors.cmap(shade), "lw": 1.6 if ends else 0.9}
        style["linestyle"] = "-" if ends else ":"
        if trial.number == BASELINE:
            style |= {"color": INK, "lw": 2.2, "linestyle": "--", "label": "the experiment's own settings"}
        if trial is summary.best:
            own = ": the experiment's own settings" if trial.number == BASELINE else ""
            style |= {"color": ORANGE, "lw": 3.0, "label": f"best{own}"}
        place.plot(at, [axis.place(trial.settings[axis.key]) for axis in axes], **style)
    for x, axis in enumerate(axes):
        for y, text in zip(*axis.ticks(), strict=True):
            place.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK,
                           bbox={"facecolor": "white", "alpha": 0.75, "pad": 0.8, "edgecolor": "none"})  # fmt: skip
        place.axvline(x, color=GRAY, lw=1, zorder=0)
    place.set_xticks(list(at), [axis.title for axis in axes])
    place.set_yticks([])
    place.grid(False)
    place.spines[["left", "bottom"]].set_visible(False)
    place.set_xlim(-0.15, len(axes) - 0.5)
    figure.colorbar(colors, ax=place, label="macro F1 (argmax); dotted: stopped early", pad=0.02)
    if handles := place.get_legend_handles_labels()[0]:
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return f"Each of {len(trials)} trials is a line through its {len(axes)} settings, colored by macro F1."
