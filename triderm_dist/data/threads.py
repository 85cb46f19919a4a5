"""Thread pools: how many threads to use, and work on items in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the CPU cores that this process may use: its affinity mask, limited by the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # not a cgroup v2
        return allowed
    return allowed if quota == "max" else min(allowed, max(1, int(quota) // int(period)))


def openmp_threads() -> int:
    """Return the threads that OpenMP code may start in this process: `available_cores`, or OMP_NUM_THREADS if
    that is smaller.
    """
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return min(available_cores(), int(limit)) if limit.isdigit() and int(limit) else available_cores()


def map_in_order(
    work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Iterator[tuple[_Item, _Result]]:
    """Yield (item, work(item)) in the order of the items, working on threads a few items ahead of the consumer."""
    waiting: deque[tuple[_Item, Future[_Result]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > 4 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
