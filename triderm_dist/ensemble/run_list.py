"""List the runs in a folder with their scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from triderm_dist.config import CONFIG_FILE
from triderm_dist.ensemble.artifact import read_artifact
from triderm_dist.ensemble.run_files import ENSEMBLE_FILE, read_held_out
from triderm_dist.environment import read_environment
from triderm_dist.files import size_of, why_no_folder
from triderm_dist.intervals import Interval
from triderm_dist.schema import DataError

DEPTH = 3
"""Levels of folders that are searched for runs."""


@dataclass(frozen=True)
class RunSummary:
    """One run.

    score: nested macro F1 of the ensemble; None before it is stacked.  held_out: macro F1 of the test set, if it was
    scored.  finished, trainings: folds that are trained, of those that were begun.  date: the last start of a stage, or
    for runs of earlier versions the last change of a result.  size: bytes of all files.
    """

    folder: Path
    task: str
    score: Interval | None
    held_out: float | None
    finished: int
    trainings: int
    date: datetime
    size: int


def find_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in a folder, or the folder itself if it is one, the best first.

    Raises DataError if there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: {why_no_folder(folder)}; name the one that holds your runs")
    runs = [summarize_run(each) for each in _run_folders(folder, DEPTH)]
    return sorted(runs, key=lambda run: (run.score is None, -(run.score.value if run.score else 0), str(run.folder)))


def summarize_run(folder: Path) -> RunSummary:
    """Read the score, date and size of a run; an unreadable ensemble.json counts as none."""
    task, score, held_out = "", None, None
    try:
        fit = read_artifact(folder / ENSEMBLE_FILE)
        task, score = fit.get("task", {}).get("name", ""), Interval(**fit["scores"]["ensemble"]["nested"])
        held = read_held_out(folder)
        held_out = held["macro_f1"] if held else None
    except (DataError, KeyError, TypeError, AttributeError):
        pass
    folds = [path for path in folder.glob("*/fold-*") if path.is_dir()]
    changed = folder.stat().st_mtime
    results = [path.stat().st_mtime for path in (folder / ENSEMBLE_FILE, folder / CONFIG_FILE) if path.exists()]
    starts = read_environment(folder)["starts"]
    return RunSummary(
        folder=folder,
        task=task,
        score=score,
        held_out=held_out,
        finished=sum((path / "fold.json").exists() for path in folds),
        trainings=len(folds),
        date=datetime.fromisoformat(starts[-1]["started"])
        if starts
        else datetime.fromtimestamp(max(results, default=changed), UTC),
        size=size_of(folder),
    )


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    if depth == 0:
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            yield from _run_folders(child, depth - 1)


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, also of one that was just begun."""
    if (folder / ENSEMBLE_FILE).exists() or any(folder.glob("*/fold-*/*.safetensors")):
        return True
    return (folder / CONFIG_FILE).exists() and any((folder / name).exists() for name in ("shards", "stages.json"))
