"""Compare the losses of two runs step by step, to show that a change does not alter the numbers.

python -m benchmarks.compare_losses first=RUN/MODEL/fold-0/metrics.jsonl second=tests/golden_losses/trimodal.jsonl

Exit status 0: the same steps, and every loss within `tolerance` relative; otherwise 1. `keep=FILE` writes steps and
losses of the first as a new golden file instead. The golden files were made on an AMD EPYC with torch 2.14.1: the same
machine repeats them bit for bit, another one within 0.002 relative. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.schema import ConfigError
from triderm_dist.settings import Section

ACROSS_MACHINES = 2e-3
"""Relative tolerance of a golden file on another machine: its kernels round differently, and AdamW amplifies it."""


class Comparison(Section):
    first: str = Field(description="metrics.jsonl of a run")
    second: str | None = Field(None, description="metrics.jsonl of another run, or a golden file")
    tolerance: float = Field(0.0, ge=0, description="largest relative difference of a step's loss; 0 means bit for bit")
    keep: str | None = Field(None, description="write the steps and losses of `first` to this golden file")


def losses(path: Path) -> dict[int, float]:
    """Return the loss of every logged step. Raises ConfigError where the file holds none."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = {int(line["step"]): float(line["loss"]) for line in lines if line["kind"] == "train"}
    except (OSError, ValueError, KeyError, TypeError):
        found = {}
    if not found:
        raise ConfigError(f"{path}: no losses; give the metrics.jsonl of a run")
    return found


def largest_difference(first: dict[int, float], second: dict[int, float]) -> tuple[float, int]:
    """Return the largest relative difference and its step; infinite at the first step that only one of the two has."""
    if unmatched := sorted(first.keys() ^ second.keys()):
        return float("inf"), unmatched[0]
    return max((abs(first[step] - second[step]) / max(abs(second[step]), 1e-12), step) for step in second)


def main(config: Comparison) -> None:
    from triderm_dist.files import write_text

    first = losses(Path(config.first))
    if config.keep:
        lines = [json.dumps({"kind": "train", "step": step, "loss": loss}) for step, loss in first.items()]
        write_text(Path(config.keep), "\n".join(lines) + "\n")
        print(f"{len(lines)} steps in {config.keep}")
        return
    if config.second is None:
        raise ConfigError("second: give the file to compare with, or keep=FILE to write a golden file")
    second = losses(Path(config.second))
    for step in sorted(first.keys() | second.keys()):
        a, b = first.get(step), second.get(step)
        print(f"step {step:>6}  {a!s:>22}  {b!s:>22}{'' if a == b else '  *'}")
    difference, where = largest_difference(first, second)
    print(json.dumps({"steps": len(second), "largest_difference": difference, "at_step": where}))
    sys.exit(difference > config.tolerance)


if __name__ == "__main__":
    run(Comparison, main, __doc__)
