"""The report's pictures: each function draws one, from `Content`, and returns what it shows in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

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
}

Draw = Callable[[Any, Content], str]


LEAST_IN_PART = 5
"""A tenth of the reliability diagram with fewer lesions is not drawn."""


def draw(content: Content, folder: Path) -> dict[str, str]:
    """Draw every picture into FOLDER/NAME.png; {name: what it shows}. Pictures without data are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[Draw, tuple[float, float], bool]] = {
        "confusion": (_confusion, (7.2, 6.0), True),
        "precision_recall": (_precision_recall, (9.0, 6.6), True),
        "reliability": (_reliability, (4.6, 4.2), True),
        "learning_curves": (_learning_curves, (9.0, 2.9 * max(1, len(content.curves))), bool(content.curves)),
        "weights": (_weights, (4.6, 0.9 + 0.42 * len(content.fitted.members)), len(content.fitted.members) > 1),
        "importance": (_importance, (7.6, 5.0), bool(content.importance)),
        "shap": (_shap, (7.6, 6.0), content.shap is not None),
        "shap_by_diagnosis": (_shap_by_diagnosis, (7.6, 6.4), content.shap is not None),
    }
    words = {}
    with pyplot.rc_context(STYLE):
        for name, (function, size, wanted) in pictures.items():
            path = folder / f"{name}.png"
            if not wanted:
                path.unlink(missing_ok=True)  # of an earlier report
                continue
            figure = pyplot.figure(figsize=size, layout="constrained")
            words[name] = function(figure, content)
            beside = path.with_name(f"{name}.part.png")
            figure.savefig(beside, metadata={"Software": None})
            pyplot.close(figure)
            beside.replace(path)
    return words


def _confusion(figure: Any, content: Content) -> str:
    axes = figure.subplots()
    names = content.diagnoses
    lesions = np.bincount(content.labels, minlength=len(names))
    share = content.confusion / np.maximum(lesions, 1)[:, None]
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(len(names) + 1), [*names, "none"], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), [f"{name}  ({count})" for name, count in zip(names, lesions, strict=True)])
    axes.set_xlabel("claimed")
    axes.set_ylabel("diagnosis (lesions)")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.axvline(len(names) - 0.5, color="white", linewidth=4)
    for (row, column), value in np.ndenumerate(share):
        if content.confusion[row, column]:
            color = "white" if value > 0.55 else INK
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5, color=color)
    found = ", ".join(f"{name} {100 * share[i, i]:.0f}%" for i, name in enumerate(names) if lesions[i])
    return f"Confusion matrix in percent of the lesions of each diagnosis. Found rightly: {found}."


def _precision_recall(figure: Any, content: Content) -> str:
    columns = 4
    rows = -(-len(content.diagnoses) // columns)
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
        own = content.counts.precision[index], content.counts.recall[index]
        if np.isfinite(own[0]):
            axes.plot(own[1], own[0], "o", color=ORANGE, markersize=5, clip_on=False)
        axes.set_title(f"{name}  {area:.2f}")
    for axes in grid[len(content.diagnoses) :]:
        axes.set_visible(False)
    figure.supxlabel("recall", fontsize=10)
    figure.supylabel("precision", fontsize=10)
    return f"Precision against recall for each diagnosis, average precision {', '.join(areas)}."


def _reliability(figure: Any, content: Content) -> str:
    """Confidence of the likeliest diagnosis against how often it is right, in tenths; dot areas show the lesions."""
    axes = figure.subplots()
    share = content.rows.probabilities / content.rows.probabilities.sum(axis=1, keepdims=True)
    confidence, right = share.max(axis=1), share.argmax(axis=1) == content.labels
    part = np.minimum((confidence * 10).astype(int), 9)
    counts = np.bincount(part, minlength=10)
    used = counts > 0
    said = np.bincount(part, confidence, 10)[used] / counts[used]
    was = np.bincount(part, right, 10)[used] / counts[used]
    error = float((counts[used] * np.abs(said - was)).sum() / counts.sum())
    axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle=(0, (3, 3)))
    enough = counts[used] >= LEAST_IN_PART
    said, was, lesions = said[enough], was[enough], counts[used][enough]
    spread = 1.96 * np.sqrt(was * (1 - was) / lesions)
    axes.errorbar(said, was, yerr=spread, color=BLUE, linewidth=1.2, capsize=0, zorder=2)
    axes.scatter(said, was, s=18 + 160 * lesions / counts.max(), color=BLUE, zorder=3, edgecolor="white")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("probability of the likeliest diagnosis")
    axes.set_ylabel("share that is right")
    axes.text(0.97, 0.04, f"expected calibration error {error:.3f}", transform=axes.transAxes, ha="right", color=GRAY)
    return f"Reliability of the likeliest diagnosis; expected calibration error {error:.3f} over ten parts."


