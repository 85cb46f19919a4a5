"""Local shards are opened by several threads at the same time, and a bounded number stays open."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from tests.conftest import Challenge
from tests.processes import HANG_SECONDS
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards import reader as reader_module
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.reader import FolderShards, note_on_open_files


@pytest.fixture
def index(make_challenge: Callable[..., Challenge], tmp_path: Path) -> ShardIndex:
    """22 lesions in 11 shards."""
    return pack_shards(read_challenge(make_challenge().folder), tmp_path / "out", short_side=24, shard_samples=2)


class MeetingShards(FolderShards):
    """Opens a file only when another thread opens one, too."""

    def __init__(self, index: ShardIndex) -> None:
        super().__init__(index)
        self.barrier = threading.Barrier(2, timeout=HANG_SECONDS)

    def _open_file(self, shard: int) -> IO[bytes]:
        self.barrier.wait()
        return super()._open_file(shard)


@pytest.mark.parametrize("shards", [(0, 1), (3, 3)])
def test_threads_open_files_at_the_same_time(index: ShardIndex, shards: tuple[int, int]) -> None:
    reader = MeetingShards(index)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda shard: reader.read(shard, 0, 512), shards))
    assert found == [index.path(shard).read_bytes()[:512] for shard in shards]


def test_a_bounded_number_of_files_stays_open(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "open_files_limit", lambda: 4 * 14)
    reader = FolderShards(index)
    before = len(os.listdir("/proc/self/fd"))
    for shard in [*range(11), *range(11)]:
        assert reader.read(shard, 0, 512) == index.path(shard).read_bytes()[:512]
    assert len(os.listdir("/proc/self/fd")) == before + 4
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_fewer_files_stay_open_where_the_process_has_no_more_descriptors(index: ShardIndex) -> None:
    reader = FolderShards(index)
    before = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    expected = [index.path(shard).read_bytes()[:512] for shard in range(11)]
    lowest = min(set(range(1000)) - {int(number) for number in os.listdir("/proc/self/fd")})
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 6, limits[1]))
        found = [reader.read(shard, 0, 512) for shard in [*range(11), *range(11)]]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == 2 * expected
    assert len(os.listdir("/proc/self/fd")) <= before + 6
    reader.close()


def test_shuffling_more_shards_than_stay_open_is_noted_on_a_network_disk(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "open_files_limit", lambda: 4 * 18)
    assert note_on_open_files(index, None) is None  # a local disk
    monkeypatch.setattr(reader_module, "network_file_system", lambda path: "nfs4")
    note = note_on_open_files(index, None)
    assert note and note.startswith("11 shards") and "of which 8 stay open" in note
    assert "train.sampling.window=8 reads" in note  # of 4 shards
    assert note_on_open_files(index, 8) is None
    monkeypatch.setattr(reader_module, "open_files_limit", lambda: 4 * 21)
    assert note_on_open_files(index, None) is None
