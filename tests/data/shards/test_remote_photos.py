"""Photos that a table names by URLs are packed like those of a folder."""

from __future__ import annotations

import csv
import socket
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.conftest import draw_photo
from tests.data.shards import faulty_server
from tests.data.shards.faulty_server import serve
from triderm_dist.config import RemoteConfig
from triderm_dist.data.photo_formats import is_photo_url, read_photo
from triderm_dist.data.problems import InvalidLesions
from triderm_dist.data.readers.lesions_csv import read_lesions
from triderm_dist.data.shards import remote
from triderm_dist.data.shards.format import ShardFile
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.open import open_index
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.remote import Store, read_url
from triderm_dist.schema import DataError, Task

TASK = {
    "name": "clinic",
    "diagnoses": [{"name": "MEL"}, {"name": "NV"}],
    "views": [{"name": "clinical"}],
    "columns": {"image": "photo", "lesion_id": "lesion", "diagnosis": "dx"},
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        draw_photo(number).save(folder / f"p{number}.jpg")
    return folder


def pack(tmp_path: Path, name: str, prefix: str, suffix: str = "", folder: str = "") -> ShardIndex:
    """Pack five lesions, whose table names each photo by PREFIX, its name and SUFFIX."""
    source = tmp_path / folder if folder else tmp_path / f"table {name}"
    source.mkdir(exist_ok=True)
    with (source / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lesion", "photo", "dx"])
        writer.writerows([f"L{number}", f"{prefix}p{number}.jpg{suffix}", "MEL"] for number in range(5))
    dataset = read_lesions(source, Task.from_mapping(TASK, "task.yaml"))
    assert not dataset.problems, dataset.problems
    return pack_shards(dataset, tmp_path / name, short_side=24, shard_samples=2)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_photos_behind_urls_are_packed_like_those_of_a_folder(photos: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(f"{photos}/", "/pictures/", recursive=True)
    expected = content(pack(tmp_path, "local", "", folder="photos").folder)
    assert content(pack(tmp_path, "memory", "memory://pictures/").folder) == expected
    with serve(photos) as server:
        server.faults["p3.jpg"] = [faulty_server.unavailable, faulty_server.reset]
        assert content(pack(tmp_path, "http", f"{server.url}/", "?token=hidden").folder) == expected
        assert server.requests["p3.jpg"] == 3


def test_missing_photo_behind_a_url_is_a_problem_of_its_lesion(photos: Path, tmp_path: Path) -> None:
    (photos / "p1.jpg").unlink()
    with serve(photos) as server:
        server.faults["p2.jpg"] = [faulty_server.forbidden]
        with pytest.raises(InvalidLesions) as error:
            pack(tmp_path, "out", f"{server.url}/", "?token=hidden")
    found = {problem.lesion_id: f"{problem.where}: {problem.what}" for problem in error.value.problems}
    assert found == {
        "L1": f"{server.url}/p1.jpg?***: no such file",
        "L2": f"{server.url}/p2.jpg?***: no permission to read it",
    }


def test_server_that_does_not_answer_ends_packing(photos: Path) -> None:
    """Its photos are not taken for missing ones."""
    remote = RemoteConfig(total_seconds=1)
    with serve(photos) as server:
        server.faults["p1.jpg"] = [faulty_server.unavailable] * 99
        with pytest.raises(DataError, match=r"p1.jpg\?\*\*\*: no success within 1 s and \d+ attempts, .*503"):
            read_url(f"{server.url}/p1.jpg?token=hidden", remote)
    with pytest.raises(DataError, match="Protocol not known: nosuch"):
        read_url("nosuch://x/p.jpg")


@pytest.mark.parametrize("url", ["dir:///x/p0.jpg", "zip:///x.zip", "reference://x", "simplecache:///x"])
def test_url_of_no_file_system_is_refused_at_once(url: str) -> None:
    with pytest.raises(DataError, match=f"{url}.*: no file system is made of such a URL"):
        read_url(url)
    with pytest.raises(DataError, match=f"{url}.*: no file system is made of such a URL"):
        open_index(url, RemoteConfig())


def test_host_without_an_address_is_refused_after_a_few_attempts(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that fails for now is asked again, and for long where the host was reached before."""
    failures, resolve = list[int](), socket.getaddrinfo

    def failing(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise socket.gaierror(failures.pop(), "no address")
        return resolve(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", failing)
    assert remote.HOST_ATTEMPTS.keys() == {socket.EAI_NONAME, socket.EAI_AGAIN}
    for number in remote.HOST_ATTEMPTS:
        monkeypatch.setitem(remote.HOST_ATTEMPTS, number, 2)
        failures += [number] * 2
        with pytest.raises(DataError, match=r"https://clinc.example/p.jpg: no such host; check the address"):
            read_url("https://clinc.example/p.jpg")
        failures += [number] * 2
        with pytest.raises(DataError, match=r"https://clinc.example/set/index.json: no such host; check the address"):
            Store("https://clinc.example/set", RemoteConfig()).fetch(ShardFile("index.json", 0, -1, ""), tmp_path / "i")
        assert not failures
    with serve(photos) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        for failed in (1, 3):
            fsspec.get_filesystem_class("http").clear_instance_cache()  # and the addresses in it
            failures += [socket.EAI_AGAIN] * failed
            assert read_url(f"{url}/p1.jpg") == (photos / "p1.jpg").read_bytes()
    assert not failures


def test_local_files_are_named_by_paths(photos: Path, tmp_path: Path) -> None:
    """A table of others must not name files outside of its folder."""
    for cell in (f"file://{photos}/p1.jpg", f"simplecache::file://{photos}/p1.jpg", "p1.jpg", "C:\\p1.jpg"):
        assert not is_photo_url(cell)
    with pytest.raises(OSError):
        read_photo(f"file://{photos}/p1.jpg")
    for url in ("s3://bucket/p1.jpg", "https://host/p1.jpg?x=1", "hf://datasets/a/b/p1.jpg"):
        assert is_photo_url(url)
