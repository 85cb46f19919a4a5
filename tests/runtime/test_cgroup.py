"""Limits of containers: control groups of version 1 and 2, with paths of the container or of its host."""

from pathlib import Path

import pytest

from triderm_dist.runtime.cgroup import cpu_quota, memory_limit

GB = 10**9
UNLIMITED = 0x7FFFFFFFFFFFF000
CACHED = f"anon 5\ninactive_file {GB}"
CPU_1 = "cpu,cpuacct/docker/1f"
DOCKER_1 = "4:memory:/docker/1f\n3:cpu,cpuacct:/docker/1f\n"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("", {"cpu.max": "400000 100000"}, 4.0),  # no /proc
        ("0::/user.slice/job\n", {"user.slice/job/cpu.max": "max 100000", "user.slice/cpu.max": "200000 100000"}, 2.0),
        ("0::/job/step\n", {"job/step/cpu.max": "400000 100000", "job/cpu.max": "100000 100000"}, 1.0),
        ("0::/kubepods/pod\n", {"cpu.max": "200000 100000"}, 2.0),  # the path of the host
        ("0::/../../other\n", {"cpu.max": "300000 100000"}, 3.0),
        (DOCKER_1, {f"{CPU_1}/cpu.cfs_quota_us": "250000", f"{CPU_1}/cpu.cfs_period_us": "100000"}, 2.5),
        (DOCKER_1, {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        (DOCKER_1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/a\n", {"cpu.max": "damaged"}, None),
        ("0::/a\n", {}, None),
    ],
)  # fmt: skip
def test_cpu_quota_is_the_smallest_of_all_groups(own, files, cores, tmp_path):
    assert cpu_quota(write(tmp_path, files), group(tmp_path, own)) == cores


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/\n", {"memory.max": 4 * GB, "memory.current": 3 * GB, "memory.stat": CACHED}, (4 * GB, 2 * GB)),
        ("0::/\n", {"memory.max": "max", "memory.current": 3 * GB}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": GB, "a/memory.current": 5}, (GB, 5)),
        (DOCKER_1, {"memory/memory.limit_in_bytes": 2 * GB, "memory/memory.usage_in_bytes": GB}, (2 * GB, GB)),
        (DOCKER_1, {"memory/memory.limit_in_bytes": UNLIMITED, "memory/memory.usage_in_bytes": GB}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_memory_limit_excludes_reclaimable_cache(own, files, limit, tmp_path):
    assert memory_limit(write(tmp_path, files), group(tmp_path, own)) == limit


def write(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return folder / "cgroup"


def group(folder: Path, text: str) -> Path:
    (folder / "own").write_text(text)
    return folder / "own"
