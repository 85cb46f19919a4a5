"""What a program needed: CPU time, wall time, peak memory, and what its main thread waited for.

CPU time is measured by the process that starts the program (`Meter`), memory and waits by the program (`report_usage`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triderm_dist.runtime.terminal import table

if TYPE_CHECKING:
    import resource

USAGE_FILE = "TRIDERM_USAGE_FILE"
"""Environment variable with the file that `report_usage` writes."""
_MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024
_PRESSURE = Path("/proc/pressure/io")

_waited_for_data = 0.0
_peak_mb_of_children = 0.0


@dataclass(frozen=True)
class Usage:
    """Seconds of CPU time and of wall time of a program, the peak memory of its largest process, and seconds that its
    main thread waited for decoded photos or tokens (data), for the disk, and for anything else: other threads, other
    processes, a free core.

    CPU time and memory are those of all its processes, but for the workers of Ray. disk_seconds: the
    time in which any program of the machine waited for a disk; None if the system does not report it. A program that
    reports nothing has None for its waits, and at least the peak memory of its parent: Linux counts from the fork.
    """

    cpu_seconds: float
    seconds: float
    peak_mb: float
    data_seconds: float | None = None
    disk_seconds: float | None = None
    other_seconds: float | None = None


class Meter:
    """Measures a program from its start, which is now, to its end, which `wait` awaits. report: see `USAGE_FILE`."""

    def __init__(self, report: Path) -> None:
        report.unlink(missing_ok=True)
        self._report, self._started, self._disk = report, time.perf_counter(), _disk_stalls()

    def wait(self, process: subprocess.Popen) -> tuple[int, Usage | None]:
        """Wait for a process; return its exit code and usage, None if a signal handler has awaited it before."""
        try:
            _, status, used = os.wait4(process.pid, 0)
        except ChildProcessError:
            return process.wait(), None
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, self._usage(used)

    def _usage(self, used: resource.struct_rusage) -> Usage:
        cpu, seconds, disk = used.ru_utime + used.ru_stime, time.perf_counter() - self._started, _disk_stalls()
        try:
            report = json.loads(self._report.read_text(encoding="utf-8"))
            peak, cpu = report["peak_mb"], cpu + report["children_cpu_seconds"]
            left = max(0.0, seconds - report["main_cpu_seconds"])
            data = min(report["data_seconds"], left)
        except (OSError, ValueError, KeyError, TypeError):
            return Usage(cpu, seconds, _megabytes(used))
        finally:
            self._report.unlink(missing_ok=True)
        left -= data
        stalled = None if disk is None or self._disk is None else min(disk - self._disk, left)
        return Usage(cpu, seconds, peak, data, stalled, left - (stalled or 0.0))


def add_data_wait(seconds: float) -> None:
    """Count seconds that the main thread waited for decoded photos or tokens."""
    global _waited_for_data
    _waited_for_data += seconds


def add_child_peak(megabytes: float) -> None:
    """Count the peak memory in MiB of a process that this one does not wait for, as the children of a fork server."""
    global _peak_mb_of_children
    _peak_mb_of_children = max(_peak_mb_of_children, megabytes)


def report_usage() -> None:
    """Write what this process needed to the file that the process which started it asks for; on rank 0 only."""
    if not (path := os.environ.get(USAGE_FILE)) or os.environ.get("RANK", "0") != "0":
        return
    report = {
        "main_cpu_seconds": time.thread_time(), "data_seconds": _waited_for_data,
        "children_cpu_seconds": _running_children_cpu_seconds(), "peak_mb": max(own_peak_mb(), _peak_mb_of_children),
    }  # fmt: skip
    with suppress(OSError):
        Path(path).write_text(json.dumps(report), encoding="utf-8")


def usages(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Usage]]:
    """Return the name and usage of stages as environment.json has them."""
    names = [field.name for field in fields(Usage)]
    return [(row["stage"], Usage(**{name: row[name] for name in names})) for row in rows]


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


def own_peak_mb() -> float:
    """Return the peak memory in MiB of this process, or of a process that it started and has waited for."""
    import resource

    children = _megabytes(resource.getrusage(resource.RUSAGE_CHILDREN))
    try:
        # Not ru_maxrss, which counts from before the program was started.
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
    except OSError:
        found = None
    own = int(found[1]) / 1024 if found else _megabytes(resource.getrusage(resource.RUSAGE_SELF))
    return max(own, children)


def _running_children_cpu_seconds() -> float:
    """Return the CPU seconds of children that still run, and of those that they have waited for; 0 if unknown.

    A fork server ends after this process, which nobody waits for.
    """
    clock_ticks, children = 0, list[str]()
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            children += path.read_text(encoding="ascii").split()
    for child in children:
        with suppress(OSError):  # a child that has ended
            fields_after_name = Path(f"/proc/{child}/stat").read_bytes().rpartition(b")")[2].split()
            clock_ticks += sum(map(int, fields_after_name[11:15]))  # utime, stime, cutime, cstime
    return clock_ticks / os.sysconf("SC_CLK_TCK")


def _megabytes(used: resource.struct_rusage) -> float:
    return used.ru_maxrss * _MEMORY_UNIT / 2**20
