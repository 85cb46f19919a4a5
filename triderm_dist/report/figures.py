"""The figures of the report: each function draws one from `Content` and returns its alternative text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.files import PATIENT_DATA, atomic_path
from triderm_dist.report.content import Content

INK, GRAY, FAINT = "#22313f", "#6b7785", "#dfe4ea"
BLUE, ORANGE = "#2f6690", "#d1782b"
SHAP_COLORS = "coolwarm"
PALETTE = ("#2f6690", "#d1782b", "#3a8f6b", "#a2487e", "#7a6bb0", "#8c7a3d", "#4f9fc4", "#b04f4f")

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRAY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "figure.facecolor": "white",
    "text.parse_math": False,  # names of tasks may hold dollar signs
}

Draw = Callable[[Any, Content], str]

MIN_BIN_LESIONS = 5
"""A bin of the reliability diagram with fewer lesions is not drawn."""
PLOTS_IN_ROW = 4
"""Plots of diagnoses side by side."""
TOP_COLUMNS = 20
TOP_PAIRS = 14
"""Columns of the stacker, and pairs of column and diagnosis, that a figure shows."""


def draw(content: Content, folder: Path) -> dict[str, str]:
    """Draw every figure into FOLDER/NAME.png and return {name: alternative text}; figures without data are skipped."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    classes = len(content.diagnoses)
    figures: dict[str, tuple[Draw, tuple[float, float], bool]] = {
        "confusion": (_confusion, (max(4.2, 0.9 + 0.57 * classes), max(3.2, 0.5 + 0.5 * classes)), True),
        "precision_recall": (_precision_recall, (9.0, 0.3 + 2.1 * -(-classes // PLOTS_IN_ROW)), True),
        "reliability": (_reliability, (4.6, 4.2), True),
        "learning_curves": (_learning_curves, (9.0, 2.9 * max(1, len(content.curves))), bool(content.curves)),
        "weights": (_weights, (4.6, 0.9 + 0.42 * len(content.ensemble.members)), len(content.ensemble.members) > 1),
        "importance": (_importance, (7.6, 5.0), content.importance is not None),
        "shap": (_shap, (7.6, 6.0), content.contributions is not None),
        "shap_by_diagnosis": (_shap_by_diagnosis, (7.6, 6.4), content.contributions is not None),
    }
    alt_texts = {}
    with pyplot.rc_context(STYLE):
        for name, (function, size, has_data) in figures.items():
            path = folder / f"{name}.png"
            if not has_data:
                path.unlink(missing_ok=True)  # of an earlier report
                continue
            figure = pyplot.figure(figsize=size, layout="constrained")
            alt_texts[name] = function(figure, content)
            with atomic_path(path, PATIENT_DATA) as temporary:
                figure.savefig(temporary, format="png", metadata={"Software": None})
            pyplot.close(figure)
    return alt_texts


def _confusion(figure: Any, content: Content) -> str:
    axes = figure.subplots()
    names = content.diagnoses
    lesions = np.bincount(content.labels, minlength=len(names))
    may_be_none = content.task.decision == "threshold"
    confusion = content.confusion if may_be_none else content.confusion[:, :-1]
    share = confusion / np.maximum(lesions, 1)[:, None]
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.grid(False)
    predicted = [*names, "none"] if may_be_none else names
    axes.set_xticks(range(len(predicted)), predicted, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), [f"{name}  ({count})" for name, count in zip(names, lesions, strict=True)])
    axes.set_xlabel("predicted")
    axes.set_ylabel("diagnosis (lesions)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if may_be_none:
        axes.axvline(len(names) - 0.5, color="white", linewidth=4)
    for (row, column), value in np.ndenumerate(share):
        if confusion[row, column]:
            color = "white" if value > 0.55 else INK
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5, color=color)
    recalls = ", ".join(f"{name} {100 * share[i, i]:.0f}%" for i, name in enumerate(names) if lesions[i])
    return f"Confusion matrix in percent of the lesions of each diagnosis. Predicted correctly: {recalls}."


def _precision_recall(figure: Any, content: Content) -> str:
    rows, columns = -(-len(content.diagnoses) // PLOTS_IN_ROW), min(len(content.diagnoses), PLOTS_IN_ROW)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True).ravel()
    areas = []
    for index, (axes, name) in enumerate(zip(grid, content.diagnoses, strict=False)):
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
        area = float(precision[truth[order]].mean())
        areas.append(f"{name} {area:.2f}")
        axes.plot(recall, precision, color=BLUE, linewidth=1.4)
        axes.axhline(truth.mean(), color=GRAY, linewidth=0.8, linestyle=(0, (3, 3)))
        at_threshold = content.counts.recall[index], content.counts.precision[index]
        if np.isfinite(at_threshold[1]):
            axes.plot(*at_threshold, "o", color=ORANGE, markersize=5, clip_on=False)
        axes.set_title(f"{name}  {area:.2f}")
    for axes in grid[len(content.diagnoses) :]:
        axes.set_visible(False)
    figure.supxlabel("recall", fontsize=10)
    figure.supylabel("precision", fontsize=10)
    return f"Precision against recall for each diagnosis, average precision {', '.join(areas)}."


def _reliability(figure: Any, content: Content) -> str:
    """Draw the probability of the most probable diagnosis against its accuracy, in ten bins; dot areas: lesions."""
    axes = figure.subplots()
    share = content.rows.probabilities / content.rows.probabilities.sum(axis=1, keepdims=True)
    confidence, correct = share.max(axis=1), share.argmax(axis=1) == content.labels
    bins = np.minimum((confidence * 10).astype(int), 9)
    counts = np.bincount(bins, minlength=10)
    used = counts > 0
    mean_confidence = np.bincount(bins, confidence, 10)[used] / counts[used]
    accuracy = np.bincount(bins, correct, 10)[used] / counts[used]
    error = float((counts[used] * np.abs(mean_confidence - accuracy)).sum() / counts.sum())
    axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle=(0, (3, 3)))
    enough = counts[used] >= MIN_BIN_LESIONS
    mean_confidence, accuracy, lesions = mean_confidence[enough], accuracy[enough], counts[used][enough]
    spread = 1.96 * np.sqrt(accuracy * (1 - accuracy) / lesions)
    axes.errorbar(mean_confidence, accuracy, yerr=spread, color=BLUE, linewidth=1.2, capsize=0, zorder=2)
    sizes = 18 + 160 * lesions / counts.max()
    axes.scatter(mean_confidence, accuracy, s=sizes, color=BLUE, zorder=3, edgecolor="white")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("probability of the most probable diagnosis")
    axes.set_ylabel("accuracy")
    axes.text(0.97, 0.04, f"expected calibration error {error:.3f}", transform=axes.transAxes, ha="right", color=GRAY)
    return f"Reliability of the most probable diagnosis; expected calibration error {error:.3f} over ten bins."


def _learning_curves(figure: Any, content: Content) -> str:
    grid = figure.subplots(len(content.curves), 2, squeeze=False)
    ends = []
    for (model, folds), (left, right) in zip(content.curves.items(), grid, strict=True):
        finals = []
        for number, (fold, records) in enumerate(folds.items()):
            color = PALETTE[number % len(PALETTE)]
            train = [record for record in records if record["kind"] == "train"]
            validation = [record for record in records if record["kind"] == "validation"]
            left.plot([r["epoch"] for r in train], [r["loss"] for r in train], color=color, linewidth=1)
            right.plot(
                [r["epoch"] for r in validation], [r["macro_f1"] for r in validation],
                color=color, linewidth=1.4, marker="o", markersize=2.5, label=f"fold {fold}",
            )  # fmt: skip
            finals += [validation[-1]["macro_f1"]] if validation else []
        left.set_title(f"{model}: training loss")
        right.set_title(f"{model}: validation macro F1 (argmax)")
        right.set_ylim(0, None)
        right.legend(fontsize=8, ncols=2, loc="lower right")
        for axes in (left, right):
            axes.set_xlabel("epoch")
        if finals:
            ends.append(f"{model} ends at {min(finals):.2f} to {max(finals):.2f}")
    return f"Training loss and validation macro F1 over epochs, by fold: {'; '.join(ends)}."


def _weights(figure: Any, content: Content) -> str:
    axes = figure.subplots()
    names, weights = content.ensemble.members, content.ensemble.weights
    axes.barh(range(len(names)), weights, color=BLUE, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("weight")
    axes.grid(axis="y", visible=False)
    for row, weight in enumerate(weights):
        axes.text(weight + 0.015, row, f"{weight:.2f}", va="center", fontsize=9)
    return "Weights of the members: " + ", ".join(f"{n} {w:.2f}" for n, w in zip(names, weights, strict=True)) + "."


def _importance(figure: Any, content: Content) -> str:
    axes = figure.subplots()
    assert content.importance is not None
    measure, shares = content.importance
    top = list(shares.items())[:TOP_COLUMNS]
    axes.barh(range(len(top)), [100 * value for _, value in top], color=BLUE, height=0.65)
    axes.set_yticks(range(len(top)), [name for name, _ in top], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlabel(f"share of the {measure}, percent")
    axes.grid(axis="y", visible=False)
    return f"Most important columns of the stacker by {measure}: " + ", ".join(name for name, _ in top[:5]) + "."


def _shap(figure: Any, content: Content) -> str:
    """Draw a dot per lesion: a column's contribution to the score of a diagnosis, colored by the column's value."""
    shap = content.contributions
    assert shap is not None
    mean = np.abs(shap.values).mean(axis=0)
    largest = np.argsort(-mean, axis=None, kind="stable")[:TOP_PAIRS]
    pairs = [np.unravel_index(flat, mean.shape) for flat in largest]
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
            added[finite], height[finite], s=5, c=ranks[finite] / len(ranks), cmap=SHAP_COLORS, vmin=0, vmax=1,
            linewidths=0, rasterized=True,
        )  # fmt: skip
    names = [f"{shap.names[column]} → {content.diagnoses[diagnosis]}" for diagnosis, column in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.axvline(0, color=GRAY, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("contribution to the score of the diagnosis before the softmax (SHAP value)")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1], shrink=0.5, aspect=18)
    bar.ax.set_yticklabels(["low", "high"])
    bar.set_label("value of the column", labelpad=-8)
    bar.outline.set_visible(False)
    return "Contributions (SHAP values) of the strongest pairs of column and diagnosis: " + ", ".join(names[:5]) + "."


def _shap_by_diagnosis(figure: Any, content: Content) -> str:
    shap = content.contributions
    assert shap is not None
    mean = np.abs(shap.values).mean(axis=0).T
    top = np.argsort(-mean.sum(axis=1), kind="stable")[:TOP_COLUMNS]
    axes = figure.subplots()
    image = axes.imshow(mean[top], cmap="Blues", aspect="auto", vmin=0)
    axes.grid(False)
    axes.set_xticks(range(len(content.diagnoses)), content.diagnoses, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(top)), [shap.names[column] for column in top], fontsize=8.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=18, label="mean |contribution|")
    bar.outline.set_visible(False)
    strongest = [f"{name}: {shap.names[int(mean[:, i].argmax())]}" for i, name in enumerate(content.diagnoses)]
    return f"Column with the largest mean absolute contribution to each diagnosis: {', '.join(strongest)}."
