"""Precision against recall, and reliability."""

from __future__ import annotations

from typing import Any

import numpy as np

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Figure, Section
from triderm_dist.report.style import BLUE, GRAY, NARROW, ORANGE, WIDE

MIN_BIN_LESIONS = 5
"""A bin of the reliability diagram with fewer lesions is not drawn."""
PLOTS_IN_ROW = 4
"""Plots of diagnoses side by side."""
DASHED = (0, (3, 3))


def curves(content: Content) -> Section:
    """Return precision-recall curves and the reliability diagram."""
    return Section("Precision, recall, calibration", figures=[_precision_recall(content), _reliability(content)])


def _precision_recall(content: Content) -> Figure:
    names = content.diagnoses
    rows, columns = -(-len(names) // PLOTS_IN_ROW), min(len(names), PLOTS_IN_ROW)

    def draw(figure: Any) -> None:
        grid = np.ravel(figure.subplots(rows, columns, sharex=True, sharey=True))
        for index, (axes, name) in enumerate(zip(grid, names, strict=False)):
            truth = content.labels == index
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.02)
            axes.set_xticks([0, 0.5, 1])
            axes.set_yticks([0, 0.5, 1])
            if not truth.any():
                axes.set_title(f"{name}  no lesion")
                continue
            order = np.argsort(-content.rows.probabilities[:, index], kind="stable")
            true_positives = np.cumsum(truth[order])
            precision, recall = true_positives / np.arange(1, len(order) + 1), true_positives / truth.sum()
            axes.plot(recall, precision, color=BLUE, linewidth=1.4)
            axes.axhline(truth.mean(), color=GRAY, linewidth=0.8, linestyle=DASHED)
            at_threshold = content.counts.recall[index], content.counts.precision[index]
            if np.isfinite(at_threshold[1]):
                axes.plot(*at_threshold, "o", color=ORANGE, markersize=5, clip_on=False)
            axes.set_title(f"{name}  {content.areas[1][index]:.2f}")
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        figure.supxlabel("recall", fontsize=10)
        figure.supylabel("precision", fontsize=10)

    areas = ", ".join(
        f"{name} {area:.2f}" for name, area in zip(names, content.areas[1], strict=True) if np.isfinite(area)
    )
    alt = f"Precision against recall for each diagnosis, average precision {areas}."
    caption = "Number after the name: average precision. Dot: the decisions. Dashed: random predictions."
    return Figure("precision_recall", draw, alt, caption, (WIDE, 0.3 + 2.1 * rows))


def _reliability(content: Content) -> Figure:
    """Draw the probability of the most probable diagnosis against its accuracy, in ten bins; dot areas: lesions."""
    share = content.rows.probabilities / content.rows.probabilities.sum(axis=1, keepdims=True)
    confidence, correct = share.max(axis=1), share.argmax(axis=1) == content.labels
    bins = np.minimum((confidence * 10).astype(int), 9)
    counts = np.bincount(bins, minlength=10)
    used = counts > 0
    mean_confidence = np.bincount(bins, confidence, 10)[used] / counts[used]
    accuracy = np.bincount(bins, correct, 10)[used] / counts[used]
    error = float((counts[used] * np.abs(mean_confidence - accuracy)).sum() / counts.sum())
    enough = counts[used] >= MIN_BIN_LESIONS
    mean_confidence, accuracy, lesions = mean_confidence[enough], accuracy[enough], counts[used][enough]
    spread = 1.96 * np.sqrt(accuracy * (1 - accuracy) / lesions)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle=DASHED)
        axes.errorbar(mean_confidence, accuracy, yerr=spread, color=BLUE, linewidth=1.2, capsize=0, zorder=2)
        sizes = 18 + 160 * lesions / counts.max()
        axes.scatter(mean_confidence, accuracy, s=sizes, color=BLUE, zorder=3, edgecolor="white")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("probability of the most probable diagnosis")
        axes.set_ylabel("accuracy")
        axes.text(
            0.97, 0.04, f"expected calibration error {error:.3f}", transform=axes.transAxes, ha="right", color=GRAY
        )

    alt = f"Reliability of the most probable diagnosis; expected calibration error {error:.3f} over ten bins."
    caption = "On the dashed line, probabilities are calibrated. Larger dots hold more lesions; bars: 95% intervals."
    return Figure("reliability", draw, alt, caption, (NARROW, 4.2))
