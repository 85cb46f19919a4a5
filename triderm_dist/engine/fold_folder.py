"""The folder of one fold, which holds one training and is used by one process group at a time.

A training with other settings is never deleted: its folder is moved aside, and moved back when its settings are used
again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from triderm_dist.distributed.collectives import on_main
from triderm_dist.engine.checkpoint import readable_checkpoints
from triderm_dist.engine.network_files import read_info
from triderm_dist.files import exclusive_lock, remove_dead_parts
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.schema import CheckpointError

ASIDE = "other-settings"
CHECKPOINTS = "checkpoints"
_OBSOLETE = "obsolete"
"""Empty marker file in the folder of checkpoints, which are removed once their fold is finished."""


class FoldFolder:
    """OUTPUT/MODEL/fold-K at `path`, for one training; others are moved to OUTPUT/MODEL/other-settings/fold-K-HASH.

    result_hashes: of everything that the fold's result depends on; the first is stored in fold.json of a finished fold,
    in which the others are accepted too.
    resume_hashes: of everything that a training must share with a checkpoint to resume, likewise.
    """

    def __init__(self, path: Path, result_hashes: Sequence[str], resume_hashes: Sequence[str]) -> None:
        self.path, self.result_hashes, self.resume_hashes = path, result_hashes, resume_hashes

    @property
    def result_hash(self) -> str:
        """The hash that a finished fold records."""
        return self.result_hashes[0]

    @property
    def _hashes(self) -> tuple[str, ...]:
        return (*self.result_hashes, *self.resume_hashes)

    def locate(self) -> Path:
        """Return the folder of this training: the one that was moved aside, else `path`, which may not exist."""
        current = _training_hash(self.path)
        for key in self._hashes:
            if current == key:
                return self.path
            if (aside := self._aside(key)).exists():
                return aside
        return self.path

    def is_trained(self) -> bool:
        """Return whether this training is finished, also in a folder moved aside; its predictions may be missing."""
        return is_trained(self.locate(), self.result_hashes)

    def resumed(self) -> Path | None:
        """Return the folder with checkpoints from which this training may resume; None to start from the beginning.

        A finished training with other settings, such as another learning rate, is not resumed.
        """
        located = self.locate()
        return located if _training_hash(located) in self._hashes else None

    def claim(self) -> None:
        """Move this training into `path`, removing partial saves; a different training found there is moved aside.

        Raises CheckpointError if `path` holds a fold.json that cannot be read, rather than replace its weights.
        """
        located, current = self.locate(), _training_hash(self.path)
        if current is None and (self.path / "fold.json").exists():
            read_info(self.path / "fold")
        if current is not None and (current not in self._hashes or located != self.path):
            aside = self._aside(current)
            aside.parent.mkdir(exist_ok=True)
            self.path.rename(aside)
            how = "starting from the beginning" if located == self.path else "resuming the training of these settings"
            text = f"{self.path}: holds a training of other settings or data, moved to {aside}; {how}"
            print(wrapped(text), flush=True)
        elif located != self.path:
            shutil.rmtree(self.path, ignore_errors=True)  # the training ended before its first save
        if located != self.path:
            located.rename(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        remove_dead_parts(self.path, *self.path.glob("checkpoints/*"))
        for killed_save in self.path.glob("checkpoints/*.part"):
            shutil.rmtree(killed_save)

    def _aside(self, key: str) -> Path:
        return self.path.parent / ASIDE / f"{self.path.name}-{key[:12]}"


def mark_checkpoints_obsolete(path: Path) -> None:
    """Mark the checkpoints in a fold's folder as those to remove once the fold is finished."""
    if (folder := path / CHECKPOINTS).is_dir():
        (folder / _OBSOLETE).touch()


def remove_obsolete_checkpoints(path: Path) -> None:
    """Remove checkpoints that were marked obsolete, also by a process that was killed, if their fold is finished."""
    if (path / CHECKPOINTS / _OBSOLETE).exists() and (path / "fold.json").exists():
        shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)


def is_finished(path: Path, result_hashes: Sequence[str]) -> bool:
    """Return whether the fold in this folder was trained and predicted, with one of these result hashes."""
    return (path / "predictions.parquet").exists() and is_trained(path, result_hashes)


def is_trained(path: Path, result_hashes: Sequence[str]) -> bool:
    """Return whether the training in this folder is finished, with one of these result hashes."""
    return _finished_hash(path) in result_hashes


@contextmanager
def lock_fold(path: Path) -> Iterator[None]:
    """Hold the lock of a fold's folder on rank 0. Call on all ranks.

    Raises Busy on all ranks if another process holds it. The kernel releases the lock when the process dies. On a
    shared file system it excludes other hosts only if flock works across hosts: on NFS (which releases the locks of
    a dead host after about 90 s), and on Lustre when mounted with `flock`. On a file system without locks it excludes
    nobody.
    """
    locked = f"{path}: another run is training this fold; wait for it, stop it, or set another output"
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(exclusive_lock(path.with_name(f".{path.name}.lock"), locked)))
        yield


def _training_hash(path: Path) -> str | None:
    """Return the result hash of a finished training, else the resume hash of its newest checkpoint, else None."""
    if result_hash := _finished_hash(path):
        return result_hash
    saved = readable_checkpoints(path / "checkpoints")
    return saved[-1].record["identity"] if saved else None


def _finished_hash(path: Path) -> str | None:
    """Return the result hash in fold.json; None if the fold is not finished."""
    try:
        return read_info(path / "fold").get("identity")
    except CheckpointError:
        return None
