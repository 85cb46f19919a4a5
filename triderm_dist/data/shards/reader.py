"""Read photo bytes of local or remote shards; remote ones are fetched ahead in the order of the plan."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import os
import threading
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from triderm_dist.data.open_files import OpenFiles
from triderm_dist.data.shards.cache import Cache, CachedFile, FillLock
from triderm_dist.data.shards.format import ShardFile
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.remote import FetchStopped
from triderm_dist.runtime.mounts import network_file_system
from triderm_dist.runtime.process import open_files_limit, raise_open_files_limit
from triderm_dist.schema import ConfigError, DataError


def most_open_files() -> int:
    """Return the number of shards that this process keeps open: a quarter of its limit of open files."""
    raise_open_files_limit()
    return max(1, open_files_limit() // 4 - 10)


def note_on_open_files(index: ShardIndex, window: int | None) -> str | None:
    """Return a note for a set that is read slowly: whole-epoch shuffle of more shards than stay open, on a network
    disk, where each read then opens a file. window: of the sampling. None if there is nothing to note.
    """
    shards, most = len(index.shards), most_open_files()
    if window is not None or index.remote or shards <= most or not (kind := network_file_system(index.folder)):
        return None
    fits = max(1, most // 2) * (len(index) // shards)  # a window begins and ends within shards of its neighbors
    digits = 10 ** max(0, len(str(fits)) - 2)
    return (
        f"{shards:,} shards are read in random order, of which {most:,} stay open (a quarter of ulimit -n), and "
        f"{index.folder} is on a network disk ({kind}), where opening one takes long; "
        f"train.sampling.window={max(1, fits // digits * digits)} reads them window by window, or raise ulimit -n"
    )


def open_shards(index: ShardIndex, cache_share: float = 1.0) -> FolderShards | RemoteShards:
    """Return a reader of the shards of a set. cache_share: see `RemoteShards`."""
    return RemoteShards(index, cache_share) if index.remote else FolderShards(index)


class FolderShards:
    """Shards of a local folder, opened at the first read; those opened last are kept open (`OpenFiles`)."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._files = OpenFiles[int, IO[bytes]](most_open_files())

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read bytes of a shard. Raises DataError if it has vanished or become shorter."""
        try:
            return _pread(self._files.get(shard, self._open_file), offset, size)
        except OSError as error:
            raise DataError(
                f"{self._index.path(shard)}: {error.strerror or error}, while reading; restore the file and rerun the "
                "same command to resume from the last checkpoint"
            ) from None

    def _open_file(self, shard: int) -> IO[bytes]:
        return self._index.path(shard).open("rb", buffering=0)

    def read_ahead(self, order: np.ndarray, batch: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Do nothing: all files are local. See `RemoteShards.read_ahead`."""
        return contextlib.nullcontext(lambda steps: None)

    def close(self) -> None:
        self._files.clear()


