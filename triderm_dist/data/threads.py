"""Thread pools: the number of threads to use, ordered work on items, and the type of work on many machines."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from triderm_dist.runtime.cgroup import cpu_quota
from triderm_dist.runtime.usage import add_data_wait

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Key = TypeVar("Key", int, str)
Piece = TypeVar("Piece")


class Distribute(Protocol):
    """Calls `work(key, piece)` for each piece, on other machines too and in any order, perhaps more than once where a
    machine is lost, and yields the key of each whose work is done.
    """

    def __call__(self, work: Callable[[Key, Piece], object], pieces: Iterable[tuple[Key, Piece]]) -> Iterable[Key]: ...


def available_cores() -> int:
    """Return the CPU cores that this process may use: its affinity mask, limited by the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else min(allowed, max(1, int(quota)))


def openmp_threads() -> int:
    """Return the threads that OpenMP code may start in this process: `available_cores`, or OMP_NUM_THREADS if
    that is smaller.
    """
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return min(available_cores(), int(limit)) if limit.isdigit() and int(limit) else available_cores()


class Decoders(ThreadPoolExecutor):
    """A pool of `workers` threads that decode photos."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers, thread_name_prefix="decode")
        self.workers = workers

    def jobs(self, count: int, most: int) -> list[slice]:
        """Cut `count` items into equal jobs for the threads, of `most` items at most."""
        size = max(1, min(most, -(-count // self.workers)))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def map_in_order(
    work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Iterator[tuple[_Item, _Result]]:
    """Yield (item, work(item)) in the order of the items, working on threads a few items ahead of the consumer."""
    waiting: deque[tuple[_Item, Future[_Result]]] = deque()
    pool, wait = ThreadPoolExecutor(workers), True
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 4 * workers:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    except KeyboardInterrupt:
        wait = False  # an item may read from a slow disk for minutes; the program ends without it
        raise
    finally:
        pool.shutdown(wait, cancel_futures=True)


def _finished(item: _Item, future: Future[_Result]) -> tuple[_Item, _Result]:
    """Wait for the result of an item."""
    started = time.perf_counter()
    result = future.result()
    add_data_wait(time.perf_counter() - started)
    return item, result
