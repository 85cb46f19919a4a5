"""Available cores, OpenMP threads, and the ordered thread pool."""

import os
from pathlib import Path

import pytest

from triderm_dist.data.threads import available_cores, map_in_order, openmp_threads


@pytest.mark.parametrize(
    ("content", "cores"), [("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8)]
)
def test_available_cores_respect_the_cgroup_quota(content, cores, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(f"{content}\n")
    assert available_cores(tmp_path) == cores


def test_available_cores_without_a_cgroup_follow_the_affinity_mask(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert available_cores(tmp_path) == 2


@pytest.mark.parametrize(("variable", "threads"), [("", 8), ("3", 3), ("3,2", 3), ("64", 8), ("0", 8), ("many", 8)])
def test_openmp_threads_respect_omp_num_threads(variable, threads, monkeypatch) -> None:
    monkeypatch.setattr("triderm_dist.data.threads.available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert openmp_threads() == threads


def test_in_order_keeps_the_order_with_limited_prefetch() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        return item * item

    for done, (item, result) in enumerate(map_in_order(work, range(100), workers=3), start=1):
        assert result == item * item == (done - 1) ** 2
        assert len(started) <= done + 12
