"""Free disk space of a trained run: remove what predicting, stacking and reporting do not need.

triderm clean RUN
triderm clean RUN yes=true

Shows how much that is and asks before it removes anything: checkpoints of finished folds, trainings of other settings
that were moved aside, cached tokens of frozen towers. Weights, predictions, packed photos and results stay.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import PathText, Section


class CleanRun(Section):
    run: PathText = Field(description="folder of the run")
    yes: bool = Field(False, description="remove without asking")


def main(config: CleanRun) -> None:
    from triderm_dist.engine.clean import find_removable, remove
    from triderm_dist.files import size_of, size_text

    folder = Path(config.run)
    parts, notes = find_removable(folder)
    for note in notes:
        print(note)
    if not parts:
        print(f"{folder}: nothing to remove ({size_text(size_of(folder))})")
        return
    for part in parts:
        print(f"{size_text(part.size):>10}  {part.kind}")
    freed = sum(part.size for part in parts)
    print(f"{size_text(freed):>10}  of {size_text(size_of(folder))} in {folder}")
    if not (config.yes or confirmed()):
        print("nothing was removed; add yes=true to remove it without a question")
        return
    remove(folder, parts)
    print(f"removed {size_text(freed)}")


def confirmed() -> bool:
    """Ask on the terminal; without one, the answer is no."""
    if not sys.stdin.isatty():
        return False
    try:
        return input("remove it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def start() -> None:
    run(CleanRun, main, __doc__, first="run")


if __name__ == "__main__":
    start()
