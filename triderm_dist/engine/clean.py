"""Free disk space of a trained run: find and remove files that predicting, stacking and reporting do not read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from triderm_dist.config import CONFIG_FILE
from triderm_dist.engine.fold_folder import ASIDE
from triderm_dist.files import dead_parts, exclusive_lock, size_of
from triderm_dist.schema import DataError

CHECKPOINTS = "checkpoints of finished folds"
OTHERS = "trainings of other settings"
TOKENS = "cached tokens of frozen towers"
LEFTOVERS = "files of killed saves"


@dataclass(frozen=True)
class Removable:
    """Files and folders of one kind. size: their total size in bytes."""

    kind: str
    paths: tuple[Path, ...]
    size: int


def find_removable(run: Path) -> tuple[list[Removable], list[str]]:
    """Return what can be removed from a run, and a sentence on each large part that is kept.

    Raises DataError if the folder holds no run.
    """
    trainings = _trainings(run)
    if not (run / CONFIG_FILE).exists() and not any(run.glob(f"*/fold-*/{CONFIG_FILE}")):
        raise DataError(f"{run}: holds no run; name the folder that triderm pipeline or crossval wrote")
    finished = [path for path in trainings if (path / "fold.json").exists()]
    found = {
        CHECKPOINTS: [path / "checkpoints" for path in finished if (path / "checkpoints").is_dir()],
        OTHERS: sorted(path for path in run.glob(f"*/{ASIDE}") if path.is_dir()),
    }
    notes = []
    unfinished = [path for path in trainings if path not in finished and (path / "checkpoints").is_dir()]
    if unfinished:
        names = ", ".join(str(path.relative_to(run)) for path in unfinished)
        notes.append(f"kept: the checkpoints of {names}, which can be resumed")
    tokens = run / "tokens"
    if tokens.is_dir() and any(run.glob("towers/*.safetensors")):
        found[TOKENS] = [tokens]
    elif tokens.is_dir():
        notes.append("kept: tokens/, which the pretrained files are needed to compute again")
    listed = {path for paths in found.values() for path in paths}
    folders = [Path(folder) for folder, _, _ in os.walk(run)]
    found[LEFTOVERS] = dead_parts(*(path for path in folders if listed.isdisjoint((path, *path.parents))))
    removable = []
    for kind, paths in found.items():
        paths = [path for path in paths if not path.is_symlink()]
        if paths:
            removable.append(Removable(kind, tuple(paths), sum(map(size_of, paths))))
    return removable, notes


def remove(run: Path, parts: Sequence[Removable]) -> None:
    """Remove these parts of a run. Raises Busy, before anything is removed, if a program uses the run."""
    with ExitStack() as stack:
        busy = f"{run}: a program works in this run; wait for it or stop it"
        locks = [run / ".lock", *(path.with_name(f".{path.name}.lock") for path in _trainings(run))]
        for lock in locks:
            stack.enter_context(exclusive_lock(lock, busy))
        for path in (path for part in parts for path in part.paths):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _trainings(run: Path) -> list[Path]:
    """Return the folders of the run's trainings: MODEL/fold-K and refit/MODEL."""
    return sorted(path for pattern in ("*/fold-*", "refit/*") for path in run.glob(pattern) if path.is_dir())
