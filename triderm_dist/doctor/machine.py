"""Devices, memory, disk and clock of this host."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from triderm_dist.data.threads import available_cores
from triderm_dist.doctor.findings import GIB, Finding, try_import
from triderm_dist.runtime.memory import memory

MIN_SHARED_MEMORY = GIB
"""Bytes of /dev/shm that NCCL needs between the GPUs of one machine."""
CLOCK_SECONDS = 60.0
"""A file modified more than this many seconds in the future shows that the clock is wrong."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees; memory in bytes."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int]


def find_gpus() -> list[Gpu]:
    """Return the GPUs that torch can use."""
    torch = try_import("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    gpus = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        gpus.append(Gpu(device.name, device.total_memory, torch.cuda.mem_get_info(i)[0], (device.major, device.minor)))
    return gpus


def machine_findings(gpus: Sequence[Gpu], output: Path, written: Sequence[Path]) -> list[Finding]:
    """Describe this host. written: files whose modification times must be in the past."""
    shared = shared_memory(len(gpus))
    return [*_devices(gpus), Finding("CPU", f"{available_cores()} cores"), _memory(), *([shared] if shared else []),
            _disk(output), _clock(written)]  # fmt: skip


def _devices(gpus: Sequence[Gpu]) -> list[Finding]:
    if not gpus:
        torch = try_import("torch")
        if torch is None:
            return [Finding("GPU", "not known without torch")]
        return [no_gpu(torch.version.cuda, *_driver(), os.environ.get("CUDA_VISIBLE_DEVICES"))]
    return [
        Finding(
            f"GPU {i}",
            f"{gpu.name}, {gpu.free / GIB:.0f} of {gpu.memory / GIB:.0f} GiB free",
            "warning" if gpu.free < gpu.memory / 2 else "ok",
            "another process uses it; see nvidia-smi" if gpu.free < gpu.memory / 2 else "",
        )
        for i, gpu in enumerate(gpus)
    ]


def _driver() -> tuple[bool, bool]:
    """Return whether an NVIDIA driver runs, and whether a GPU is visible; a container sees its host's driver."""
    wsl = Path("/usr/lib/wsl/lib/libcuda.so.1").exists()
    driver = wsl or Path("/proc/driver/nvidia/version").exists()
    return driver, wsl or any(Path("/dev").glob("nvidia[0-9]*"))


def no_gpu(cuda: str | None, driver: bool, device: bool, visible: str | None = None) -> Finding:
    """Explain why torch sees no GPU.

    cuda: the CUDA version that torch is built for, None for a CPU build. driver, device: as returned by `_driver`.
    visible: CUDA_VISIBLE_DEVICES.
    """
    if not driver:
        return Finding("GPU", "none; runs on the CPU")
    if visible in ("", "-1"):
        return Finding("GPU", "hidden by CUDA_VISIBLE_DEVICES; runs on the CPU")
    if not device:
        advice = "start the container with --gpus all; on Kubernetes request nvidia.com/gpu"
        return Finding(
            "GPU", "the host has an NVIDIA driver, but no GPU is visible in this container", "warning", advice
        )
    if cuda is None:
        advice = "install torch for CUDA, see pytorch.org/get-started; CUDA_VISIBLE_DEVICES= selects the CPU"
        return Finding("GPU", "there is a GPU, but this torch is a CPU build", "error", advice)
    advice = (
        "compare with the CUDA version that nvidia-smi prints; update the driver, or install torch for that version"
    )
    return Finding("GPU", f"there is a GPU, but torch for CUDA {cuda} does not see it", "error", advice)


def _memory() -> Finding:
    found = memory()
    if found is None:
        return Finding("memory", "not known without psutil", "warning", "pip install psutil")
    total, free = found
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return Finding("memory", text, "warning", "close other programs") if free < 2 * GIB else Finding("memory", text)


def shared_memory(gpus: int, folder: Path = Path("/dev/shm")) -> Finding | None:
    """Check that /dev/shm is large enough for NCCL between the GPUs of this host; None for fewer than two GPUs."""
    if gpus < 2 or not folder.is_dir():
        return None
    size = shutil.disk_usage(folder).total
    if size >= MIN_SHARED_MEMORY:
        return Finding(f"{folder}", f"{size / GIB:.0f} GiB for NCCL between the GPUs")
    advice = (
        "start the container with --shm-size=8g or --ipc=host; on Kubernetes mount an emptyDir of medium Memory there"
    )
    return Finding(f"{folder}", f"{size / 2**20:.0f} MiB, NCCL between {gpus} GPUs needs about 1 GiB", "error", advice)


def _disk(output: Path) -> Finding:
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return Finding("disk", f"{folder} is a file", "error", "set another output=FOLDER")
    if not os.access(folder, os.W_OK):
        return Finding("disk", f"{folder} is not writable", "error", "set another output=FOLDER")
    free = shutil.disk_usage(folder).free
    return Finding("disk", f"{free / GIB:.1f} GiB free at {output}")


def _clock(written: Sequence[Path]) -> Finding:
    """Check the clock against the times at which files were written; contacts no time server."""
    now = time.time()
    times = {}
    for path in written:
        with contextlib.suppress(OSError):
            times[path] = path.stat().st_mtime
    text = f"{_utc(now)} UTC"
    latest = max(times, key=times.__getitem__, default=None)
    if latest is None or times[latest] <= now + CLOCK_SECONDS:
        return Finding("clock", text)
    advice = "set it (timedatectl set-ntp true, chronyc makestep): certificates and buckets reject a wrong clock"
    return Finding("clock", f"{text}, but {latest} was written at {_utc(times[latest])}", "warning", advice)


def _utc(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S}"
