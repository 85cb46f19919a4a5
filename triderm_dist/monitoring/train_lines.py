"""The lines that a training prints: a table with a row per log interval, and a line per validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from triderm_dist.runtime.terminal import WIDTH, clock

ROWS = 40
"""Rows after which the header is printed again."""


class TrainLines:
    """Formats the records of one training. All rows have the same columns.

    If these exceed 80 characters, the parts of the loss are omitted, then the share of time waiting for data, the
    gradient norm and the learning rate; metrics.jsonl has them all.

    total_steps, epochs: of the training.  loss_names: parts of the loss.  mfu: whether records have it.
    prefix: of every line, to distinguish the lines of concurrent trainings.
    """

    def __init__(
        self, total_steps: int, epochs: int, loss_names: Sequence[str] = (), mfu: bool = False, prefix: str = ""
    ) -> None:
        self.total_steps, self.epochs, self.prefix = total_steps, epochs, prefix
        self._rows = 0
        widths = {"step": max(4, 2 * len(str(total_steps)) + 1), "loss": 6} | {
            name: max(5, len(name)) for name in loss_names
        }
        widths |= {"lr": 7, "grad": 5, "les/s": 5, "wait": 4} | ({"MFU": 3} if mfu else {}) | {"GiB": 4, "left": 8}
        for optional in (loss_names, ["wait"], ["grad"], ["lr"]):
            if len(prefix) + sum(widths.values()) + len(widths) - 1 > WIDTH:
                widths = {name: width for name, width in widths.items() if name not in optional}
        self._widths = widths

    def train(self, step: int, values: Mapping[str, float], seconds_left: float) -> str:
        """Return the row of a training record, with the header before the first row and every 40 rows."""
        shown = {
            "step": f"{step}/{self.total_steps}",
            "lr": f"{values['lr']:.1e}",
            "wait": f"{values['data_wait']:.0%}",
            "MFU": f"{values.get('mfu', 0):.0%}",
            "left": clock(seconds_left),
        }
        sources = {"grad": "grad_norm", "les/s": "lesions_per_s", "GiB": "memory_gib"}
        decimals = {"loss": 4, "grad": 2, "les/s": 1, "GiB": 1}
        cells = [
            (shown.get(name) or _number(values[sources.get(name, name)], width, decimals.get(name, 3))).rjust(width)
            for name, width in self._widths.items()
        ]
        lines = [" ".join(cells)]
        if self._rows % ROWS == 0:
            lines.insert(0, " ".join(name.rjust(width) for name, width in self._widths.items()))
        self._rows += 1
        return "\n".join(self.prefix + line for line in lines)

    def validation(self, epoch: float, values: Mapping[str, float]) -> str:
        """Return the line of a validation record."""
        return (
            f"{self.prefix}epoch {epoch:.0f}/{self.epochs}  macro F1 {values['macro_f1']:.3f} (argmax)  "
            f"{values['official']:.3f} (p > 0.5)"
        )


def _number(value: float, width: int, decimals: int) -> str:
    """Format a number with as many decimals as fit."""
    texts = [f"{value:.{digits}f}" for digits in range(decimals, -1, -1)]
    return next((text for text in texts if len(text) <= width), f"{value:.0e}")
