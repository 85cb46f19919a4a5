"""How the members are combined, and what the stacker uses."""

from __future__ import annotations

from typing import Any

import numpy as np

from triderm_dist.intervals import Interval
from triderm_dist.report.content import Content
from triderm_dist.report.contributions import Contributions
from triderm_dist.report.elements import Column, Figure, Flag, Row, Section, Table
from triderm_dist.report.style import BLUE, DIVERGING, FAINT, GRAY, MEDIUM, NARROW, SEQUENTIAL
from triderm_dist.report.wording import decision_rule, predicts_alone

TOP_COLUMNS = 20
TOP_PAIRS = 14
"""Columns of the stacker, and pairs of column and diagnosis, that a figure shows."""


def ensemble(content: Content) -> Section:
    """Return weights and temperatures of the members, and importance and contributions of the stacker's columns."""
    fitted = content.ensemble
    temperatures = dict(zip(fitted.members, fitted.temperatures, strict=True))
    rows = [
        Row(name, (float(weight), float(temperatures[name]) if name in content.table.models else None))
        for name, weight in zip(fitted.members, fitted.weights, strict=True)
    ]
    columns = [Column("weight", "weight"), Column("temperature", "temperature", ".2f")]
    stacker = content.stacker
    predicts = predicts_alone(content) or ("The ensemble predicts." if content.fit.get("choice") else "")
    figures = [
        *([_weights(content)] if len(fitted.members) > 1 else []),
        *([_importance(content)] if content.importance else []),
        *([_contributions(content, content.contributions)] if content.contributions else []),
        *([_contributions_by_diagnosis(content, content.contributions)] if content.contributions else []),
    ]
    return Section(
        "Ensemble",
        tables=[Table("members", "Members that predict", columns, rows, "member"), *_choice(content)],
        figures=figures,
        values={
            "text": f"{predicts} {_rule(content)} Logits are divided by a temperature first.".lstrip()
            + (f" Stacker: {stacker.model.summary()}." if stacker else "")
        },
    )


def _choice(content: Content) -> list[Table]:
    """Return the differences between the ensemble and its members that decide what predicts."""
    choice = content.fit.get("choice")
    if not choice:
        return []
    gaps = {f"the best network, {choice['network']}": choice["difference"], "the stacker": choice["stacker"]}
    rows = []
    for name, gap in gaps.items():
        if gap:
            difference = Interval(**gap)
            verdict = Flag("beyond the noise") if difference.low > 0 else Flag("not beyond the noise", strong=False)
            rows.append(Row(name, (difference, verdict)))
    columns = [Column("nested", "nested macro F1", "+.3f"), Column("verdict", "verdict")]
    return [Table("choice", "The ensemble minus its best members", columns, rows, head="ensemble minus")]


def _rule(content: Content) -> str:
    fitted = content.ensemble
    if content.task.decision == "argmax":
        return decision_rule(content)
    if fitted.tau is not None:
        thresholds = (
            f"Thresholds are proportional to the share of each diagnosis to the power {fitted.tau:g}: logit "
            "adjustment, logits − tau · log(prior)."
        )
    elif fitted.shrinkage:
        thresholds = (
            "Thresholds of rare diagnoses are shrunk toward a pooled threshold with the weight of "
            f"{fitted.shrinkage:g} positives."
        )
    else:
        thresholds = "Thresholds are averages over resampled lesions, without shrinkage."
    return f"{decision_rule(content)} {thresholds}"


def _weights(content: Content) -> Figure:
    names, weights = content.ensemble.members, content.ensemble.weights

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.barh(range(len(names)), weights, color=BLUE, height=0.6)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("weight")
        axes.grid(axis="y", visible=False)
        for row, weight in enumerate(weights):
            axes.text(weight + 0.015, row, f"{weight:.2f}", va="center", fontsize=9)

    alt = "Weights of the members: " + ", ".join(f"{n} {w:.2f}" for n, w in zip(names, weights, strict=True)) + "."
    size = NARROW, 0.9 + 0.42 * len(names)
    return Figure("weights", draw, alt, "Weight of each member in the mean of probabilities.", size)


