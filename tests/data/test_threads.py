"""Available cores, OpenMP threads, and the ordered thread pool."""

import os

import pytest

from triderm_dist.data.threads import Decoders, available_cores, map_in_order, openmp_threads


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (3.5, 3), (0.5, 1), (16.0, 8)])
def test_available_cores_respect_the_quota_of_the_container(quota, cores, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("triderm_dist.data.threads.cpu_quota", lambda: quota)
    assert available_cores() == cores


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


@pytest.mark.parametrize(
    ("count", "workers", "sizes"), [(32, 2, [16, 16]), (96, 2, [16] * 6), (8, 3, [3, 3, 2]), (2, 4, [1, 1]), (0, 2, [])]
)
def test_jobs_are_equal_parts_for_all_workers(count, workers, sizes) -> None:
    with Decoders(workers) as pool:
        parts = pool.jobs(count, 16)
    assert [len(range(count)[part]) for part in parts] == sizes
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
