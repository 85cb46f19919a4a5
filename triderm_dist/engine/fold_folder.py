"""The folder of one fold: one run at a time works in it, and it holds one training. That of other settings is never
deleted: the folder is set aside, whole, and comes back with its settings.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from triderm_dist.distributed.collectives import on_main
from triderm_dist.engine.checkpoint import read_about, readable
from triderm_dist.files import exclusive_lock
from triderm_dist.schema import CheckpointError, InputError

ASIDE = "other-settings"


class FoldFolder:
    """OUTPUT/MODEL/fold-K at `path`, for one training; those set aside are OUTPUT/MODEL/other-settings/fold-K-HASH.

    stamp: hash of all that the fold's result depends on, which fold.json of a finished fold holds. identity: hash of
    what a training must share to go on from a checkpoint, which that holds.
    """

    def __init__(self, path: Path, stamp: str, identity: str) -> None:
        self.path, self.stamp, self.identity = path, stamp, identity

    def found(self) -> Path:
        """Where the training of these settings lies: here or set aside; here too where it has not begun."""
        held = _held(self.path)
        for key in (self.stamp, self.identity):
            if held == key:
                return self.path
            if (aside := self._aside(key)).exists():
                return aside
        return self.path

    def done(self) -> bool:
        """Whether it is finished there."""
        return is_finished(self.found(), self.stamp)

    def take(self) -> None:
        """Have that training here, with nothing in it that a killed save left; what was here is set aside."""
        found, held = self.found(), _held(self.path)
        if held not in (None, self.stamp, self.identity) or (held and found != self.path):
            aside = self._aside(held)
            aside.parent.mkdir(exist_ok=True)
            self.path.rename(aside)
            goes = "starting from the beginning" if found == self.path else "going on with that of these settings"
            print(f"{self.path}: a training of other settings or data, kept as {aside}; {goes}", flush=True)
        elif found != self.path:
            shutil.rmtree(self.path, ignore_errors=True)  # begun, and nothing was saved
        if found != self.path:
            found.rename(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in (self.path / "checkpoints").glob("*.part"):
            shutil.rmtree(unfinished)

    def _aside(self, key: str) -> Path:
        return self.path.parent / ASIDE / f"{self.path.name}-{key[:12]}"


def is_finished(path: Path, stamp: str) -> bool:
    """Whether the fold in this folder is trained and predicted, with this stamp."""
    return (path / "predictions.parquet").exists() and _stamp(path) == stamp


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Rank 0 holds the lock of a fold's folder; call on all ranks. Raises InputError on all where another run does.

    The kernel holds the lock, so none stays behind a dead process. On a shared file system it keeps out other hosts as
    far as that passes flock on: NFS does (a host that died keeps its locks until the server drops them, about 90 s),
    Lustre where it is mounted with `flock`. One that knows no locks keeps nobody out.
    """
    refusal = InputError(f"{path}: another run is training this fold; wait for it, stop it, or set another output")
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(exclusive_lock(path.with_name(f".{path.name}.lock"), refusal)))
        yield


def _held(path: Path) -> str | None:
    """What tells the training in a folder from others; None where nothing of it is worth keeping."""
    if stamp := _stamp(path):
        return stamp
    saved = readable(path / "checkpoints")
    return saved[-1].record["identity"] if saved else None


def _stamp(path: Path) -> str | None:
    try:
        return read_about(path / "fold").get("identity")
    except CheckpointError:
        return None
