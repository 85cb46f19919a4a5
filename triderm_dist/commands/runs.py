"""List the runs in a folder: score with its 95% interval, score on the test set, date and size.

triderm runs
triderm runs FOLDER
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import PathText, Section


class RunsRun(Section):
    folder: PathText = Field("runs", description="folder that holds runs, or one run")


def main(config: RunsRun) -> None:
    from rich.console import Console
    from rich.table import Table

    from triderm_dist.ensemble.run_list import find_runs
    from triderm_dist.files import size_text

    folder = Path(config.folder)
    found = find_runs(folder)
    if not found:
        print(f"{folder}: holds no run")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run" if found[0].folder == folder else f"runs in {folder}", overflow="fold")
    for name in ("macro F1", "95% interval", "test", "date (UTC)", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        score, interval = "", f"{each.finished} of {each.trainings} folds"
        if each.score:
            score, interval = f"{each.score.value:.3f}", f"{each.score.low:.3f} to {each.score.high:.3f}"
        test = "" if each.held_out is None else f"{each.held_out:.3f}"
        name = each.folder.resolve().name if each.folder == folder else str(each.folder.relative_to(folder))
        table.add_row(name, score, interval, test, f"{each.date:%Y-%m-%d %H:%M}", size_text(each.size))
    Console(highlight=False).print(table, markup=False)


def start() -> None:
    run(RunsRun, main, __doc__, first="folder")


if __name__ == "__main__":
    start()
