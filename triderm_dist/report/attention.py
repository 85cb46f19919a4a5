"""Where a tri-modal network looked: for one lesion both photos with the attention over them, and the weights of the
gating over named concepts, drawn as a picture.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.files import atomic_path
from triderm_dist.models.attention import AttentionMaps
from triderm_dist.schema import UNLABELED, VIEWS


def draw_attention(maps: AttentionMaps, path: Path) -> None:
    """Both photos, each alone and under its attention, and the gating as bars, into a PNG; whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from triderm_dist.report.figures import BLUE, GRAY, STYLE

    with pyplot.rc_context({**STYLE, "axes.grid": False}):
        rows = len(maps.semantic)
        figure = pyplot.figure(figsize=(11.5, max(5.4, 0.24 * rows + 1.2)), layout="constrained")
        figure.suptitle(_title(maps), x=0.01, ha="left", fontsize=11)
        grid = figure.add_gridspec(2, 3 if rows else 2, width_ratios=(1, 1, 1.25) if rows else (1, 1))
        for row, view in enumerate(VIEWS):
            plain, covered = figure.add_subplot(grid[row, 0]), figure.add_subplot(grid[row, 1])
            for axes in (plain, covered):
                axes.set_xticks([]), axes.set_yticks([])
                axes.spines[:].set_visible(False)
            plain.set_title(f"{view} photo")
            if view not in maps.photos:
                plain.text(0.5, 0.5, "no photo", ha="center", va="center", color=GRAY)
                covered.text(0.5, 0.5, "a learned stand-in", ha="center", va="center", color=GRAY)
                continue
            photo = maps.photos[view]
            plain.imshow(photo)
            if view not in maps.attention:
                covered.text(0.5, 0.5, "nothing attends to it", ha="center", va="center", color=GRAY)
                continue
            covered.set_title("attention, by view alignment" if row == 0 else "attention of the pooling query")
            _overlay(covered, photo, maps.attention[view])
        if rows:
            axes = figure.add_subplot(grid[:, 2])
            names = list(maps.semantic)[::-1]
            axes.barh(range(rows), [maps.semantic[name] for name in names], color=BLUE, height=0.7)
            axes.set_yticks(
                range(rows),
                [f"{_words(n)} = {maps.values[n]}" if n in maps.values else _words(n) for n in names],
            )
            axes.set_xlabel("share of the attention")
            axes.set_title("semantic gating: which concepts and metadata")
        with atomic_path(path) as beside:
            figure.savefig(beside, format="png", metadata={"Software": None})
        pyplot.close(figure)


def _overlay(axes: Any, photo: np.ndarray, attention: np.ndarray) -> None:
    """The photo in gray under its attention; warm is more than an even share, full color at least half more."""
    from matplotlib import colormaps
    from PIL import Image

    side = math.isqrt(len(attention))
    share = attention.reshape(side, side) * len(attention)
    size = photo.shape[0]
    smooth = np.asarray(Image.fromarray(share.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC))
    strength = np.clip((smooth - 1) / max(float(share.max()) - 1, 0.5), 0, 1)
    gray = np.repeat(photo.mean(2, keepdims=True), 3, axis=2)
    color = colormaps["inferno"](0.25 + 0.7 * strength)[..., :3]
    alpha = (0.85 * np.sqrt(strength))[..., None]
    axes.imshow(np.clip(gray * (1 - alpha) + color * alpha, 0, 1))
    axes.set_xlabel(f"strongest patch: {share.max():.1f} times an even share", fontsize=8)


def _title(maps: AttentionMaps) -> str:
    best = np.argsort(-maps.probabilities)[:3]
    guesses = ", ".join(f"{maps.diagnoses[i]} {maps.probabilities[i]:.2f}" for i in best)
    truth = "" if maps.label == UNLABELED else f", diagnosed {maps.diagnoses[maps.label]}"
    models = f"mean of {maps.models} models" if maps.models > 1 else "one model"
    return f"{maps.lesion_id}{truth}   predicted {guesses}   ({models})"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", ": ")
