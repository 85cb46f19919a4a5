"""Shards are packed into a folder behind a URL: the bytes of a local folder, resumed, and by several machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from tests.conftest import Challenge
from tests.data.shards.faulty_server import serve
from triderm_dist.data.problems import InvalidLesions
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.pack import pack_shards, pack_slice
from triderm_dist.data.shards.publish import RemoteFolder, local_name
from triderm_dist.schema import DataError, Lesion


@pytest.fixture
def dataset(make_challenge: Callable[..., Challenge]) -> Dataset:
    return read_challenge(make_challenge().write().folder)


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield "memory://bucket/sets/train" if request.param == "memory" else f"{(tmp_path / 'bucket').as_uri()}/sets/train"
    fsspec.filesystem("memory").store.clear()


def write(dataset: Dataset, output: str | Path, **options: object) -> ShardIndex:
    return pack_shards(dataset, output, short_side=24, shard_samples=5, **options)


def published(url: str) -> dict[str, bytes]:
    """Return the content of the files behind a URL, by their paths in its folder."""
    files, folder = fsspec.core.url_to_fs(url)
    return {path[len(folder) + 1 :]: files.cat_file(path) for path in files.find(folder)}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_published_set_has_the_bytes_of_a_folder(dataset: Dataset, url: str, tmp_path: Path) -> None:
    expected = write(dataset, tmp_path / "local")
    index = write(dataset, url)
    assert published(url) == content(tmp_path / "local")
    assert index.fingerprint == expected.fingerprint and index.remote
    assert not list(tmp_path.glob("*.part")) and not local_name(url).exists()
    assert write(dataset, url).fingerprint == index.fingerprint  # it is there already
    with pytest.raises(DataError, match="was packed from other data, with other settings"):
        pack_shards(dataset, url, short_side=20, shard_samples=5)


def test_interrupted_packing_resumes_on_another_machine(
    dataset: Dataset, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(dataset, tmp_path / "local")

    def stop(done: int, total: int) -> None:
        if done == 11:  # in the third shard
            raise InterruptedError

    with pytest.raises(DataError):
        write(dataset, url, workers=1, progress=stop)
    part = tmp_path / f"{local_name(url)}.part"
    assert sorted(published(url)) == [f"rows.part/00000{n}.parquet" for n in (0, 1)] + [
        f"shard-00000{n}.tar" for n in (0, 1)
    ]
    assert not list(part.glob("shards/shard-00000[01].tar"))
    (tmp_path / "other machine").mkdir()
    monkeypatch.chdir(tmp_path / "other machine")
    uploaded: list[str] = []
    put = RemoteFolder.put
    monkeypatch.setattr(RemoteFolder, "put", lambda self, path, name: uploaded.append(name) or put(self, path, name))
    write(dataset, url)
    assert published(url) == content(tmp_path / "local")
    assert "shard-000001.tar" not in uploaded and uploaded[-1] == "index.json"


def test_slices_on_machines_without_a_file_system_in_common(
    dataset: Dataset, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(dataset, tmp_path / "local")
    for number in (1, 2):
        folder = tmp_path / f"machine {number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        if number == 2:
            with pytest.raises(DataError, match=r"shard-000001.tar: missing or damaged; run its slice again"):
                write(dataset, url, finish=True)
        pack_slice(dataset, url, number, 2, short_side=24, shard_samples=5)
    damaged = f"{url}/shard-000001.tar"
    files, location = fsspec.core.url_to_fs(damaged)
    whole = files.cat_file(location)
    files.pipe_file(location, whole[:-1])
    with pytest.raises(DataError, match=r"shard-000001.tar: missing or damaged"):
        write(dataset, url, finish=True)
    files.pipe_file(location, whole)
    write(dataset, url, finish=True)
    assert published(url) == content(tmp_path / "local")


def test_tasks_on_machines_without_a_file_system_in_common(
    dataset: Dataset, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(dataset, tmp_path / "local")
    done: list[int] = []

    def elsewhere(
        work: Callable[[int, list[Lesion]], object], shards: Iterable[tuple[int, list[Lesion]]]
    ) -> Iterator[int]:
        for number, lesions in shards:
            before = set(tmp_path.rglob("*.tar")) | set(tmp_path.rglob("*.parquet"))
            work(number, lesions)
            new = (set(tmp_path.rglob("*.tar")) | set(tmp_path.rglob("*.parquet"))) - before
            assert all((tmp_path / "bucket") in path.parents for path in new)  # nothing on the disk of the driver
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(number)
            yield number

    uploaded: list[str] = []
    put = RemoteFolder.put
    monkeypatch.setattr(RemoteFolder, "put", lambda self, path, name: uploaded.append(name) or put(self, path, name))
    with pytest.raises(KeyboardInterrupt):
        write(dataset, url, distribute=elsewhere)
    assert "shard-000002.tar" in uploaded and "shard-000003.tar" not in uploaded
    done = [-1] * 3
    uploaded.clear()
    write(dataset, url, distribute=elsewhere)
    assert published(url) == content(tmp_path / "local")
    assert "shard-000002.tar" not in uploaded and "shard-000003.tar" in uploaded


def test_refused_set_leaves_nothing(dataset: Dataset, url: str, tmp_path: Path) -> None:
    first = dataset.lesions[0]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photo")
    images = {view: str(broken) for view in first.images}
    with pytest.raises(InvalidLesions):
        write(replace(dataset, lesions=[replace(first, images=images), *dataset.lesions[1:]]), url)
    assert published(url) == {} and not list(tmp_path.glob("*.part"))


def test_url_that_is_not_written_to_is_refused(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with serve(tmp_path) as server, pytest.raises(DataError, match=r"shard-000000.tar: refused"):
        write(dataset, f"{server.url}/new")


def test_local_name_of_a_url_holds_no_secret() -> None:
    assert local_name("s3://bucket/sets/train") == Path("bucket-sets-train")
    assert local_name("https://me:password@host/a b/?token=hidden") == Path("host-a-b")
    assert local_name("runs/x") == Path("runs/x") and os.fspath(local_name(Path("/a/b"))) == "/a/b"