def _learning_curves(figure: Any, content: Content) -> str:
    grid = figure.subplots(len(content.curves), 2, squeeze=False)
    ends = []
    for (model, folds), (left, right) in zip(content.curves.items(), grid, strict=True):
        finals = []
        for number, (fold, records) in enumerate(folds.items()):
            color = PALETTE[number % len(PALETTE)]
            train = [record for record in records if record["kind"] == "train"]
            judged = [record for record in records if record["kind"] == "validation"]
            left.plot([r["epoch"] for r in train], [r["loss"] for r in train], color=color, linewidth=1)
            right.plot(
                [r["epoch"] for r in judged], [r["macro_f1"] for r in judged],
                color=color, linewidth=1.4, marker="o", markersize=2.5, label=f"fold {fold}",
            )  # fmt: skip
            finals += [judged[-1]["macro_f1"]] if judged else []
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
    names, weights = content.fitted.members, content.fitted.weights
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
    top = list(content.importance.items())[:20]
    axes.barh(range(len(top)), [100 * value for _, value in top], color=BLUE, height=0.65)
    axes.set_yticks(range(len(top)), [name for name, _ in top], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlabel("share of the stacker's gain, percent")
    axes.grid(axis="y", visible=False)
    return "The 20 columns that the stacker gains most from, led by " + ", ".join(name for name, _ in top[:5]) + "."


def _shap(figure: Any, content: Content) -> str:
    """A dot a lesion: how much a column moved a diagnosis' score, colored by the column's own value."""
    shap = content.shap
    assert shap is not None
    mean = np.abs(shap.values).mean(axis=0)
    pairs = [np.unravel_index(flat, mean.shape) for flat in np.argsort(-mean, axis=None, kind="stable")[:14]]
    axes = figure.subplots()
    generator = np.random.default_rng(0)
    image = None
    for row, (diagnosis, column) in enumerate(pairs):
        moved, value = shap.values[:, diagnosis, column], shap.columns[:, column]
        order = np.argsort(np.argsort(value, kind="stable"))  # ranks: outliers do not take all the color
        counts, edges = np.histogram(moved, 60)
        crowd = counts[np.clip(np.searchsorted(edges, moved, side="right") - 1, 0, 59)] / max(counts.max(), 1)
        height = row + 0.38 * crowd * generator.uniform(-1, 1, len(moved))
        known = np.isfinite(value)
        axes.scatter(moved[~known], height[~known], s=5, color=FAINT, linewidths=0, rasterized=True)
        image = axes.scatter(
            moved[known], height[known], s=5, c=order[known] / len(order), cmap=SHAP_COLORS, vmin=0, vmax=1,
            linewidths=0, rasterized=True,
        )  # fmt: skip
    names = [f"{shap.names[column]} → {content.diagnoses[diagnosis]}" for diagnosis, column in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.axvline(0, color=GRAY, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("SHAP value: change of the diagnosis' score (log odds before the softmax)")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1], shrink=0.5, aspect=18)
    bar.ax.set_yticklabels(["low", "high"])
    bar.set_label("value of the column", labelpad=-8)
    bar.outline.set_visible(False)
    return "SHAP values of the strongest pairs of column and diagnosis, led by " + ", ".join(names[:5]) + "."


def _shap_by_diagnosis(figure: Any, content: Content) -> str:
    shap = content.shap
    assert shap is not None
    mean = np.abs(shap.values).mean(axis=0).T
    top = np.argsort(-mean.sum(axis=1), kind="stable")[:20]
    axes = figure.subplots()
    image = axes.imshow(mean[top], cmap="Blues", aspect="auto", vmin=0)
    axes.grid(False)
    axes.set_xticks(range(len(content.diagnoses)), content.diagnoses, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(top)), [shap.names[column] for column in top], fontsize=8.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=18, label="mean |SHAP value|")
    bar.outline.set_visible(False)
    lead = [f"{name} by {shap.names[int(mean[:, index].argmax())]}" for index, name in enumerate(content.diagnoses)]
    return f"What moves each diagnosis most, by mean absolute SHAP value: {', '.join(lead)}."
