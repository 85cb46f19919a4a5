"""Pictures of a search."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triderm_dist.search.results import Summary
from triderm_dist.search.settings import BASELINE
from triderm_dist.search.space import Domain, read_space
from triderm_dist.search.trial import Trial


def draw_summary(summary: Summary) -> list[Path]:
    """Draw SEARCH/settings.png, the score against each setting, and SEARCH/parallel.png, each trial a line through its
    settings; no picture where no trial has a score.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from triderm_dist.report.figures import STYLE

    trials = [trial for trial in summary.trials if trial.macro_f1 is not None]
    if not trials:
        return []
    # Every trial has the same settings.
    axes = [_Axis(key, domain) for key, domain in read_space(summary.folder / "space.yaml").items()]
    rows = math.ceil(len(axes) / 3)
    pictures: list[tuple[str, tuple[float, float], Callable[..., None]]] = [
        ("settings", (10.0, 0.6 + 2.8 * rows), _draw_settings),
        ("parallel", (2.2 + 1.5 * len(axes), 5.2), _draw_parallel),
    ]
    paths = []
    with matplotlib.rc_context(dict[Any, Any](STYLE)):
        for name, size, draw in pictures:
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, axes, trials, summary)
            paths.append(summary.folder / f"{name}.png")
            figure.savefig(paths[-1])
    return paths


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


def _draw_settings(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> None:
    from triderm_dist.report.figures import BLUE, GREY, INK, ORANGE

    columns = min(3, len(axes))
    grid = figure.subplots(math.ceil(len(axes) / columns), columns, squeeze=False, sharey=True)
    kinds = [
        ("stopped early (at an earlier epoch)", [t for t in trials if t.state != "complete"], GREY, "x", 30),
        ("ran to the end", [t for t in trials if t.state == "complete"], BLUE, "o", 36),
        ("the experiment's own settings", [t for t in trials if t.number == BASELINE], INK, "D", 60),
        ("best", [t for t in trials if t is summary.best], ORANGE, "*", 160),
    ]
    for place, axis in zip(grid.flat, axes, strict=False):
        for label, some, colour, marker, size in kinds:
            x, y = [axis.place(trial.settings[axis.key]) for trial in some], [trial.macro_f1 for trial in some]
            place.scatter(x, y, size, colour, marker, label=label, zorder=3)
        place.set_xticks(*axis.ticks())
        place.set_xlim(-0.05, 1.05)
        place.set_xlabel(axis.key.removeprefix("train.") + (" (log)" if axis.domain.kind == "loguniform" else ""))
    for place in grid.flat[len(axes) :]:
        place.set_axis_off()
    for row in grid:
        row[0].set_ylabel("macro F1 (argmax)")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _draw_parallel(figure: Any, axes: list[_Axis], trials: list[Trial], summary: Summary) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    from triderm_dist.report.figures import GREY, INK, ORANGE

    place = figure.subplots()
    scores = [trial.macro_f1 or 0.0 for trial in trials]
    low, high = min(scores), max(scores)
    colours = ScalarMappable(Normalize(low, high), "viridis_r")
    at = range(len(axes))
    # Low scores first, so that the good ones lie on top.
    for trial in sorted(trials, key=lambda trial: trial.macro_f1 or 0.0):
        ends = trial.state == "complete"
        shade = ((trial.macro_f1 or 0.0) - low) / ((high - low) or 1.0)
        style: dict[str, Any] = {"color": colours.cmap(shade), "lw": 1.6 if ends else 0.9}
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
        place.axvline(x, color=GREY, lw=1, zorder=0)
    place.set_xticks(list(at), [axis.title for axis in axes])
    place.set_yticks([])
    place.grid(False)
    place.spines[["left", "bottom"]].set_visible(False)
    place.set_xlim(-0.15, len(axes) - 0.5)
    figure.colorbar(colours, ax=place, label="macro F1 (argmax); dotted: stopped early", pad=0.02)
    if handles := place.get_legend_handles_labels()[0]:
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
