"""Classify errors of PyTorch and of the libraries below it, mostly by their texts."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

DOCTOR = "to examine all ranks: triderm ranks, with the same options, -m doctor and the same settings"

_OUT_OF_MEMORY = re.compile(
    r"out of memory|out_?of_?memory|can(?:'|no)t allocate memory|ALLOC_FAILED|ALLOCATION_FAILED|MemoryAllocation"
    r"|MEMORY_ALLOC|bad_alloc|failed to allocate|unable to allocate|resource_exhausted"
    r"|unable to find an engine to execute",
    re.IGNORECASE,
)
"""Messages of PyTorch's CPU allocator, CUDA's and HIP's run-time and driver, cuBLAS, cuDNN (which reports that it finds
no engine if none fits into the free memory), cuFFT, cuSPARSE, Triton, NCCL, C++.
"""
_PERMANENT = (
    (
        re.compile(r"Duplicate GPU detected", re.IGNORECASE),
        "two ranks use one GPU",
        "start one rank per GPU (--num_processes); several trainings share a GPU by triderm crossval "
        "parallel_folds=true gpus=0.5",
    ),
    (
        _OUT_OF_MEMORY,
        "out of memory while the ranks connect",
        "end what else uses the GPU (nvidia-smi lists it), or start fewer ranks",
    ),
    (
        re.compile(r"/dev/shm|shared memory segment|No space left on device", re.IGNORECASE),
        "/dev/shm is missing or too small",
        "start the container with --shm-size=8g or --ipc=host; on Kubernetes mount an emptyDir of medium Memory there",
    ),
    (
        re.compile(
            r"socket interface|unable to find (?:address|interface)|unable to resolve|ifname|failed to find interface"
            r"|cannot assign requested address|name or service not known",
            re.IGNORECASE,
        ),
        "no such network interface or address",
        "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the interface between the hosts, or unset them",
    ),
    (
        re.compile(r"ncclInvalid(?:Usage|Argument)|not built with NCCL|driver version is insufficient", re.IGNORECASE),
        "the ranks cannot use NCCL as they are started",
        "NCCL_DEBUG=WARN shows details",
    ),
)
"""Permanent faults of the backends: (part of the message, meaning, what to do)."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or the one that caused it, means that the device or the host is out of memory.

    torch has an exception type for its own allocator only; libraries (cuBLAS, cuDNN, NCCL) and drivers say it in their
    messages.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False


def is_backend_error(error: BaseException) -> bool:
    """Return whether the store or a backend of the process group raised an error; gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def permanent_fault(error: BaseException) -> str:
    """Return the meaning of a permanent fault of a backend, and what to do; "" for other errors."""
    text = str(error)
    for pattern, meaning, advice in _PERMANENT:
        if pattern.search(text):
            return f"{meaning} ({reason_of(error)}); {advice}; {DOCTOR}"
    return ""


def reason_of(error: BaseException) -> str:
    """Return the line of a backend's error with the reason: NCCL's "Last error", else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    after = [i + 1 for i, line in enumerate(lines[:-1]) if line.lower().startswith("last error")]
    return lines[after[0] if after else 0][:300]
