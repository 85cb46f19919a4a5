"""Memory of this machine, limited by the control group of a container or a job."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

from triderm_dist.runtime.cgroup import memory_limit


def memory() -> tuple[int, int] | None:
    """Return (total, available) in bytes; None without psutil."""
    try:
        import psutil
    except ImportError:
        return None
    found = psutil.virtual_memory()
    total, available = found.total, found.available
    if (limited := memory_limit()) and limited[0] < total:
        limit, used = limited
        total, available = limit, max(0, min(available, limit - used))
    return total, available


def available_memory() -> int | None:
    """Return the bytes that programs may still take; None without psutil."""
    found = memory()
    return None if found is None else found[1]


def return_freed_memory() -> None:
    """Give back to the system what this process has freed and its allocators, the C library's and Arrow's, keep."""
    if arrow := sys.modules.get("pyarrow"):
        arrow.default_memory_pool().release_unused()
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