class RemoteShards:
    """Shards of a remote set, fetched when they are read, or in advance inside `read_ahead`.

    cache_share: the part of the cache that reading in advance may fill, and of the files that stay open, where several
    sets are read at the same time.
    """

    def __init__(self, index: ShardIndex, cache_share: float = 1.0) -> None:
        assert index.remote
        self._cache, self._shards, self._share = index.remote, index.shards, cache_share
        self._ahead: _ReadAhead | None = None

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read bytes of a shard, after fetching it where needed. Raises DataError if it cannot be fetched."""
        ahead = self._ahead
        if ahead and ahead.will_use(shard):
            return _pread(ahead.wait_for(shard), offset, size)
        cached = self._cache.open(self._shards[shard])
        try:
            return _pread(cached.file, offset, size)
        finally:
            cached.close()

    @contextlib.contextmanager
    def read_ahead(self, order: np.ndarray, batch: int) -> Iterator[Callable[[int], None]]:
        """Fetch in advance for reads that follow `order` (n,), the shard of each sample of all ranks, `batch` samples
        per step; -1 for samples of other sets.

        Yields a function to call with the number of steps whose reads are done. Raises ConfigError if the shards
        that one step needs do not fit into the cache together.

        Where the block is left early, the reads that it still expected raise DataError until the next `read_ahead`:
        threads may be in the middle of them, and must not begin to fetch by themselves.
        """
        self.close()
        self._ahead = current = _ReadAhead(self._cache, self._shards, order, batch, self._share)
        try:
            yield current.mark_read
        finally:
            current.close()

    def close(self) -> None:
        if self._ahead:
            self._ahead.close()


class _ReadAhead:
    """Fetches and holds the shards of one pass over an order of samples.

    Shards are admitted in the order of their first use, as long as all admitted ones fit into the cache together. One
    is released two steps after its last use, since ranks may be up to two steps apart. So no rank can take the space
    that another one needs to continue. Of the ranks of a node, which share the order, one fetches; where it ends,
    another one takes over.
    """

    def __init__(
        self, cache: Cache, shards: tuple[ShardFile, ...], order: np.ndarray, batch: int, share: float
    ) -> None:
        self._cache, self._shards, self._slack, self._batch = cache, shards, 2 * batch, batch
        self._share, self._limit = share, cache.limit * share
        self._last_use = np.full(len(shards), -1, np.int64)
        own = np.flatnonzero(order >= 0)
        self._last_use[order[own]] = own  # where an index repeats, the last assignment wins
        first_use = np.full(len(shards), len(order), np.int64)
        first_use[order[own[::-1]]] = own[::-1]
        self._queue = np.argsort(first_use, kind="stable")[: int((self._last_use >= 0).sum())]
        self._check_capacity(first_use[self._queue])
        same = hashlib.sha256(first_use.tobytes() + self._last_use.tobytes() + _job().encode())
        self._fill = FillLock(cache, same.hexdigest()[:16])
        self._next, self._position, self._admitted_bytes = 0, 0, 0
        self._admitted, self._held = list[tuple[int, int]](), list[tuple[int, int]]()  # heaps of (last use, shard)
        self._fetched = np.zeros(len(shards), bool)
        self._open: dict[int, CachedFile] = {}
        self._most = max(1, int(most_open_files() * share))
        self._failure: BaseException | None = None
        self._stop, self._changed = threading.Event(), threading.Condition()
        threading.Thread(target=self._begin, name="read ahead", daemon=True).start()

    def will_use(self, shard: int) -> bool:
        """Return whether a read that is still to come needs this shard."""
        return bool(self._last_use[shard] >= self._position)

    def wait_for(self, shard: int) -> IO[bytes]:
        """Wait for a shard and return its open file. Raises the errors of fetching it."""
        with self._changed:
            while True:
                if self._failure:
                    raise self._failure
                if shard in self._open:
                    return self._open[shard].file
                if self._stop.is_set():
                    raise self._closed(shard)
                if self._fetched[shard]:
                    break
                self._changed.wait()
        try:
            cached = self._cache.open(self._shards[shard], self._stop)  # closed since, as too many were open
        except FetchStopped:
            raise self._closed(shard) from None
        with self._changed:
            self._hold(shard, cached)
        return cached.file

    def mark_read(self, steps: int) -> None:
        """Close the shards that no step after the first `steps` reads, and admit the next ones."""
        with self._changed:
            self._position = steps * self._batch
            while self._held and self._held[0][0] < self._position:
                if cached := self._open.pop(heapq.heappop(self._held)[1], None):
                    cached.close()
            while self._admitted and self._admitted[0][0] < self._position - self._slack:
                self._admitted_bytes -= self._shards[heapq.heappop(self._admitted)[1]].bytes
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._stop.set()
            while self._open:
                self._open.popitem()[1].close()
            self._fill.release()
            self._changed.notify_all()

    def _begin(self) -> None:
        """Open shards that another process fetches, until this one may fetch; then fetch on several threads."""
        while (shard := self._admit_next()) is not None:
            if not self._get(shard):
                return

    def _may_fetch(self) -> bool:
        with self._changed:
            if self._stop.is_set():
                return False
            if not self._fill.held and self._fill.acquire():
                for number in range(1, self._cache.store.remote.downloads):
                    threading.Thread(target=self._begin, name=f"read ahead {number}", daemon=True).start()
            return self._fill.held

    def _get(self, shard: int) -> bool:
        """Open an admitted shard; return False if the pass has ended or failed."""
        try:
            cached = self._cache.open(self._shards[shard], self._stop, self._may_fetch)
        except FetchStopped:
            return False
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._stop.set()
                self._changed.notify_all()
            return False
        with self._changed:
            self._fetched[shard] = True
            heapq.heappush(self._held, (int(self._last_use[shard]), shard))
            self._hold(shard, cached)
            self._changed.notify_all()
        return True

    def _hold(self, shard: int, cached: CachedFile) -> None:
        """Keep a file open until its last use, or until more are open than may be. The caller holds the lock."""
        if self._stop.is_set() or self._last_use[shard] < self._position:
            cached.close()
            return
        while len(self._open) >= self._most:
            self._open.pop(next(iter(self._open))).close()
        self._open[shard] = cached

    def _closed(self, shard: int) -> DataError:
        return DataError(f"{self._shards[shard].url}: read after the reader was closed")

    def _admit_next(self) -> int | None:
        """Wait until the next shard fits and return it; None if there is none left or the pass has ended."""
        with self._changed:
            while not self._stop.is_set() and self._next < len(self._queue):
                shard = int(self._queue[self._next])
                if self._admitted_bytes + self._shards[shard].bytes <= self._limit:
                    self._next += 1
                    self._admitted_bytes += self._shards[shard].bytes
                    heapq.heappush(self._admitted, (int(self._last_use[shard]), shard))
                    return shard
                self._changed.wait()
        return None

    def _check_capacity(self, first_use: np.ndarray) -> None:
        """Raise ConfigError where the cache is too small for the shards needed at one time.

        first_use: of each shard in the queue.
        """
        size = np.array([shard.bytes for shard in self._shards], np.int64)[self._queue]
        begin, end = np.maximum(first_use - self._batch, 0), self._last_use[self._queue] + self._slack + 1
        change = np.argsort(np.concatenate([begin, end]), kind="stable")
        need = int(np.cumsum(np.concatenate([size, -size])[change]).max(initial=0))
        if need > self._limit:
            raise ConfigError(
                f"data.remote.cache_gb={self._cache.limit / 1e9:g}: this order needs {need / self._share / 1e9:.3g} GB "
                "of shards at a time; raise it, or lower train.sampling.window (samples that are shuffled together)"
            )


def _job() -> str:
    """Return what the ranks of one training have in common, and no other process: they stay together, step by step."""
    ranks = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")]
    return ":".join(ranks) if all(ranks) else f"process {os.getpid()}"


def _pread(file: IO[bytes], offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise DataError(
            f"{file.name}: truncated, ends before byte {offset + size}; run triderm verify, then pack again"
        )
    return data
