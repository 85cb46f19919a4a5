"""Read photo bytes of local or remote shards; remote ones are fetched ahead in the order of the plan."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from triderm_dist.data.shards.cache import Cache, CachedFile
from triderm_dist.data.shards.format import ShardFile
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.remote import FetchStopped
from triderm_dist.runtime.process import open_files_limit, raise_open_files_limit
from triderm_dist.schema import ConfigError, DataError


class FolderShards:
    """Shards of a local folder, opened at the first read; those opened last are kept open.

    Threads open files at the same time, since each open waits for the server of a network disk.
    """

    MAX_OPEN = 4096
    """Fewer where the process may have few files open (`ulimit -n`), of which this set takes a quarter."""

    def __init__(self, index: ShardIndex) -> None:
        self._index, self._files, self._lock = index, dict[int, IO[bytes]](), threading.Lock()
        raise_open_files_limit()
        self._most = max(1, min(self.MAX_OPEN, open_files_limit() // 4 - 10))

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read bytes of a shard. Raises DataError where it has vanished or become shorter."""
        try:
            return _pread(self._files.get(shard) or self._open(shard), offset, size)
        except OSError as error:
            raise DataError(
                f"{self._index.path(shard)}: {error.strerror or error}, while reading; restore the file and rerun the "
                "same command to resume from the last checkpoint"
            ) from None

    def _open(self, shard: int) -> IO[bytes]:
        file = self._open_file(shard)
        with self._lock:
            while shard not in self._files and len(self._files) >= self._most:
                del self._files[next(iter(self._files))]  # closed when its last reader drops it
            return self._files.setdefault(shard, file)  # another thread's, where that was faster

    def _open_file(self, shard: int) -> IO[bytes]:
        return self._index.path(shard).open("rb", buffering=0)

    @contextlib.contextmanager
    def read_ahead(self, order: np.ndarray, batch: int) -> Iterator[Callable[[int], None]]:
        """Do nothing: all files are local. See `RemoteShards.read_ahead`."""
        yield lambda steps: None

    def close(self) -> None:
        self._files.clear()


class RemoteShards:
    """Shards of a remote set, fetched when they are read, or in advance inside `read_ahead`.

    cache_share: the part of the cache that reading in advance may fill, where several sets are read at the same time.
    """

    def __init__(self, index: ShardIndex, cache_share: float = 1.0) -> None:
        assert index.remote
        self._cache, self._shards, self._share = index.remote, index.shards, cache_share
        self._ahead: _ReadAhead | None = None

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Read bytes of a shard, after fetching it where needed. Raises DataError where it cannot be fetched."""
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

        Yields a function to call with the number of steps whose reads are done. Raises ConfigError where the shards
        that one step needs do not fit into the cache together.
        """
        self.close()
        self._ahead = current = _ReadAhead(self._cache, self._shards, order, batch, self._share)
        try:
            yield current.mark_read
        finally:
            current.close()
            if self._ahead is current:
                self._ahead = None

    def close(self) -> None:
        if self._ahead:
            self._ahead.close()


class _ReadAhead:
    """Fetches and holds the shards of one pass over an order of samples.

    Shards are admitted in the order of their first use, as long as all admitted ones fit into the cache together. One
    is released two steps after its last use, since ranks may be up to two steps apart. So no rank can take the space
    that another one needs to continue.
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
        self._next, self._position, self._admitted = 0, 0, dict[int, int]()
        self._open: dict[int, CachedFile] = {}
        self._failure: BaseException | None = None
        self._stop, self._changed = threading.Event(), threading.Condition()
        raise_open_files_limit()
        for number in range(cache.store.remote.downloads):
            threading.Thread(target=self._work, name=f"read ahead {number}", daemon=True).start()

    def will_use(self, shard: int) -> bool:
        """Return whether a read that is still to come needs this shard."""
        return bool(self._last_use[shard] >= self._position)

    def wait_for(self, shard: int) -> IO[bytes]:
        """Return the open file of a shard, as soon as it is fetched. Raises what fetching raised."""
        with self._changed:
            while True:
                if self._failure:
                    raise self._failure
                if shard in self._open:
                    return self._open[shard].file
                if self._stop.is_set():
                    raise DataError(f"{self._shards[shard].url}: read after the reader was closed")
                self._changed.wait()

    def mark_read(self, steps: int) -> None:
        """Close the shards that no step after the first `steps` reads, and admit the next ones."""
        with self._changed:
            self._position = steps * self._batch
            for shard in [shard for shard in self._open if self._last_use[shard] < self._position]:
                self._open.pop(shard).close()
            for shard in [s for s in self._admitted if self._last_use[s] < self._position - self._slack]:
                del self._admitted[shard]
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._stop.set()
            while self._open:
                self._open.popitem()[1].close()
            self._changed.notify_all()

    def _work(self) -> None:
        while (shard := self._admit_next()) is not None:
            try:
                cached = self._cache.open(self._shards[shard], self._stop)
            except FetchStopped:
                return
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._stop.set()
                    self._changed.notify_all()
                return
            with self._changed:
                if self._stop.is_set() or self._last_use[shard] < self._position:
                    cached.close()
                else:
                    self._open[shard] = cached
                self._changed.notify_all()

    def _admit_next(self) -> int | None:
        """Return the next shard once it fits; None when there is none left or the pass has ended."""
        with self._changed:
            while not self._stop.is_set() and self._next < len(self._queue):
                shard = int(self._queue[self._next])
                if sum(self._admitted.values()) + self._shards[shard].bytes <= self._limit:
                    self._next += 1
                    self._admitted[shard] = self._shards[shard].bytes
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


def _pread(file: IO[bytes], offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise DataError(
            f"{file.name}: truncated, ends before byte {offset + size}; run triderm verify, then pack again"
        )
    return data
