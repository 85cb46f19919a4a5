"""Training loss and validation score over epochs."""

from __future__ import annotations

from typing import Any

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Figure, Section
from triderm_dist.report.style import PALETTE, WIDE


def training_curves(content: Content) -> Section | None:
    """Return the curves of each model by fold; None where metrics.jsonl of all folds are missing."""
    if not content.training_curves:
        return None

    def draw(figure: Any) -> None:
        grid = figure.subplots(len(content.training_curves), 2, squeeze=False)
        for (model, folds), (left, right) in zip(content.training_curves.items(), grid, strict=True):
            for number, (fold, records) in enumerate(folds.items()):
                color = PALETTE[number % len(PALETTE)]
                train = [record for record in records if record["kind"] == "train"]
                validation = [record for record in records if record["kind"] == "validation"]
                left.plot([r["epoch"] for r in train], [r["loss"] for r in train], color=color, linewidth=1)
                right.plot(
                    [r["epoch"] for r in validation], [r["macro_f1"] for r in validation],
                    color=color, linewidth=1.4, marker="o", markersize=2.5, label=f"fold {fold}",
                )  # fmt: skip
            left.set_title(f"{model}: training loss")
            right.set_title(f"{model}: validation macro F1 (argmax)")
            right.set_ylim(0, None)
            right.legend(fontsize=8, ncols=2, loc="lower right")
            for axes in (left, right):
                axes.set_xlabel("epoch")

    size = WIDE, 2.9 * len(content.training_curves)
    alt = f"Training loss and validation macro F1 over epochs, by fold: {'; '.join(_ends(content))}."
    return Section("Training curves", figures=[Figure("learning_curves", draw, alt, "One line per fold.", size)])


def _ends(content: Content) -> list[str]:
    """Say for each model where the validation curves end."""
    result = []
    for model, folds in content.training_curves.items():
        scores = [[r["macro_f1"] for r in records if r["kind"] == "validation"] for records in folds.values()]
        finals = [each[-1] for each in scores if each]
        if finals:
            result.append(f"{model} ends at {min(finals):.2f} to {max(finals):.2f}")
    return result