def _importance(content: Content) -> Figure:
    assert content.importance is not None and content.stacker is not None
    measure, shares = content.importance
    top = list(shares.items())[:TOP_COLUMNS]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.barh(range(len(top)), [100 * value for _, value in top], color=BLUE, height=0.65)
        axes.set_yticks(range(len(top)), [name for name, _ in top], fontsize=8.5)
        axes.invert_yaxis()
        axes.set_xlabel(f"share of the {measure}, percent")
        axes.grid(axis="y", visible=False)

    alt = f"Most important columns of the stacker by {measure}: " + ", ".join(name for name, _ in top[:5]) + "."
    caption = f"The {len(top)} most important columns of the {content.stacker.model.title} stacker, by {measure}."
    return Figure("importance", draw, alt, caption, (MEDIUM, 5.0))


def _contributions(content: Content, shap: Contributions) -> Figure:
    """Return the figure of the strongest pairs of column and diagnosis, a dot per lesion."""
    assert content.stacker is not None
    mean = np.abs(shap.values).mean(axis=0)
    largest = np.argsort(-mean, axis=None, kind="stable")[:TOP_PAIRS]
    pairs = [np.unravel_index(flat, mean.shape) for flat in largest]
    names = [f"{shap.names[column]} → {content.diagnoses[diagnosis]}" for diagnosis, column in pairs]

    def draw(figure: Any) -> None:
        """Draw a dot per lesion: a column's contribution to the score of a diagnosis, colored by its value."""
        axes = figure.subplots()
        generator = np.random.default_rng(0)
        image = None
        for row, (diagnosis, column) in enumerate(pairs):
            added, value = shap.values[:, diagnosis, column], shap.columns[:, column]
            ranks = np.argsort(np.argsort(value, kind="stable"))  # so that outliers do not take up the color range
            counts, edges = np.histogram(added, 60)
            density = counts[np.clip(np.searchsorted(edges, added, side="right") - 1, 0, 59)] / max(counts.max(), 1)
            height = row + 0.38 * density * generator.uniform(-1, 1, len(added))
            finite = np.isfinite(value)
            axes.scatter(added[~finite], height[~finite], s=5, color=FAINT, linewidths=0, rasterized=True)
            image = axes.scatter(
                added[finite], height[finite], s=5, c=ranks[finite] / len(ranks), cmap=DIVERGING, vmin=0, vmax=1,
                linewidths=0, rasterized=True,
            )  # fmt: skip
        axes.set_yticks(range(len(pairs)), names, fontsize=8.5)
        axes.invert_yaxis()
        axes.axvline(0, color=GRAY, linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("contribution to the score of the diagnosis before the softmax (SHAP value)")
        bar = figure.colorbar(image, ax=axes, ticks=[0, 1], shrink=0.5, aspect=18)
        bar.ax.set_yticklabels(["low", "high"])
        bar.set_label("value of the column", labelpad=-8)
        bar.outline.set_visible(False)

    return Figure(
        "shap",
        draw,
        "Contributions (SHAP values) of the strongest pairs of column and diagnosis: " + ", ".join(names[:5]) + ".",
        f"Contributions of columns to the scores of the {content.stacker.model.title} stacker (SHAP values), one "
        "dot per lesion: right of the line for the diagnosis, left against it. Red: the column’s value is high, "
        "blue: low, gray: missing.",
        (MEDIUM, 6.0),
    )


def _contributions_by_diagnosis(content: Content, shap: Contributions) -> Figure:
    """Return the figure of the mean absolute contribution of each column to each diagnosis."""
    mean = np.abs(shap.values).mean(axis=0)
    top = np.argsort(-mean.T.sum(axis=1), kind="stable")[:TOP_COLUMNS]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = axes.pcolormesh(mean.T[top], cmap=SEQUENTIAL, vmin=0)
        axes.invert_yaxis()
        axes.grid(False)
        positions = np.arange(len(content.diagnoses)) + 0.5
        axes.set_xticks(positions, content.diagnoses, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(np.arange(len(top)) + 0.5, [shap.names[column] for column in top], fontsize=8.5)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=18, label="mean |contribution|")
        bar.outline.set_visible(False)

    strongest = [f"{name}: {shap.names[int(mean[i].argmax())]}" for i, name in enumerate(content.diagnoses)]
    return Figure(
        "shap_by_diagnosis",
        draw,
        f"Column with the largest mean absolute contribution to each diagnosis: {', '.join(strongest)}.",
        "Mean absolute contribution of each column to each diagnosis.",
        (MEDIUM, 6.4),
    )
