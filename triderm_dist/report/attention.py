"""Draw the attention of a tri-modal network for one lesion: over both photos, and over concepts and metadata."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.files import PATIENT_DATA, atomic_path
from triderm_dist.models.attention import NULL, AttentionMaps
from triderm_dist.schema import UNLABELED, Task

SHARES = "plasma"
"""Color map of attention above the even share."""
LONGEST_LABEL = 34
"""Characters of a line of a label; longer ones wrap."""


def draw_attention(maps: AttentionMaps, path: Path, task: Task) -> None:
    """Draw each photo with and without its attention, and the gating weights as bars; write a PNG, atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from triderm_dist.report.style import BLUE, GRAY, STYLE

    with pyplot.rc_context({**STYLE, "axes.grid": False}):
        rows, views, labels = len(maps.semantic), len(task.views), _semantic_labels(maps, task)
        lines = sum(1 + label.count("\n") for label in labels)
        height = max(0.6 + 2.4 * views, 0.24 * lines + 1.2)
        figure = pyplot.figure(figsize=(11.5, height), layout="constrained")
        figure.suptitle(_title(maps), x=0.01, ha="left", fontsize=11)
        grid = figure.add_gridspec(views, 3 if rows else 2, width_ratios=(1, 1, 1.25) if rows else (1, 1))
        for row, (view, title) in enumerate((view.name, view.label) for view in task.views):
            photo_axes, overlay_axes = figure.add_subplot(grid[row, 0]), figure.add_subplot(grid[row, 1])
            for axes in (photo_axes, overlay_axes):
                axes.set_xticks([]), axes.set_yticks([])
                axes.spines[:].set_visible(False)
            photo_axes.set_title(f"{title} photo")
            if view not in maps.photos:
                photo_axes.text(0.5, 0.5, "no photo", ha="center", va="center", color=GRAY)
                overlay_axes.text(0.5, 0.5, "replaced by learned tokens", ha="center", va="center", color=GRAY)
                continue
            photo = maps.photos[view]
            photo_axes.imshow(photo)
            if view not in maps.attention:
                overlay_axes.text(0.5, 0.5, "not attended to", ha="center", va="center", color=GRAY)
                continue
            aligned = row == 0 and views > 1  # the first view is attended to by the tokens of the second
            overlay_axes.set_title("attention of view alignment" if aligned else "attention of the pooling query")
            _draw_overlay(overlay_axes, photo, maps.attention[view])
        if rows:
            axes = figure.add_subplot(grid[:, 2])
            names = list(maps.semantic)[::-1]
            axes.barh(range(rows), [maps.semantic[name] for name in names], color=BLUE, height=0.7)
            axes.set_yticks(range(rows), labels, fontsize=9, linespacing=0.95)
            axes.set_xlabel("share of the attention")
            axes.set_title("semantic gating: weights of the inputs")
        with atomic_path(path, PATIENT_DATA) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
        pyplot.close(figure)


FULL_COLOR = 4.0
"""Multiple of the even share at which a patch has its full color, at least."""


def overlay(photo: np.ndarray, attention: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the photo (S, S, 3) in gray with the attention (L,) over it, and the multiple that has the full color.

    The scale starts at an even share, 1 / L, which is left gray, and ends at `FULL_COLOR` even shares or at the
    strongest patch: attention that is nearly even stays nearly gray.
    """
    from matplotlib import colormaps
    from PIL import Image

    side = math.isqrt(len(attention))
    share = attention.reshape(side, side) * len(attention)
    height, width = photo.shape[:2]
    smooth = np.asarray(Image.fromarray(share.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
    top = max(float(share.max()), FULL_COLOR)
    strength = np.clip((smooth - 1) / (top - 1), 0, 1)
    gray = np.repeat(photo.mean(2, keepdims=True), 3, axis=2)
    alpha = (0.85 * strength)[..., None]
    return np.clip(gray * (1 - alpha) + colormaps[SHARES](strength)[..., :3] * alpha, 0, 1), top


def _draw_overlay(axes: Any, photo: np.ndarray, attention: np.ndarray) -> None:
    """Draw the overlay with its scale, in multiples of the even share."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    picture, top = overlay(photo, attention)
    axes.imshow(picture)
    bar = axes.figure.colorbar(ScalarMappable(Normalize(1, top), SHARES), ax=axes, shrink=0.8, ticks=[1, top])
    bar.ax.set_yticklabels(["even share", f"{top:.1f} times"], fontsize=8)
    bar.outline.set_visible(False)
    strongest = float(attention.max()) * len(attention)
    axes.set_xlabel(f"strongest patch: {strongest:.1f} times the even share", fontsize=8)


def _title(maps: AttentionMaps) -> str:
    best = np.argsort(-maps.probabilities)[:3]
    top = ", ".join(f"{maps.diagnoses[i]} {maps.probabilities[i]:.2f}" for i in best)
    truth = "" if maps.label == UNLABELED else f", diagnosed {maps.diagnoses[maps.label]}"
    models = f"mean of {maps.models} models" if maps.models > 1 else "one model"
    return f"{maps.lesion_id}{truth}   predicted {top}   ({models})"


def _semantic_labels(maps: AttentionMaps, task: Task) -> list[str]:
    """Return the title and value of each input of the semantic gating, from the last to the first, in short lines."""
    labels = []
    for name in list(maps.semantic)[::-1]:
        title = _token_title(name, task)
        text = f"{title} = {maps.values[name]}" if name in maps.values else title
        labels.append(textwrap.fill(text, LONGEST_LABEL))
    return labels


def _token_title(name: str, task: Task) -> str:
    """Return the title of a metadata field or of `NULL`, or the name of a concept such as clinical/hair as text."""
    if name == NULL:
        return "none of these (learned token)"
    for field in task.fields:
        if field.name == name:
            return field.label
    view, slash, concept = name.partition("/")
    titles = {each.name: each.label for each in task.views}
    return f"{titles.get(view, view)}{': ' if slash else ''}{concept}".replace("_", " ")
