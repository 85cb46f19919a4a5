"""The confusion matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Figure, Row, Section, Table
from triderm_dist.report.style import DARK_CELL, ON_DARK, ON_LIGHT, PAPER, SEQUENTIAL


def confusion(content: Content) -> Section:
    """Return the confusion matrix as a figure in percent, and as a table of counts."""
    names = content.diagnoses
    lesions = np.bincount(content.labels, minlength=len(names))
    may_be_none = content.task.decision == "threshold"
    matrix = content.confusion if may_be_none else content.confusion[:, :-1]
    predicted = [*names, "none"] if may_be_none else list(names)
    share = matrix / np.maximum(lesions, 1)[:, None]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.pcolormesh(share, cmap=SEQUENTIAL, vmin=0, vmax=1, edgecolor=PAPER, linewidth=1)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xticks(np.arange(len(predicted)) + 0.5, predicted, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(
            np.arange(len(names)) + 0.5, [f"{name}  ({count})" for name, count in zip(names, lesions, strict=True)]
        )
        axes.set_xlabel("predicted")
        axes.set_ylabel("diagnosis (lesions)")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if may_be_none:
            axes.axvline(len(names), color=PAPER, linewidth=4)
        for (row, column), value in np.ndenumerate(share):
            if matrix[row, column]:
                color = ON_DARK if value > DARK_CELL else ON_LIGHT
                axes.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5,
                          color=color)  # fmt: skip

    recalls = ", ".join(f"{name} {100 * share[at, at]:.0f}%" for at, name in enumerate(names) if lesions[at])
    caption = "Percent of the lesions of each diagnosis." + (
        " Diagnoses are predicted independently, so a row can add up to more than 100; “none”: no diagnosis was "
        "predicted."
        if may_be_none
        else ""
    )
    size = max(4.2, 0.9 + 0.57 * len(names)), max(3.2, 0.5 + 0.5 * len(names))
    alt = f"Confusion matrix in percent of the lesions of each diagnosis. Predicted correctly: {recalls}."
    columns = [Column("lesions", "lesions"), *(Column(f"predicted_{name}", name) for name in predicted)]
    rows = [Row(name, [int(lesions[at]), *(int(count) for count in matrix[at])]) for at, name in enumerate(names)]
    return Section(
        "Confusion matrix",
        "confusion.html",
        tables=[
            Table("confusion", "Lesions of each diagnosis (row) by prediction (column)", columns, rows, "diagnosis")
        ],
        figures=[Figure("confusion_matrix", draw, alt, caption, size)],
    )
