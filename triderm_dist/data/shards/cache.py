"""Shards behind a URL, through a cache on the node's own disk that its ranks share.

Training starts when the index is there; shards follow in the order of the plan. Every file is checked against size and
SHA-256 of the index on arrival and appears whole or not at all. Processes talk by file locks alone, which the system
drops when one dies: who reads a shard holds a shared lock on it, who removes it an exclusive one, and who fetches it
holds NAME.lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from triderm_dist.data.shards.format import INDEX, SAMPLES, ShardFile
from triderm_dist.data.shards.remote import POLL_SECONDS, Store, _disk_error, _Stopped
from triderm_dist.schema import DataError

_FETCHED = re.compile(r"(?P<name>.+)\.(?P<bytes>\d+)\.fetch(?P<attempt>\.\d+)?")
"""A file on its way: reserved under this name, written under this name and the number of the attempt."""


class Held:
    """An open file of the cache that nobody removes before `close`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def close(self) -> None:
        # A thread that is reading holds the file object, and with it the descriptor, until it is done.
        fcntl.flock(self.file, fcntl.LOCK_UN)


class Cache:
    """Files of one remote set in `folder`, within the byte limit that all sets under `root` share."""

    def __init__(self, root: Path, folder: Path, store: Store) -> None:
        self.root, self.folder, self.store = root, folder, store
        self.limit = int(store.remote.cache_gb * 1e9)

    def hold(self, file: ShardFile, stop: threading.Event | None = None) -> Held:
        """The file, fetched if it is not there; by another process, if that was first.

        Raises DataError as `Store.fetch`, where the cache has no room for it, or after twice `remote.total_seconds`
        of waiting for others.
        """
        stop = stop or threading.Event()
        path = self.folder / file.url
        deadline = time.monotonic() + 2 * self.store.remote.total_seconds
        try:
            while True:
                if held := _hold(path, file.bytes):
                    return held
                with _locked(_lock_of(path)) as mine:
                    if mine and not _is_whole(path, file.bytes):
                        self._bring(file, path, stop, deadline)
                        continue
                if stop.wait(POLL_SECONDS):
                    raise _Stopped
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{path}: another process has been at it for {2 * self.store.remote.total_seconds:g} s; "
                        "end it, or remove the cache folder"
                    )
        except OSError as error:
            raise _disk_error(self.folder, error) from None

    def _bring(self, file: ShardFile, path: Path, stop: threading.Event, deadline: float) -> None:
        """Fetch a file into the cache; the caller holds its NAME.lock."""
        part = path.with_name(f"{path.name}.{file.bytes}.fetch")
        while not self._reserve(file, part):
            if stop.wait(4 * POLL_SECONDS):
                raise _Stopped
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.root}: {self.limit / 1e9:g} GB are full of shards that are being read; end other runs, or "
                    "raise data.remote.cache_gb"
                )
        try:
            self.store.fetch(file, part, stop)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, file: ShardFile, part: Path) -> bool:
        """Make room for a file and mark it as taken by an empty file; False if it must wait for others."""
        if file.bytes > self.limit:
            raise DataError(
                f"{self.store.shown(file.url)}: its {file.bytes / 1e9:.2f} GB do not fit into the cache of "
                f"{self.limit / 1e9:g} GB; raise data.remote.cache_gb"
            )
        with _locked(self.root / "cache.lock", wait=True):
            used, removable = self._inventory()
            for _, path, size in sorted(removable):
                if used + file.bytes <= self.limit and self._free() >= file.bytes:
                    break
                if _remove(path):
                    used -= size
            if self._free() < file.bytes:
                raise OSError(errno.ENOSPC, f"{file.bytes / 1e9:.2f} GB needed, {self._free() / 1e9:.2f} GB free")
            if used + file.bytes > self.limit:
                return False
            part.touch()
            return True

    def _free(self) -> int:
        return shutil.disk_usage(self.root).free

    def _inventory(self) -> tuple[int, list[tuple[float, Path, int]]]:
        """Bytes taken or reserved, and (last use, path, bytes) of the files that may go if nobody holds them."""
        used, removable = 0, []
        for path in self.root.glob("*/*"):
            if path.name in (INDEX, SAMPLES) or path.suffix == ".lock":
                continue
            with contextlib.suppress(FileNotFoundError):
                if fetched := _FETCHED.fullmatch(path.name):
                    with _locked(_lock_of(path.with_name(fetched["name"]))) as nobody_fetches:
                        if nobody_fetches:
                            path.unlink()  # left by a process that was killed
                        elif not fetched["attempt"]:
                            used += int(fetched["bytes"])
                else:
                    about = path.stat()
                    used += about.st_size
                    removable.append((about.st_mtime, path, about.st_size))
        return used, removable


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """An exclusive lock on a lock file; False where another one has it and we do not wait."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _hold(path: Path, size: int) -> Held | None:
    """The file under a shared lock; None if it is not there or about to be removed."""
    try:
        file = path.open("rb", buffering=0)
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        return None
    about = os.fstat(file.fileno())
    if about.st_nlink == 0 or about.st_size != size:
        return None
    with contextlib.suppress(OSError):
        os.utime(file.fileno())  # the time of the last use
    return Held(file)


def _remove(path: Path) -> bool:
    """Remove a file that nobody holds."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (FileNotFoundError, BlockingIOError):
        return False
    return True


# --- reading ---------------------------------------------------------------------------------------------------------
