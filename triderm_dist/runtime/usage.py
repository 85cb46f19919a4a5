"""What a program needed: CPU time, wall time, peak memory, and what its main thread waited for.

CPU time and memory are measured by the process that starts the program (`Usage`), waits by the program (`write_waits`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from triderm_dist.runtime.terminal import table

if TYPE_CHECKING:
    import resource

WAITS_FILE = "TRIDERM_WAITS_FILE"
"""Environment variable with the file that `write_waits` writes."""
_MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024
_PRESSURE = Path("/proc/pressure/io")

_waited_for_data = 0.0


@dataclass(frozen=True)
class Usage:
    """Seconds of CPU time and of wall time of a program, the peak memory of its largest process, and seconds that its
    main thread waited for decoded photos or tokens (data), for the disk, and for anything else: other threads, other
    processes, a free core.

    CPU time and memory are those of all processes that were waited for; the workers of Ray are not. disk: the time in
    which any program of the machine waited for a disk; None where the system does not tell. A program that does not
    write its waits has None for all.
    """

    cpu_seconds: float
    seconds: float
    peak_mb: float
    data_seconds: float | None = None
    disk_seconds: float | None = None
    other_seconds: float | None = None


class Meter:
    """Measures a program from its start, which is now, to its end, which `wait` awaits. waits: see `WAITS_FILE`."""

    def __init__(self, waits: Path) -> None:
        waits.unlink(missing_ok=True)
        self._waits, self._started, self._disk = waits, time.perf_counter(), _disk_stalls()

    def wait(self, process: subprocess.Popen) -> tuple[int, Usage | None]:  # type: ignore[type-arg]
        """Wait for a process; return its exit code and usage, None where a signal handler has awaited it before."""
        try:
            _, status, used = os.wait4(process.pid, 0)
        except ChildProcessError:
            return process.wait(), None
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, self._usage(used)

    def _usage(self, used: resource.struct_rusage) -> Usage:
        seconds, disk = time.perf_counter() - self._started, _disk_stalls()
        usage = used.ru_utime + used.ru_stime, seconds, used.ru_maxrss * _MEMORY_UNIT / 2**20
        try:
            waits = json.loads(self._waits.read_text(encoding="utf-8"))
            left = max(0.0, seconds - waits["main_cpu_seconds"])
            data = min(waits["data_seconds"], left)
        except (OSError, ValueError, KeyError, TypeError):
            return Usage(*usage)
        finally:
            self._waits.unlink(missing_ok=True)
        left -= data
        stalled = None if disk is None or self._disk is None else min(disk - self._disk, left)
        return Usage(*usage, data, stalled, left - (stalled or 0.0))


def add_data_wait(seconds: float) -> None:
    """Count seconds that the main thread waited for decoded photos or tokens."""
    global _waited_for_data
    _waited_for_data += seconds


def write_waits() -> None:
    """Write what the main thread did to the file that the process which started this one asks for; on rank 0 only."""
    if (path := os.environ.get(WAITS_FILE)) and os.environ.get("RANK", "0") == "0":
        waits = {"main_cpu_seconds": time.thread_time(), "data_seconds": _waited_for_data}
        with suppress(OSError):
            Path(path).write_text(json.dumps(waits), encoding="utf-8")


def usage_table(rows: Sequence[tuple[str, Usage]]) -> str:
    """Return the usage of each stage, and their sum, as a table."""
    header = ("stage", "CPU s", "wall s", "cores", "peak MB", "data s", "disk s", "other s")
    total = Usage(
        sum(usage.cpu_seconds for _, usage in rows),
        sum(usage.seconds for _, usage in rows),
        max(usage.peak_mb for _, usage in rows),
    )
    return table(header, [_cells(name, usage) for name, usage in [*rows, ("all", total)]])


def _cells(name: str, usage: Usage) -> list[str]:
    waits = (usage.data_seconds, usage.disk_seconds, usage.other_seconds)
    return [
        name, f"{usage.cpu_seconds:.1f}", f"{usage.seconds:.1f}", f"{usage.cpu_seconds / max(usage.seconds, 1e-9):.1f}",
        f"{usage.peak_mb:.0f}", *("" if each is None else f"{each:.1f}" for each in waits),
    ]  # fmt: skip


def _disk_stalls() -> float | None:
    """Return the seconds since the start of the machine in which a program waited for a disk, None if unknown."""
    try:
        found = re.search(r"^some .*total=(\d+)", _PRESSURE.read_text(encoding="ascii"), re.M)
    except OSError:
        return None
    return int(found[1]) / 1e6 if found else None
