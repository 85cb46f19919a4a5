"""Read photo bytes from local or remote shards, with read-ahead."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from triderm_dist.data.shards.cache import Cache, Held
from triderm_dist.data.shards.format import ShardFile
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.remote import _Stopped
from triderm_dist.schema import ConfigError, DataError


class FolderShards:
    """Shards of a local folder, opened when they are first read; the last `OPEN` stay open."""

    OPEN = 256

    def __init__(self, index: ShardIndex) -> None:
        self._index, self._files, self._lock = index, dict[int, IO[bytes]](), threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard. Raises DataError where it has vanished or become shorter."""
        try:
            with self._lock:
                file = self._files.pop(shard, None) or self._index.path(shard).open("rb", buffering=0)
                self._files[shard] = file  # the last one used is the last one of the dict
                if len(self._files) > self.OPEN:
                    del self._files[next(iter(self._files))]  # closed when its last reader drops it
            return _pread(file, offset, size)
        except OSError as error:
            raise DataError(
                f"{self._index.path(shard)}: {error.strerror or error}, while it was being read; bring it back and run "
                "the same command again, which goes on at the last checkpoint"
            ) from None

    @contextlib.contextmanager
    def read_ahead(self, order: np.ndarray, batch: int) -> Iterator[Callable[[int], None]]:
        """See `RemoteShards.read_ahead`; all that is needed is here."""
        yield lambda batches: None

    def close(self) -> None:
        self._files.clear()


class RemoteShards:
    """Shards of a remote set. Inside `read_ahead` they are fetched ahead in the order in which they will be read."""

    def __init__(self, index: ShardIndex) -> None:
        assert index.remote
        self._cache, self._shards = index.remote, index.shards
        self._pass: _Pass | None = None

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard, which is fetched first if need be. Raises DataError where it can't be had."""
        ahead = self._pass
        if ahead and ahead.wants(shard):
            return _pread(ahead.file(shard), offset, size)
        held = self._cache.hold(self._shards[shard])
        try:
            return _pread(held.file, offset, size)
        finally:
            held.close()

    @contextlib.contextmanager
    def read_ahead(self, order: np.ndarray, batch: int) -> Iterator[Callable[[int], None]]:
        """Fetch ahead for reads that follow `order` (n,), the shard of each sample of all ranks, `batch` samples a
        step.

        Yields a function to call with the number of steps whose reads are done. Raises ConfigError where the shards
        that one step needs do not fit into the cache together.
        """
        self.close()
        self._pass = current = _Pass(self._cache, self._shards, order, batch)
        try:
            yield current.done
        finally:
            current.close()
            if self._pass is current:
                self._pass = None

    def close(self) -> None:
        if self._pass:
            self._pass.close()


class _Pass:
    """One pass over an order: what is held, what comes next.

    Shards are taken in the order of their first use, as long as all that are live fit into the cache: those whose last
    use is not yet more than two steps behind (ranks walk in step, but not on the same foot) and whose first use was
    reached. So no rank can take the room that another one needs to go on.
    """

    def __init__(self, cache: Cache, shards: tuple[ShardFile, ...], order: np.ndarray, batch: int) -> None:
        self._cache, self._shards, self._slack, self._batch = cache, shards, 2 * batch, batch
        self._last = np.full(len(shards), -1, np.int64)
        self._last[order] = np.arange(len(order))  # of equal indices the last assignment stays
        first = np.full(len(shards), len(order), np.int64)
        first[order[::-1]] = np.arange(len(order))[::-1]
        self._queue = np.argsort(first, kind="stable")[: int((self._last >= 0).sum())]
        self._check_room(first[self._queue])
        self._next, self._position, self._taken = 0, 0, dict[int, int]()
        self._held: dict[int, Held] = {}
        self._failure: BaseException | None = None
        self._stop, self._changed = threading.Event(), threading.Condition()
        _allow_open_files(len(self._queue))
        for number in range(cache.store.remote.downloads):
            threading.Thread(target=self._work, name=f"shards ahead {number}", daemon=True).start()

    def wants(self, shard: int) -> bool:
        """Whether a read that is still to come needs this shard."""
        return bool(self._last[shard] >= self._position)

    def file(self, shard: int) -> IO[bytes]:
        """The open file of a shard, when it is there."""
        with self._changed:
            while True:
                if self._failure:
                    raise self._failure
                if shard in self._held:
                    return self._held[shard].file
                if self._stop.is_set():
                    raise DataError(f"{self._shards[shard].url}: nobody waits for it any more")
                self._changed.wait()

    def done(self, steps: int) -> None:
        with self._changed:
            self._position = steps * self._batch
            for shard in [shard for shard in self._held if self._last[shard] < self._position]:
                self._held.pop(shard).close()
            for shard in [s for s in self._taken if self._last[s] < self._position - self._slack]:
                del self._taken[shard]
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._stop.set()
            while self._held:
                self._held.popitem()[1].close()
            self._changed.notify_all()

    def _work(self) -> None:
        while (shard := self._take()) is not None:
            try:
                held = self._cache.hold(self._shards[shard], self._stop)
            except _Stopped:
                return
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._stop.set()
                    self._changed.notify_all()
                return
            with self._changed:
                if self._stop.is_set() or self._last[shard] < self._position:
                    held.close()
                else:
                    self._held[shard] = held
                self._changed.notify_all()

    def _take(self) -> int | None:
        """The next shard that there is room for; None when nothing is left to do."""
        with self._changed:
            while not self._stop.is_set() and self._next < len(self._queue):
                shard = int(self._queue[self._next])
                if sum(self._taken.values()) + self._shards[shard].bytes <= self._cache.limit:
                    self._next += 1
                    self._taken[shard] = self._shards[shard].bytes
                    return shard
                self._changed.wait()
        return None

    def _check_room(self, first: np.ndarray) -> None:
        """first: of each shard in the queue."""
        size = np.array([shard.bytes for shard in self._shards], np.int64)[self._queue]
        begin, end = np.maximum(first - self._batch, 0), self._last[self._queue] + self._slack + 1
        change = np.argsort(np.concatenate([begin, end]), kind="stable")
        need = int(np.cumsum(np.concatenate([size, -size])[change]).max(initial=0))
        if need > self._cache.limit:
            raise ConfigError(
                f"data.remote.cache_gb={self._cache.limit / 1e9:g}: this order needs {need / 1e9:.3g} GB of shards at "
                "a time; raise it, or lower train.sampling.window (samples that are shuffled together)"
            )


def _pread(file: IO[bytes], offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise DataError(
            f"{file.name}: ends before byte {offset + size}, it was cut off; run triderm verify, then pack again"
        )
    return data


def _allow_open_files(number: int) -> None:
    """Every shard in use is an open file; systems allow 1,024 unless asked for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
