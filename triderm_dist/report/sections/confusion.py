"""The confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from triderm_dist.metrics import ratio
from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Figure, Row, Section, Table
from triderm_dist.report.style import DARK_CELL, ON_DARK, ON_LIGHT, PAPER, SEQUENTIAL


def confusion(content: Content) -> Section:
    """Return the confusion matrix in percent of each diagnosis and of each prediction, and in lesions."""
    names = content.diagnoses
    may_be_none = content.task.decision == "threshold"
    matrix = content.confusion if may_be_none else content.confusion[:, :-1]
    predicted = [*names, "none"] if may_be_none else list(names)
    lesions, calls = np.bincount(content.labels, minlength=len(names)), matrix.sum(axis=0)
    of_diagnosis, of_prediction = ratio(matrix, lesions[:, None]), ratio(matrix, calls)
    recalls = ", ".join(f"{name} {100 * of_diagnosis[at, at]:.0f}%" for at, name in enumerate(names) if lesions[at])
    precisions = ", ".join(f"{name} {100 * of_prediction[at, at]:.0f}%" for at, name in enumerate(names) if calls[at])
    caption = "Percent of the lesions of each diagnosis (rows)."
    if (content.rows.decisions.sum(axis=1) > 1).any():
        caption += " Some lesions have several predictions, so a row can add up to more than 100."
    if may_be_none:
        caption += " “none”: no diagnosis was predicted."
    size = max(4.2, 0.9 + 0.57 * len(names)), max(3.2, 0.5 + 0.5 * len(names))
    tables = [
        _table("confusion", "Lesions of each diagnosis (row) by prediction (column)", names, predicted, matrix),
        _table("confusion_of_diagnosis", "Percent of the lesions of each diagnosis (row)", names, predicted,
               100 * of_diagnosis),
        _table("confusion_of_prediction", "Percent of the lesions with each prediction (column)", names, predicted,
               100 * of_prediction),
    ]  # fmt: skip
    figures = [
        Figure("confusion_matrix", lambda figure: _draw(figure, of_diagnosis, names, predicted, lesions),
               f"Confusion matrix in percent of the lesions of each diagnosis. Predicted correctly: {recalls}.",
               caption, size),
        Figure("confusion_predictions", lambda figure: _draw(figure, of_prediction, names, predicted, lesions, calls),
               f"Confusion matrix in percent of the lesions with each prediction. Correct predictions: {precisions}.",
               "The same in percent of the lesions with each prediction (columns).", size),
    ]  # fmt: skip
    return Section("Confusion matrix", "confusion.html", tables, figures)


def _table(name: str, caption: str, names: Sequence[str], predicted: Sequence[str], matrix: np.ndarray) -> Table:
    spec = "" if matrix.dtype.kind == "i" else ".1f"
    columns = [Column(f"predicted_{each}", each, spec) for each in predicted]
    rows = [Row(each, values.tolist()) for each, values in zip(names, matrix, strict=True)]
    return Table(name, caption, columns, rows, "diagnosis")


def _draw(
    figure: Any,
    share: np.ndarray,
    names: Sequence[str],
    predicted: Sequence[str],
    lesions: np.ndarray,
    calls: np.ndarray | None = None,
) -> None:
    """Draw shares (C, C or C + 1). lesions: (C,) of each diagnosis.  calls: of each prediction."""
    axes = figure.subplots()
    axes.pcolormesh(np.nan_to_num(share), cmap=SEQUENTIAL, vmin=0, vmax=1, edgecolor=PAPER, linewidth=1)
    axes.invert_yaxis()
    axes.grid(False)
    below = predicted if calls is None else [f"{name}  ({count})" for name, count in zip(predicted, calls, strict=True)]
    axes.set_xticks(np.arange(len(predicted)) + 0.5, below, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(
        np.arange(len(names)) + 0.5, [f"{name}  ({count})" for name, count in zip(names, lesions, strict=True)]
    )
    axes.set_xlabel("predicted" if calls is None else "predicted (lesions)")
    axes.set_ylabel("diagnosis (lesions)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(predicted) > len(names):
        axes.axvline(len(names), color=PAPER, linewidth=4)
    for (row, column), value in np.ndenumerate(share):
        if value > 0:
            color = ON_DARK if value > DARK_CELL else ON_LIGHT
            axes.text(column + 0.5, row + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5,
                      color=color)  # fmt: skip
