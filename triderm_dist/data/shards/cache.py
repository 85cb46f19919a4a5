"""Cache of remote shards on a node's disk, shared by its ranks and by other runs.

Every file is checked against size and SHA-256 of the index when it is fetched, and appears complete or not at all.
Processes coordinate by file locks only, which the system releases when a process dies: a reader of a shard holds a
shared lock on it, a process that evicts it an exclusive one, and the process that fetches it holds NAME.lock. Of the
processes that read ahead in one order, one at a time holds fill-ORDER.lock and fetches; the others wait for its files.

The bytes in use are in the file cache.lock, so that a fetch lists no folder. Each process lists the cache before its
first fetch, and when no file is left to evict that it knows of. A process that is killed leaves the number too large,
never too small, until the next listing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from triderm_dist.data.shards.format import INDEX, ShardFile
from triderm_dist.data.shards.remote import POLL_SECONDS, FetchStopped, Store, disk_error
from triderm_dist.files import lock_file, unlock_file
from triderm_dist.schema import DataError

_SET = re.compile(r"[0-9a-f]{16}")
"""The folder of a set, named by the hash of its index."""
_FETCHING = re.compile(r"(?P<name>.+)\.(?P<bytes>\d+)\.fetch(?P<attempt>\.\d+)?")
"""A file that is being fetched: space is reserved under this name, the number of the attempt is added for the data."""
_DIGITS = 20
"""Digits of the number in cache.lock, so that it is overwritten by one of the same length."""


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
        self._evictable: deque[_Listed] | None = None  # of the last listing, least recently used first
        self._next_listing = 0.0

    def open(
        self, file: ShardFile, stop: threading.Event | None = None, may_fetch: Callable[[], bool] = lambda: True
    ) -> CachedFile:
        """Open a file, after fetching it if it is not cached; where another process is fetching it, wait for that.

        may_fetch: asked before each attempt; while it is False, another process is expected to fetch the file, for
        `remote.stall_seconds` at most.

        Raises DataError as `Store.fetch`, if the file does not fit into the cache, or after waiting twice
        `remote.total_seconds` for a process that fetches it; FetchStopped once `stop` is set.
        """
        stop = stop or threading.Event()
        path = self.folder / file.url
        deadline, patience = None, time.monotonic() + self.store.remote.stall_seconds
        try:
            while True:
                if opened := _open_shared(path, file.bytes):
                    return opened
                if may_fetch() or time.monotonic() > patience:
                    deadline = deadline or time.monotonic() + 2 * self.store.remote.total_seconds
                    with _locked(_lock_of(path)) as locked:
                        if locked and not _has_size(path, file.bytes):
                            self._fetch(file, path, stop, deadline)
                            continue
                if stop.wait(POLL_SECONDS):
                    raise FetchStopped
                if deadline and time.monotonic() > deadline:
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
        counts = False
        try:
            self.store.fetch(file, part, stop)
            part.replace(path)
            counts = path.suffix == ".tar"
        finally:
            part.unlink(missing_ok=True)
            if not counts:
                with self._usage() as usage:
                    usage.bytes -= file.bytes

    def _reserve(self, file: ShardFile, part: Path) -> bool:
        """Evict shards, least recently used first, until a file fits, and reserve its space by an empty file.

        Returns False if too much is being read. Raises DataError if it can never fit, OSError for a full disk.
        """
        if file.bytes > self.limit:
            raise DataError(
                f"{self.store.shown(file.url)}: its {file.bytes / 1e9:.2f} GB do not fit into the cache of "
                f"{self.limit / 1e9:g} GB; raise data.remote.cache_gb"
            )
        with self._usage() as usage:
            if listed := self._evictable is None or usage.unknown:
                self._list(usage)
            while usage.bytes + file.bytes > self.limit or self._free() < file.bytes:
                if self._evictable:
                    self._evict(self._evictable.popleft(), usage)
                elif not listed and time.monotonic() >= self._next_listing:
                    self._list(usage)
                    listed = True
                else:
                    break
            if self._free() < file.bytes:
                raise OSError(errno.ENOSPC, f"{file.bytes / 1e9:.2f} GB needed, {self._free() / 1e9:.2f} GB free")
            if usage.bytes + file.bytes > self.limit:
                return False
            part.touch()
            usage.bytes += file.bytes
            return True

    def _free(self) -> int:
        return shutil.disk_usage(self.root).free

    @contextlib.contextmanager
    def _usage(self) -> Iterator[_Usage]:
        """Hold cache.lock and yield the bytes that files use or reserve, to change."""
        path = self.root / "cache.lock"
        with _locked(path, wait=True), path.open("r+b", buffering=0) as file:
            text = file.read(_DIGITS).strip()
            usage = _Usage(int(text) if text.isdigit() else 0, unknown=not text.isdigit())
            before = -1 if usage.unknown else usage.bytes
            try:
                yield usage
            finally:
                if usage.bytes != before and not usage.unknown:
                    os.pwrite(file.fileno(), b"%0*d" % (_DIGITS, max(0, usage.bytes)), 0)

    def _list(self, usage: _Usage) -> None:
        """List the cache: count its bytes, and queue its shards for eviction.

        Removes incomplete files of killed processes. Files that are not of a cache are left alone: `root` may be any
        folder, such as that of a whole disk. Where every file is being read, the next listing waits for 20 times as
        long as this one takes.
        """
        started, used, found = time.monotonic(), 0, list[_Listed]()
        for folder in [each for each in self.root.iterdir() if _is_of_cache(each)]:
            with os.scandir(folder) as entries:
                for entry in entries:
                    fetching = _FETCHING.fullmatch(entry.name)
                    if not fetching and not entry.name.endswith(".tar"):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        if not fetching:
                            status = entry.stat()
                            used += status.st_size
                            found.append(_Listed(status.st_mtime_ns, entry.path, status.st_size))
                            continue
                        with _locked(_lock_of(folder / fetching["name"])) as abandoned:
                            if abandoned:
                                os.unlink(entry.path)
                            elif not fetching["attempt"]:
                                used += int(fetching["bytes"])
        usage.bytes, usage.unknown = used, False
        self._evictable = deque(sorted(found))
        self._next_listing = time.monotonic() + 20 * (time.monotonic() - started)

    def _evict(self, listed: _Listed, usage: _Usage) -> None:
        """Remove a file, unless a process reads it, or has done so after it was listed."""
        try:
            with open(listed.path, "rb") as file:
                lock_file(file, wait=False)
                if os.fstat(file.fileno()).st_mtime_ns == listed.used:
                    os.unlink(listed.path)
                    usage.bytes -= listed.bytes
        except (FileNotFoundError, BlockingIOError):
            pass


@dataclass
class _Usage:
    """The bytes that the files of the cache use or reserve.  unknown: nothing was written down."""

    bytes: int
    unknown: bool = False


class _Listed(NamedTuple):
    """A shard in the cache, and the time of its last use in ns."""

    used: int
    path: str
    bytes: int


class FillLock:
    """The right to fetch ahead in one order, which one process of a node has at a time.

    name: of the order, equal in all processes that follow it.
    """

    def __init__(self, cache: Cache, name: str) -> None:
        self._path = cache.folder / f"fill-{name}.lock"
        self._file: IO[bytes] | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def acquire(self) -> bool:
        """Try to get the right; return whether this process has it now."""
        file = self._path.open("ab")
        try:
            lock_file(file, wait=False)
            if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                self._file = file
                return True
        except (BlockingIOError, FileNotFoundError):  # the process that had it may have removed it meanwhile
            pass
        file.close()
        return False

    def release(self) -> None:
        if self._file:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _is_of_cache(folder: Path) -> bool:
    """Return whether a folder holds the files of one set, as `open.open_index` makes it."""
    return bool(_SET.fullmatch(folder.name)) and (folder / INDEX).is_file()


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock on a lock file. Yields False if another process has it, unless `wait`."""
    with path.open("ab") as file:
        try:
            lock_file(file, wait=wait)
        except BlockingIOError:
            yield False
        else:
            yield True


def _has_size(path: Path, size: int) -> bool:
    with contextlib.suppress(FileNotFoundError):  # another process may evict it at any time
        return path.stat().st_size == size
    return False


def _open_shared(path: Path, size: int) -> CachedFile | None:
    """Open a file under a shared lock; None if it does not exist or is about to be evicted."""
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
