"""Settings of the C library's allocator."""

from __future__ import annotations

import ctypes
import os
import sys


def disable_malloc_trim() -> None:
    """Keep the memory of freed tensors in this process, for later ones.

    By default glibc returns each large block to the kernel, which clears every page of the next one: half the time of a
    CNN's training step. glibc's own MALLOC_ variables in the environment take precedence.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # of glibc's malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)
    mallopt(m_top_pad, 64 * 2**20)
