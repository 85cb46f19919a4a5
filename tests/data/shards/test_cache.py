"""Shards behind a URL: recovery or a one-line error, never wrong bytes, and a bounded cache."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_challenge
from tests.data.shards import faulty_server as remote
from tests.data.shards.faulty_server import serve
from tests.fork_server import fork_python
from tests.processes import HANG_SECONDS, wait_for
from triderm_dist.checksums import write_checked_json
from triderm_dist.config import RemoteConfig
from triderm_dist.data.loader import Loader
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards import reader
from triderm_dist.data.shards.cache import Cache
from triderm_dist.data.shards.format import INDEX, SAMPLES, ShardFile
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.open import index_file, is_url, open_index
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.reader import RemoteShards
from triderm_dist.data.shards.remote import Store, address_of
from triderm_dist.schema import ConfigError, DataError

CPU, HALF = torch.device("cpu"), ((0.5,) * 3, (0.5,) * 3)


def shuffled(index: ShardIndex, window: int | None = None) -> EpochPlan:
    samples = Samples(np.arange(len(index)), index.labels, index.shard)
    return EpochPlan(samples, Sampling("shuffle", window=window), 0, 0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """33 lesions in 7 shards."""
    folder = tmp_path_factory.mktemp("remote")
    dataset = read_challenge(write_challenge(folder / "challenge", lesions=33).folder)
    return pack_shards(dataset, folder / "shards", short_side=None, shard_samples=5).folder


@pytest.fixture
def server(packed):
    with serve(packed) as running:
        yield running


def settings(tmp_path: Path, **changes) -> RemoteConfig:
    return RemoteConfig(**{"cache": str(tmp_path / "cache"), **changes})


def with_limits(index: ShardIndex, **changes) -> ShardIndex:
    """Return the open index with changed settings for later fetches."""
    assert index.remote is not None
    store = index.remote.store
    store.remote = store.remote.model_copy(update=changes)
    return index


def rows_read(index: ShardIndex, window: int | None = None, batch: int = 6) -> list[list[int]]:
    """Return the rows of each global batch, read through the loader."""
    plan = shuffled(index, window)
    source = PhotoSource(index, 36, *HALF)
    steps = list(Loader(index, source, plan.batches(0, 1, batch), micro_batch=3, device=CPU))
    source.close()
    return [step.rows[: step.count].tolist() for step in steps]


def cached(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.tar"))


def test_remote_reads_equal_local_reads(server, packed, tmp_path):
    local, via_url = read_index(packed), open_index(server.url, settings(tmp_path))
    assert via_url.fingerprint == local.fingerprint
    assert rows_read(via_url) == rows_read(local)
    sources = [PhotoSource(index, 36, *HALF) for index in (local, via_url)]
    for row in range(len(local)):
        location = (int(local.shard[row]), int(local.offsets[row, 0]), int(local.sizes[row, 0]))
        assert sources[0].shards.read(*location) == sources[1].shards.read(*location)
    assert server.requests["shard-000000.tar"] == 1  # by the epoch above
    assert not list((tmp_path / "cache").glob("*/*.fetch*"))
    # A second run fetches index.json only.
    rows_read(open_index(server.url, settings(tmp_path)))
    assert server.requests["shard-000000.tar"] == 1 and server.requests[INDEX] == 2


def test_first_step_does_not_wait_for_the_last_shard(server, tmp_path):
    limits = {"total_seconds": 120, "stall_seconds": 120}  # fails if the first step waits for the last shard
    index = open_index(server.url, settings(tmp_path, downloads=1, **limits))
    last = index.shards[-1].url
    gate = threading.Event()
    server.faults[last] = [lambda handler, data: (gate.wait(HANG_SECONDS), handler.answer(data, len(data)))]
    plan = EpochPlan(Samples(np.arange(len(index)), index.labels, index.shard), Sampling("sequential"), 0, 0)
    source, batches = PhotoSource(index, 36, *HALF), plan.batches(0, 1, 3)
    steps = iter(Loader(index, source, batches, micro_batch=3, device=CPU, prefetch=1))
    assert next(steps).rows.tolist() == [0, 1, 2]
    gate.set()
    assert sum(step.count for step in steps) == len(index) - 3


@pytest.mark.parametrize("fault", remote.FAULTS, ids=lambda fault: fault.__name__)
def test_transient_fault_is_retried(server, packed, tmp_path, fault):
    for name in (INDEX, SAMPLES, "shard-000002.tar"):
        # index.json has no checksum: test_invalid_remote_index_is_refused covers wrong content.
        server.faults[name] = [] if name == INDEX and fault.__name__ in UNDETECTED_IN_INDEX else [fault]
    stalls = fault in (remote.stall, remote.silence)
    index = open_index(server.url, settings(tmp_path, **{"stall_seconds": 1} if stalls else {}))
    assert rows_read(index) == rows_read(read_index(packed))
    # On a busy machine a slow response may count as a stall.
    assert server.requests["shard-000002.tar"] == 2 or stalls


UNDETECTED_IN_INDEX = ("wrong_bytes", "short_body", "long_body", "login_page")


@pytest.mark.parametrize("fault", remote.FAULTS, ids=lambda fault: fault.__name__)
def test_permanent_fault_is_a_one_line_error_within_the_timeout(server, tmp_path, fault):
    """A fault that stalls lasts until the server is closed, which is after the error."""
    index = with_limits(open_index(server.url, settings(tmp_path)), total_seconds=0.4, stall_seconds=0.2)
    server.faults["shard-000003.tar"] = [fault] * 100
    message = r"shard-000003.tar: not fetched within 0.4 s and \d+ attempts, the last error: "
    with pytest.raises(DataError, match=message):
        index.remote.open(index.shards[3])
    assert not list((tmp_path / "cache").glob("*/*.fetch*"))


def test_slow_download_ends_at_the_timeout(server, tmp_path):
    index = with_limits(open_index(server.url, settings(tmp_path)), total_seconds=0.4)
    server.faults["shard-000003.tar"] = [remote.endless] * 9
    with pytest.raises(DataError, match=r"not fetched within 0.4 s and 1 attempts, the last error: .* too slow"):
        index.remote.open(index.shards[3])


@pytest.mark.parametrize("fault", [remote.login_page, remote.short_body], ids=lambda f: f.__name__)
def test_invalid_remote_index_is_refused(server, tmp_path, fault):
    server.faults[INDEX] = [fault]
    with pytest.raises(DataError):
        open_index(server.url, settings(tmp_path))


def test_permanent_errors_are_not_retried(server, tmp_path):
    index = open_index(server.url, settings(tmp_path))
    server.faults["shard-000004.tar"] = [remote.forbidden] * 9
    with pytest.raises(DataError, match=r"shard-000004.tar: no permission \(.*403"):
        rows_read(index)
    assert server.requests["shard-000004.tar"] == 1
    with pytest.raises(DataError, match=r"index.json: no such file"):
        open_index((tmp_path / "nothing").as_uri(), settings(tmp_path))


def test_reads_after_a_failed_pass_fetch_nothing(server, tmp_path):
    """Threads that decode continue for a moment, and must not wait for a server that has failed."""
    index = open_index(server.url, settings(tmp_path, downloads=1))
    shards, order = RemoteShards(index), index.shard.astype(np.int64)
    server.faults[index.shards[4].url] = [remote.forbidden] * 9
    with pytest.raises(DataError, match="no permission"), shards.read_ahead(order, 5):
        shards.read(4, 0, 512)
    for shard in (4, 6):
        with pytest.raises(DataError, match="no permission"):
            shards.read(shard, 0, 512)
    assert server.requests[index.shards[4].url] == 1 and server.requests[index.shards[6].url] == 0
    with shards.read_ahead(order[order != 4], 5):
        assert len(shards.read(6, 0, 512)) == 512


def test_missing_shard_is_a_one_line_error(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "set")
    with serve(tmp_path / "set") as running:
        index = open_index(running.url, settings(tmp_path))
        (tmp_path / "set" / "shard-000005.tar").unlink()
        with pytest.raises(DataError, match=r"shard-000005.tar: no such file"):
            rows_read(index)


def test_unreachable_server_is_named(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/set"
    with pytest.raises(DataError, match=rf"{url}/index.json: not fetched within 0.2 s"):
        open_index(url, settings(tmp_path, total_seconds=0.2))


# --- size limit -----------------------------------------------------------------------------------------------------


def test_cache_stays_below_its_limit_and_fetches_each_shard_once(server, packed, tmp_path):
    local = read_index(packed)
    size = max(shard.bytes for shard in local.shards)
    root = tmp_path / "cache"
    index = open_index(server.url, settings(tmp_path, cache_gb=5.5 * size / 1e9))
    most = 0
    stop = threading.Event()

    def scan() -> dict[Path, int]:
        sizes = {}
        for path in root.glob("*/*.tar*"):
            with contextlib.suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
        return sizes

    def look() -> None:
        nonlocal most
        # Files seen by two scans were there at the same time; one scan could count a file that is gone by its end.
        first, second = scan(), scan()
        most = max(most, sum(min(first[path], second[path]) for path in first.keys() & second.keys()))

    def watch() -> None:
        while not stop.wait(0.001):
            look()
        look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        got = rows_read(index, window=5, batch=2)
    finally:
        stop.set()
        watcher.join()
    assert got == rows_read(local, window=5, batch=2)
    assert 2 * size < most <= 5.5 * size
    assert {server.requests[shard.url] for shard in index.shards} == {1}


def test_sampling_order_that_exceeds_the_cache_is_refused(server, packed, tmp_path):
    size = max(shard.bytes for shard in read_index(packed).shards)
    index = open_index(server.url, settings(tmp_path, cache_gb=3 * size / 1e9))
    with pytest.raises(ConfigError, match=r"cache_gb=.* at a time; raise it, or lower train.sampling.window"):
        rows_read(index)


def test_order_is_refused_that_needs_more_shards_while_ranks_are_two_steps_apart(server, packed, tmp_path):
    """In step 2 another rank may still read the first shard, of step 0, and the last one is read: with the second one
    three of equal size, all of them in the cache.
    """
    size = sum(shard.bytes for shard in read_index(packed).shards[:3])
    order = np.array([0, 1, 1, 1, 1, 1, 1, 1, 2])
    small = RemoteShards(open_index(server.url, settings(tmp_path, cache_gb=(size - 1) / 1e9)))
    with pytest.raises(ConfigError, match=r"cache_gb=.* at a time"), small.read_ahead(order, 3):
        pass
    large = RemoteShards(open_index(server.url, settings(tmp_path, cache_gb=size / 1e9)))
    with large.read_ahead(order, 3) as mark_read:
        for step, shards in enumerate(order.reshape(3, 3).tolist()):
            assert [len(large.read(shard, 0, 512)) for shard in shards] == [512] * 3
            mark_read(step + 1)


def test_truncated_file_of_the_cache_is_fetched_again(server, packed, tmp_path):
    """As after a power cut, or on a disk that lost blocks."""
    index = open_index(server.url, settings(tmp_path))
    for _ in range(2):
        assert RemoteShards(index).read(0, 512, 512) == (packed / index.shards[0].url).read_bytes()[512:1024]
        os.truncate(index.path(0), 600)
    assert server.requests[index.shards[0].url] == 2


def test_shard_that_was_used_after_the_listing_is_not_evicted(server, packed, tmp_path):
    """A process goes by its list of the cache until that is used up."""
    size = read_index(packed).shards[0].bytes
    index = open_index(server.url, settings(tmp_path, cache_gb=3.2 * size / 1e9))
    shards = RemoteShards(index)
    for shard in (0, 1, 2):
        shards.read(shard, 0, 512)
        os.utime(index.path(shard), (shard, shard))
    for shard in (3, 1, 4):  # lists the cache and evicts 0; uses 1; evicts 2
        shards.read(shard, 0, 512)
    assert cached(tmp_path / "cache") == [index.path(shard) for shard in (1, 3, 4)]


def test_body_that_is_too_long_is_not_read_to_its_end(server, tmp_path):
    index = with_limits(open_index(server.url, settings(tmp_path)), total_seconds=0.4)
    server.faults["shard-000003.tar"] = [remote.long_body] * 100
    with pytest.raises(DataError, match=f"the last error: .*more than the {index.shards[3].bytes} bytes of {INDEX}"):
        index.remote.open(index.shards[3])


def test_shard_larger_than_the_cache_is_refused(server, tmp_path):
    with pytest.raises(DataError, match=r"do not fit into the cache of 1e-05 GB; raise data.remote.cache_gb"):
        RemoteShards(open_index(server.url, settings(tmp_path, cache_gb=1e-5))).read(0, 0, 1)


def test_least_recently_used_closed_shards_are_evicted_first(server, packed, tmp_path):
    local = read_index(packed)
    files, size = local.shards, max(shard.bytes for shard in local.shards)
    how = settings(tmp_path, cache_gb=3.2 * size / 1e9)
    path = index_file(server.url, how)
    cache = Cache(path.parents[1], path.parent, Store(server.url, how))
    hasty = Cache(path.parents[1], path.parent, Store(server.url, how.model_copy(update={"total_seconds": 0.2})))
    first = cache.open(files[0])
    for number in (1, 2):
        cache.open(files[number]).close()
        os.utime(path.parent / files[number].url, (number, number))
    cache.open(files[3]).close()
    assert [file.name for file in cached(path.parents[1])] == [files[i].url for i in (0, 2, 3)]
    still_open = [first, cache.open(files[2]), cache.open(files[3])]
    with pytest.raises(DataError, match="in use by shards that are being read"):
        hasty.open(files[4])
    still_open.pop().close()
    cache.open(files[4]).close()
    assert [file.name for file in cached(path.parents[1])] == [files[i].url for i in (0, 2, 4)]


def test_a_fetch_lists_no_folder(server, tmp_path, monkeypatch):
    """Folders are listed once by each process, however many shards it fetches."""
    index = open_index(server.url, settings(tmp_path))
    cache = open_index(server.url, settings(tmp_path)).remote
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    for shard in index.shards:
        cache.open(shard).close()
    # Path.iterdir, by which the first fetch lists the cache, calls os.scandir since Python 3.14.
    assert [Path(folder) for folder in listed if Path(folder) != tmp_path / "cache"] == [index.folder]
    assert len(listed) == len(set(map(Path, listed)))
    used = int((tmp_path / "cache" / "cache.lock").read_text())
    assert used == sum(shard.bytes for shard in index.shards)


def test_bytes_that_a_killed_process_reserved_are_found_again(server, tmp_path):
    """The number in cache.lock is too large then, or missing in a cache of an earlier version."""
    index = open_index(server.url, settings(tmp_path))
    size = max(shard.bytes for shard in index.shards)
    counter = tmp_path / "cache" / "cache.lock"
    for text in (f"{9 * size:020d}", "", "x"):
        for path in cached(tmp_path / "cache"):
            path.unlink()
        cache = open_index(server.url, settings(tmp_path, cache_gb=8 * size / 1e9)).remote
        for number, shard in enumerate(index.shards):
            cache.open(shard).close()
            if number == 1:
                counter.write_text(text)
        assert int(counter.read_text()) == sum(shard.bytes for shard in index.shards)
        assert len(cached(tmp_path / "cache")) == len(index.shards)
    index.remote.store.remote = index.remote.store.remote.model_copy(update={"total_seconds": 0.2})
    cached(tmp_path / "cache")[0].unlink()
    before = int(counter.read_text())
    server.faults[index.shards[0].url] = [remote.unavailable] * 9
    with pytest.raises(DataError):
        index.remote.open(index.shards[0])
    assert int(counter.read_text()) == before  # what it had reserved is free again


def test_changed_set_at_the_same_url_is_cached_separately(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "set")
    with serve(tmp_path / "set") as running:
        a = open_index(running.url, settings(tmp_path))
        raw = json.loads((tmp_path / "set" / INDEX).read_text())
        write_checked_json(tmp_path / "set" / INDEX, {**raw, "note": "packed again"})
        b = open_index(running.url, settings(tmp_path))
    assert a.folder != b.folder and a.fingerprint != b.fingerprint


# --- processes of one node -------------------------------------------------------------------------------------------


FETCH_ONE = """
import sys
from triderm_dist.config import RemoteConfig
from triderm_dist.data.shards.cache import Cache
from triderm_dist.data.shards.index import read_index
from triderm_dist.data.shards.open import index_file
from triderm_dist.data.shards.remote import Store
how = RemoteConfig(cache=sys.argv[2], stall_seconds=600)
path = index_file(sys.argv[1], how)
Cache(path.parents[1], path.parent, Store(sys.argv[1], how)).open(read_index(path.parent, tars=slice(0)).shards[1])
"""


def test_process_killed_while_fetching_does_not_block_others(server, packed, tmp_path):
    open_index(server.url, settings(tmp_path))
    name = read_index(packed).shards[1].url
    server.faults[name] = [remote.stall]
    root = tmp_path / "cache"
    with subprocess.Popen([fork_python(), "-c", FETCH_ONE, server.url, str(root)]) as process:
        wait_for(lambda: list(root.glob(f"*/{name}.*.fetch.1")), process)
        process.kill()
    assert list(root.glob(f"*/{name}.*.fetch"))
    rows_read(open_index(server.url, settings(tmp_path, total_seconds=60)))  # fails if it waits for the killed process
    assert not list(root.glob("*/*.fetch*"))


class CountingStore(Store):
    """Lists the files that it has fetched."""

    def __init__(self, url: str, remote: RemoteConfig) -> None:
        super().__init__(url, remote)
        self.fetched: list[str] = []

    def fetch(self, file: ShardFile, path: Path, stop: threading.Event | None = None) -> None:
        super().fetch(file, path, stop)
        self.fetched.append(file.url)


@pytest.mark.parametrize("stalled", [None, 4])
def test_one_process_of_a_node_fetches_for_all(server, packed, tmp_path, monkeypatch, stalled):
    """The others open its files. Where it ends before it has fetched all, another one takes over."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    limits = settings(tmp_path, stall_seconds=HANG_SECONDS, total_seconds=HANG_SECONDS, downloads=2)
    index = open_index(server.url, limits)
    folder, stores = index.folder, [CountingStore(server.url, limits) for _ in range(2)]
    first, second = (RemoteShards(replace(index, remote=Cache(folder.parent, folder, store))) for store in stores)
    if stalled:
        server.faults[index.shards[stalled].url] = [remote.stall]
    order = index.shard.astype(np.int64)
    with contextlib.ExitStack() as until_taken_over:
        until_taken_over.enter_context(first.read_ahead(order, 5))
        first.read(0, 0, 512)
        with second.read_ahead(order, 5):
            for shard in range(7):
                if shard == stalled:
                    wait_for(lambda: stores[0].fetched[-1] == index.shards[-1].url)
                    until_taken_over.close()
                assert second.read(shard, 0, 512) == (packed / index.shards[shard].url).read_bytes()[:512]
    assert stores[1].fetched == ([index.shards[stalled].url] if stalled else [])
    assert not list(folder.glob("fill-*"))


