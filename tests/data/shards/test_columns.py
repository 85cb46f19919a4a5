"""Processes of a node map the columns of a large set from one copy, which equals what each would read on its own."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulated_set import write_simulated_set
from tests.processes import HANG_SECONDS
from triderm_dist.config import RemoteConfig
from triderm_dist.data.folds import assign_folds
from triderm_dist.data.shards import columns, index
from triderm_dist.data.shards.columns import MappedColumns, ParquetColumns
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.open import open_index
from triderm_dist.schema import DataError

LESIONS = 300
ARRAYS = ("labels", "fine", "shard", "offsets", "sizes", "concept_scores", "metadata")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_simulated_set(tmp_path_factory.mktemp("packed") / "set", LESIONS, shard_samples=50)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Share the columns of any set, written in several batches, in this folder."""
    monkeypatch.setattr(index, "MAPPED_FROM", 1)
    monkeypatch.setattr(columns, "ROW_GROUP", 64)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "triderm-dist" / "columns"


def opened(folder: Path) -> ShardIndex:
    return open_index(str(folder), RemoteConfig())


def only(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def assert_same(mapped: ShardIndex, read: ShardIndex) -> None:
    assert isinstance(mapped.columns, MappedColumns) and isinstance(read.columns, ParquetColumns)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(mapped, name), getattr(read, name), strict=True)
    assert [*mapped.lesion_ids] == [*read.lesion_ids] and [*mapped.groups] == [*read.groups]
    np.testing.assert_array_equal(mapped.fold_groups, read.fold_groups, strict=True)
    rows = np.array([299, 0, 64, 63, 64])
    for one, other in zip(vars(mapped.inputs(rows)).values(), vars(read.inputs(rows)).values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_mapped_columns_equal_those_read(packed: Path, cache: Path) -> None:
    read = read_index(packed)
    assert_same(opened(packed), read)
    assert_same(opened(packed), read)  # of the files that the first call wrote
    names = [f"concept {number}" for number in reversed(range(len(read.concepts)))]
    assert_same(opened(packed).with_concepts(names), read.with_concepts(names))


def test_small_sets_write_nothing(packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MAPPED_FROM", LESIONS + 1)
    assert isinstance(opened(packed).columns, ParquetColumns) and not cache.exists()


def test_columns_are_written_once(packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processes that start at the same time, one writes, and the others wait for it."""
    written, threads = [], 4
    meet = threading.Barrier(threads, timeout=HANG_SECONDS)
    write = columns._write

    def counted(*arguments: object) -> None:
        written.append(arguments)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(columns, "_write", counted)

    def start(_: int) -> list[str]:
        meet.wait()
        return opened(packed).lesion_ids.tolist()

    with ThreadPoolExecutor(threads) as pool:
        assert len({tuple(ids) for ids in pool.map(start, range(threads))}) == 1
    assert len(written) == 1


def test_damaged_samples_are_refused_before_they_are_shared(cache: Path, tmp_path: Path) -> None:
    folder = write_simulated_set(tmp_path / "set", 20)
    flip(folder / "samples.parquet", 1000)
    with pytest.raises(DataError, match=r"samples\.parquet: checksum"):
        opened(folder)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["label.bin", "concepts.bin", "group.text.bin"])
def test_damaged_column_is_refused_when_it_is_used(packed: Path, cache: Path, name: str) -> None:
    uses: dict[str, Callable[[ShardIndex], object]] = {
        "label.bin": lambda found: found.labels,
        "concepts.bin": lambda found: found.concept_scores,
        "group.text.bin": lambda found: found.groups,
    }
    opened(packed)
    flip(only(cache) / name)
    found = opened(packed)
    for other, use in uses.items():
        if other != name:
            use(found)
    with pytest.raises(DataError, match=rf"{name}: changed or damaged; delete .*{only(cache).name}"):
        uses[name](found)


def test_columns_are_compared_once_while_a_process_uses_them(packed: Path, cache: Path) -> None:
    """A record counts for the same file only, and not once no process that made it is left."""
    users = [opened(packed)]
    label, (record,) = only(cache) / "label.bin", only(cache).glob("checked-*[!k]")
    assert users[0].labels.sum() == read_index(packed).labels.sum()
    users.append(opened(packed))
    time = label.stat()
    flip(label)
    os.utime(label, ns=(time.st_atime_ns, time.st_mtime_ns))
    with pytest.raises(DataError, match=r"label\.bin: changed or damaged"):
        users[1].labels  # noqa: B018
    fields = [label.stat().st_dev, label.stat().st_ino, *map(int, record.read_text().split()[2:4])]
    with record.open("a") as file:  # as if it had been damaged without being written to
        file.write(f"{' '.join(map(str, fields))} {label.stat().st_ctime_ns}\n")
    users.append(opened(packed))
    assert users[2].labels.sum() != read_index(packed).labels.sum()
    users.clear()
    gc.collect()
    with pytest.raises(DataError, match=r"label\.bin: changed or damaged"):
        opened(packed).labels  # noqa: B018


def test_damaged_list_of_columns_is_written_again(packed: Path, cache: Path) -> None:
    opened(packed)
    flip(only(cache) / "columns.json", 40)
    assert_same(opened(packed), read_index(packed))


def test_columns_of_other_sets_are_kept(packed: Path, cache: Path, tmp_path: Path) -> None:
    opened(packed)
    first = only(cache)
    opened(write_simulated_set(tmp_path / "other", 20))
    assert first in [*cache.iterdir()] and len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_columns_of_another_content_replace_the_earlier_ones(cache: Path, tmp_path: Path) -> None:
    """Those that are open stay readable."""
    folder = write_simulated_set(tmp_path / "set", 20)
    before, expected = opened(folder), read_index(folder).labels
    earlier = only(cache)
    folder.rename(tmp_path / "old")
    write_simulated_set(folder, 30)
    assert_same_labels = opened(folder).labels
    np.testing.assert_array_equal(assert_same_labels, read_index(folder).labels)
    assert only(cache) != earlier
    np.testing.assert_array_equal(before.labels, expected)


def test_without_a_writable_cache_every_process_reads(
    packed: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.write_text("a file")
    found = opened(packed)
    assert isinstance(found.columns, ParquetColumns)
    np.testing.assert_array_equal(found.labels, read_index(packed).labels)
    assert "so every process holds the columns of" in capsys.readouterr().out


def test_folds_are_assigned_once(packed: Path, cache: Path) -> None:
    read = read_index(packed)
    expected = assign_folds(read.labels, read.groups.tolist(), 5, 3)
    np.testing.assert_array_equal(read.folds(5, 3), expected)
    np.testing.assert_array_equal(opened(packed).folds(5, 3), expected)
    (stored,) = only(cache).glob("folds-*")
    label = only(cache) / "label.bin"
    flip(label)
    again = opened(packed)
    np.testing.assert_array_equal(again.folds(5, 3), expected)  # without labels
    with pytest.raises(DataError, match=r"label\.bin"):
        again.folds(4, 3)
    flip(label)
    flip(stored)
    np.testing.assert_array_equal(opened(packed).folds(5, 3), expected)


def test_ranks_share_the_search_for_shards(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four ranks, one looks for a shard: it refuses a set without it, before the others read."""
    folder = write_simulated_set(tmp_path / "set", LESIONS, shard_samples=50)
    (folder / "shard-000005.tar").unlink()
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        try:
            opened(folder)
        except DataError as error:
            refused.append((rank, "shard-000005.tar: missing" in str(error)))
    assert refused == [(1, True)]
