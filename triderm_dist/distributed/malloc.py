"""Settings of the allocators: that of the C library, and PyTorch's for GPUs."""

from __future__ import annotations

import ctypes
import os
import sys

import torch


def disable_malloc_trim() -> None:
    """Keep the memory of freed tensors in this process for reuse.

    By default glibc returns each large block to the kernel, which zeroes every page of the next allocation: half the
    time of a CNN's training step. glibc's MALLOC_ environment variables take precedence.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # of glibc's malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)
    mallopt(m_top_pad, 64 * 2**20)


def use_expandable_segments() -> None:
    """Let PyTorch's allocator grow its GPU memory segments, which avoids fragmentation over trainings of several
    networks and micro-batches in one process.

    Takes effect only before the first allocation. PYTORCH_ALLOC_CONF (before PyTorch 2.10 PYTORCH_CUDA_ALLOC_CONF)
    takes precedence. Does nothing if the driver does not support virtual memory management, as on some GPU partitions.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if torch.version.cuda is None or any(name in os.environ for name in names) or not _reserves_addresses():
        return
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    os.environ[names[(major, minor) < (2, 10)]] = "expandable_segments:True"


def _reserves_addresses() -> bool:
    """Return whether the CUDA driver maps memory to reserved addresses on the first GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        supported, attribute = ctypes.c_int(0), 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        failed = driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(supported), attribute, 0)
    except (OSError, AttributeError):
        return False
    return not failed and bool(supported.value)
