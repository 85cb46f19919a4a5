"""Cache of remote shards on a node's disk, shared by its ranks and by other runs.

Every file is checked against size and SHA-256 of the index when it is fetched, and appears complete or not at all.
Processes coordinate by file locks only, which the system releases when a process dies: a reader of a shard holds a
shared lock on it, a process that evicts it an exclusive one, and the process that fetches it holds NAME.lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from triderm_dist.data.shards.format import INDEX, ShardFile
from triderm_dist.data.shards.remote import POLL_SECONDS, FetchStopped, Store, disk_error
from triderm_dist.files import lock_file, unlock_file
from triderm_dist.schema import DataError

_SET = re.compile(r"[0-9a-f]{16}")
"""The folder of a set, named by the hash of its index."""
_FETCHING = re.compile(r"(?P<name>.+)\.(?P<bytes>\d+)\.fetch(?P<attempt>\.\d+)?")
"""A file that is being fetched: space is reserved under this name, the number of the attempt is added for the data."""


class CachedFile:
    """An open file of the cache, which is not evicted before `close`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def close(self) -> None:
        # Unlocked, not closed: a thread that is still reading keeps the file object and its descriptor.
        unlock_file(self.file)


class Cache:
    """Files of one remote set in `folder`, within the size limit that all sets under `root` share."""

    def __init__(self, root: Path, folder: Path, store: Store) -> None:
        self.root, self.folder, self.store = root, folder, store
        self.limit = int(store.remote.cache_gb * 1e9)

    def open(self, file: ShardFile, stop: threading.Event | None = None) -> CachedFile:
        """Open a file, after fetching it if it is not cached; where another process is fetching it, wait for that.

        Raises DataError as `Store.fetch`, where the file does not fit into the cache, or after waiting twice
        `remote.total_seconds` for other processes; FetchStopped once `stop` is set.
        """
        stop = stop or threading.Event()
        path = self.folder / file.url
        deadline = time.monotonic() + 2 * self.store.remote.total_seconds
        try:
            while True:
                if opened := _open_shared(path, file.bytes):
                    return opened
                with _locked(_lock_of(path)) as locked:
                    if locked and not _has_size(path, file.bytes):
                        self._fetch(file, path, stop, deadline)
                        continue
                if stop.wait(POLL_SECONDS):
                    raise FetchStopped
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{path}: another process has been fetching it for "
                        f"{2 * self.store.remote.total_seconds:g} s; end that process, or remove the cache folder"
                    )
        except OSError as error:
            raise disk_error(self.folder, error) from None

    def _fetch(self, file: ShardFile, path: Path, stop: threading.Event, deadline: float) -> None:
        """Fetch a file into the cache; the caller holds its NAME.lock."""
        part = path.with_name(f"{path.name}.{file.bytes}.fetch")
        while not self._reserve(file, part):
            if stop.wait(4 * POLL_SECONDS):
                raise FetchStopped
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.root}: all {self.limit / 1e9:g} GB are in use by shards that are being read; "
                    "end other runs, or raise data.remote.cache_gb"
                )
        try:
            self.store.fetch(file, part, stop)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, file: ShardFile, part: Path) -> bool:
        """Evict shards, least recently used first, until a file fits, and reserve its space by an empty file.

        Returns False where too much is being read. Raises DataError where it can never fit, OSError for a full disk.
        """
        if file.bytes > self.limit:
            raise DataError(
                f"{self.store.shown(file.url)}: its {file.bytes / 1e9:.2f} GB do not fit into the cache of "
                f"{self.limit / 1e9:g} GB; raise data.remote.cache_gb"
            )
        with _locked(self.root / "cache.lock", wait=True):
            used, evictable = self._inventory()
            for _, path, size in sorted(evictable):
                if used + file.bytes <= self.limit and self._free() >= file.bytes:
                    break
                if _evict(path):
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
        """Return the bytes used or reserved, and (last use, path, bytes) of the shards.

        Removes incomplete files of killed processes. Files that are not of a cache are left alone: `root` may be any
        folder, such as that of a whole disk.
        """
        used, evictable = 0, []
        for path in (path for folder in self.root.iterdir() if _is_of_cache(folder) for path in folder.iterdir()):
            if path.suffix != ".tar" and not _FETCHING.fullmatch(path.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                if fetching := _FETCHING.fullmatch(path.name):
                    with _locked(_lock_of(path.with_name(fetching["name"]))) as abandoned:
                        if abandoned:
                            path.unlink()
                        elif not fetching["attempt"]:
                            used += int(fetching["bytes"])
                else:
                    status = path.stat()
                    used += status.st_size
                    evictable.append((status.st_mtime, path, status.st_size))
        return used, evictable


def _is_of_cache(folder: Path) -> bool:
    """Return whether a folder holds the files of one set, as `open.open_index` makes it."""
    return bool(_SET.fullmatch(folder.name)) and (folder / INDEX).is_file()


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock on a lock file. Yields False where another process has it, unless `wait`."""
    with path.open("ab") as file:
        try:
            lock_file(file, wait=wait)
        except BlockingIOError:
            yield False
        else:
            yield True


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _open_shared(path: Path, size: int) -> CachedFile | None:
    """Open a file under a shared lock; None where it does not exist or is about to be evicted."""
    try:
        file = path.open("rb", buffering=0)
        lock_file(file, shared=True, wait=False)
    except (FileNotFoundError, BlockingIOError):
        return None
    status = os.fstat(file.fileno())
    if status.st_nlink == 0 or status.st_size != size:
        return None
    with contextlib.suppress(OSError):
        os.utime(file.fileno())  # the time of the last use
    return CachedFile(file)


def _evict(path: Path) -> bool:
    """Remove a file unless a process reads it; return whether it was removed."""
    try:
        with path.open("rb") as file:
            lock_file(file, wait=False)
            path.unlink()
    except (FileNotFoundError, BlockingIOError):
        return False
    return True
