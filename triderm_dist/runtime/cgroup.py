"""CPU and memory limits of a container or a job, from the files of control groups, version 1 and 2.

A process is in one group of each hierarchy, and every group above it limits it too. In a container the path of
/proc/self/cgroup may be one of the host, of which the container sees only the last part, as the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60
"""Version 1 writes the largest number of pages for no limit."""


def cpu_quota(root: Path = ROOT, own: Path = OWN) -> float | None:
    """Return the number of cores that the groups of this process may use; None without a limit."""
    quotas = []
    for folder in _folders("cpu", root, own):
        words = _read(folder / "cpu.max").split()  # version 2: QUOTA PERIOD, in microseconds
        if not words:
            words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[0]) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_limit(root: Path = ROOT, own: Path = OWN) -> tuple[int, int] | None:
    """Return (limit, used) in bytes of the group with the least memory left; None without a limit.

    Files that the kernel keeps in memory and can drop do not count as used.
    """
    found = []
    for folder in _folders("memory", root, own):
        for limit_file, used_file, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _read(folder / limit_file), _read(folder / used_file)
            if limit.isdigit() and int(limit) < _NO_LIMIT:
                lines = [line.split() for line in _read(folder / "memory.stat").splitlines()]
                free = next((int(line[1]) for line in lines if line[:1] == [cached] and line[1:2]), 0)
                found.append((int(limit), max(0, int(used if used.isdigit() else 0) - free)))
    return min(found, key=lambda each: each[0] - each[1], default=None)


def _folders(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of the groups of this process (cgroup v1 and v2), from the innermost to the root."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    yielded = set()
    mounts = [(root, "/"), (root / controller, "/")]
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not names:
            mounts += [(root, path), (root / "unified", path)]
        elif controller in names.split(","):
            mounts += [(root / names, path), (root / controller, path)]
    for mount, path in mounts:
        parts = PurePosixPath(path).parts[1:]
        parts = () if ".." in parts else parts  # of a group above the root that this process sees
        for count in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:count])
            if folder not in yielded:
                yielded.add(folder)
                yield folder


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