def test_more_shards_than_may_be_open_are_opened_again(server, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "open_files_limit", lambda: 4 * 13)
    index = open_index(server.url, settings(tmp_path))
    shards, order = RemoteShards(index), np.tile(index.shard.astype(np.int64), 2)
    with shards.read_ahead(order, 5):
        for shard in [*range(7), *range(7)]:
            assert shards.read(shard, 0, 512) == (packed / index.shards[shard].url).read_bytes()[:512]
        wait_for(lambda: open_tars(index.folder) <= 3)  # a thread that fetched one may not have let it go yet
    assert {server.requests[shard.url] for shard in index.shards} == {1}


def open_tars(folder: Path) -> int:
    """Return the number of files of a cached set that this process has open."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(link.startswith(str(folder)) and link.endswith(".tar") for link in links)


# --- the disk --------------------------------------------------------------------------------------------------------


def test_full_disk_is_a_one_line_error(server, tmp_path):
    """A limit on the file size simulates a full disk: the same write fails."""
    index = open_index(server.url, settings(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (index.shards[0].bytes // 2, before[1]))
        with pytest.raises(DataError, match=r"the disk is full .*; free some space, or set data.remote.cache"):
            RemoteShards(index).read(0, 0, 1)
        assert server.requests[index.shards[0].url] == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert not list((tmp_path / "cache").glob("*/*.fetch*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_small_disk_evicts_shards_then_reports_that_it_is_full(server, packed, tmp_path):
    size = max(shard.bytes for shard in read_index(packed).shards)
    disk = tmp_path / "disk"
    disk.mkdir()
    about = sum((packed / name).stat().st_size for name in (INDEX, SAMPLES))
    space = about + 4 * size + 40_000
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={space}", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not permitted")
    try:
        index = open_index(server.url, settings(tmp_path, cache=str(disk)))
        for number in range(7):  # in sequence they fit, since closed shards are evicted
            index.remote.open(index.shards[number]).close()
        still_open = []
        with pytest.raises(DataError, match="the disk is full"):
            for number in range(7):
                still_open.append(index.remote.open(index.shards[number]))
        assert 3 <= len(still_open) <= 5
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_unwritable_cache_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache: .*; set data.remote.cache to a writable folder"):
        open_index(server.url, settings(tmp_path, cache=str(tmp_path / "file" / "cache")))


def test_too_few_file_descriptors_are_named(server, tmp_path):
    index = open_index(server.url, settings(tmp_path))
    index.remote.open(index.shards[0]).close()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest descriptor that is free
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        with pytest.raises(DataError, match=rf"{index.shards[0].url}: Too many open files; raise ulimit -n$"):
            index.remote.open(index.shards[0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_cache_in_a_folder_with_other_files_leaves_them_alone(server, tmp_path):
    """Not even an eviction removes a file that is not of a cache."""
    root = tmp_path / "disk"
    for name in ("photos/a.tar", "0123456789abcdef/a.tar", "photos/a.tar.7.fetch", "photos/b.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(50_000))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    index = open_index(server.url, settings(tmp_path, cache=str(root)))
    cache = with_limits(index).remote
    cache.limit = index.shards[0].bytes + index.shards[1].bytes
    for shard in index.shards:
        cache.open(shard).close()
    assert 1 <= len([path for path in cached(root) if path not in before]) <= 2
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="of POSIX")
def test_cache_in_a_folder_of_everybody_is_a_folder_of_the_user(server, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(0o1777)
    remote = settings(tmp_path, cache=str(tmp_path / "scratch"))
    folder = open_index(server.url, remote).folder
    assert folder.parent == tmp_path / "scratch" / f"triderm-{os.getuid()}"
    assert folder.parent.stat().st_mode & 0o777 == 0o700 and folder.stat().st_mode & 0o007 == 0
    shutil.rmtree(folder.parent)
    (tmp_path / "elsewhere").mkdir()
    folder.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"belongs to another user; set data.remote.cache to a folder that only you"):
        open_index(server.url, remote)


# --- addresses -------------------------------------------------------------------------------------------------------


def test_urls_are_told_from_paths():
    urls = ("s3://b", "gs://b", "hf://datasets/a/b", "https://h/x", "memory://x", "simplecache::s3://b", "pipe:cat {}")
    for url in urls:
        assert is_url(url), url
    for folder in ("runs/x", "/a/b", "C:\\shards", "a:b", Path("x")):
        assert not is_url(folder), folder


def test_pipe_commands_are_refused_unless_allowed(packed, tmp_path, monkeypatch):
    url = f"pipe:sh -c 'touch {tmp_path}/ran; cat {packed}/{{}}'"
    with pytest.raises(ConfigError, match=r"runs a command; set data.remote.allow_commands=true if you trust it"):
        open_index(url, settings(tmp_path))
    assert not (tmp_path / "ran").exists()
    index = open_index(url, settings(tmp_path, allow_commands=True))
    assert (tmp_path / "ran").exists() and rows_read(index) == rows_read(read_index(packed))
    with pytest.raises(DataError, match=r"TimeoutError"):
        open_index(
            f"pipe:sh -c 'sleep {HANG_SECONDS}' {{}}", settings(tmp_path, allow_commands=True, total_seconds=0.2)
        )
    monkeypatch.setattr(
        "triderm_dist.data.shards.remote.pause_before", lambda attempt: HANG_SECONDS
    )  # the only attempt
    with pytest.raises(DataError, match=r"not fetched within \d+ s and 1 attempts, .*the command ended with status 7"):
        open_index("pipe:sh -c 'exit 7' {}", settings(tmp_path, allow_commands=True))


@pytest.mark.parametrize("mark", ["| zstd -d", "> out", "; id", "&& id", "$HOME", "`id`", "*.tar", '"$HOME"', "# x"])
def test_command_written_for_a_shell_is_refused(tmp_path, mark):
    with pytest.raises(ConfigError, match=r"no shell reads the command, and . is for one; quote it, or"):
        Store(f"pipe:cat {{}} {mark}", settings(tmp_path, allow_commands=True))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat x", "write {} where the file name belongs"),
        ("{} x", "can't be the program"),
        ("cat '{}", "not a command"),
    ],
)
def test_command_without_a_place_for_the_name_is_refused(tmp_path, command, message):
    with pytest.raises(ConfigError, match=message):
        Store(f"pipe:{command}", settings(tmp_path, allow_commands=True))


def test_missing_program_of_a_command_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no-such-program: No such file or directory; give a program of the PATH"):
        open_index("pipe:no-such-program {}", settings(tmp_path, allow_commands=True))


NAMES = [
    "x$(touch ran).tar",
    "x;touch ran",
    "`touch ran`",
    "a b.tar",
    "-n.tar",
    "--output=ran",
    "a\nb",
    "ä.tar",
    "a%2fb",
    "x" * 300,
]


@pytest.mark.parametrize("name", NAMES)
def test_file_name_of_an_index_reaches_no_shell(packed, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(packed, tmp_path / "set")
    raw = json.loads((tmp_path / "set" / INDEX).read_text())
    raw["shards"][0]["url"] = name
    write_checked_json(tmp_path / "set" / INDEX, raw)
    for url in ((tmp_path / "set").as_uri(), f"pipe:cat {tmp_path}/set/{{}}", f"pipe:sh -c 'cat {tmp_path}/set/{{}}'"):
        with pytest.raises(DataError, match=r"name|lists a file"):
            rows_read(open_index(url, settings(tmp_path, allow_commands=True)))
    assert not (tmp_path / "ran").exists()


def test_index_with_an_outside_path_or_a_command_is_refused(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "set")
    raw = json.loads((tmp_path / "set" / INDEX).read_text())
    for number, name in enumerate(["../../outside.tar", "pipe:touch x", "/etc/passwd"]):
        raw["shards"][0]["url"] = name
        write_checked_json(tmp_path / "set" / INDEX, raw)
        with pytest.raises(DataError, match="is not a file name"):
            open_index((tmp_path / "set").as_uri(), settings(tmp_path / str(number)))


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_file_systems(packed, tmp_path, scheme):
    url = packed.as_uri()
    if scheme == "memory":
        import fsspec

        url = "memory://set"
        fsspec.filesystem("memory").put(str(packed) + "/", "/set/", recursive=True)
    assert rows_read(open_index(url, settings(tmp_path))) == rows_read(read_index(packed))


def test_unknown_url_scheme_and_missing_package_are_named(tmp_path):
    with pytest.raises(DataError, match="Protocol not known: nosuch"):
        open_index("nosuch://x/y", settings(tmp_path))


def test_url_query_is_kept_last_and_hidden_in_messages():
    store = Store("https://user:secret@host/set?token=hidden", RemoteConfig())
    assert address_of(store.url, "a.tar") == "https://user:secret@host/set/a.tar?token=hidden"
    assert store.shown("a.tar") == "https://host/set/a.tar"


def test_shards_are_read_from_s3(packed, tmp_path, monkeypatch):
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs")
    import fsspec

    running = moto.ThreadedMotoServer("127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    try:
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(key, value)
        bucket = fsspec.filesystem("s3")
        bucket.mkdir("lesions")
        bucket.put(str(packed) + "/", "lesions/train/", recursive=True)
        assert rows_read(open_index("s3://lesions/train", settings(tmp_path))) == rows_read(read_index(packed))
        with pytest.raises(DataError, match=r"s3://lesions/test/index.json: no such file"):
            open_index("s3://lesions/test", settings(tmp_path))
    finally:
        running.stop()
