"""Tars behind a URL are indexed like those of a folder, also where the URL is not written to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.shards.faulty_server import Server, serve, short_body, unavailable
from tests.data.shards.test_index_foreign import grouped, scans, set_record, write_foreign
from triderm_dist.commands.index import IndexConfig, main
from triderm_dist.config import RemoteConfig
from triderm_dist.data.problems import InvalidLesions
from triderm_dist.data.shards.format import INDEX, SAMPLES
from triderm_dist.data.shards.index import read_photo_bytes
from triderm_dist.data.shards.index_foreign import index_shards, index_slice
from triderm_dist.data.shards.open import TARS, open_index
from triderm_dist.data.shards.reader import RemoteShards
from triderm_dist.runtime.redact import URLS
from triderm_dist.schema import VIEWS, ConfigError, DataError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with tars in a folder of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_foreign(tmp_path / "theirs", shard_lesions=2, change=grouped)
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serve(folder / "theirs") as server:
        yield server


def index_files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (INDEX, SAMPLES)]


def expected(folder: Path) -> list[bytes]:
    """Return the index of the same tars in a folder."""
    shutil.copytree(folder / "theirs", folder / "copy")
    index_shards(folder / "copy")
    return index_files(folder / "copy")


def test_index_is_that_of_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, url = expected(folder), (folder / "theirs").as_uri()
    scanned = scans(monkeypatch)
    assert index_slice(url, 2, 2) == []
    assert sorted(scanned) == ["part-001.tar", "part-003.tar"]
    index = index_shards(url)
    assert sorted(scanned) == [f"part-{number:03d}.tar" for number in range(4)]
    assert index_files(folder / "theirs") == files and index.remote
    assert not [*folder.glob("**/*.part")] and not [*folder.glob("**/fetch-*")]


def test_only_changed_tars_are_fetched_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = (folder / "theirs").as_uri()
    write_foreign(folder / "wrong", shard_lesions=2, change=set_record(5, label="unheard of"))
    shutil.copy(folder / "wrong" / "part-002.tar", folder / "theirs")
    scanned = scans(monkeypatch)
    with pytest.raises(DataError, match=rf"{url}: labels that name no diagnosis: 'unheard of'"):
        index_shards(url)
    write_foreign(folder / "right", shard_lesions=2, change=grouped)
    shutil.copy(folder / "right" / "part-002.tar", folder / "theirs")
    scanned.clear()
    assert len(index_shards(url)) == 8 and scanned == ["part-002.tar"]


def test_url_that_is_only_read_has_its_index_in_a_folder(folder: Path, server: Server) -> None:
    files, local = expected(folder), open_index(folder / "copy", RemoteConfig())
    size = lambda handler, data: handler.answer(data, len(data))  # noqa: E731
    server.faults = {"part-001.tar": [unavailable], "part-002.tar": [size, short_body, unavailable]}
    with pytest.raises(DataError, match=r"samples.parquet: refused \(.*\); run the same command with output=FOLDER"):
        index_shards(server.url)
    requests = server.requests["part-000.tar"]
    index = index_shards(server.url, output="ours")
    assert server.requests["part-000.tar"] == requests + 1  # for its size; it is not fetched again
    assert index_files(folder / "ours") == files and index.fingerprint == local.fingerprint
    assert (folder / "ours" / TARS).read_text() == f"{server.url}\n"
    opened = open_index("ours", RemoteConfig())
    shards = RemoteShards(opened)
    for row in range(8):
        for view, name in enumerate(VIEWS):
            offset, size = int(opened.offsets[row, view]), int(opened.sizes[row, view])
            assert shards.read(int(opened.shard[row]), offset, size) == read_photo_bytes(local, row, name)
    shards.close()
    assert index_shards(server.url, output="ours").fingerprint == index.fingerprint  # it may be made again


def test_output_is_no_other_folder(folder: Path, server: Server) -> None:
    with pytest.raises(DataError, match="theirs: exists and is not an index of tars behind a URL"):
        index_shards(server.url, output="theirs")
    with pytest.raises(DataError, match=rf"for another place give {(folder / 'theirs').as_uri()}"):
        index_shards("theirs", output="ours")
    with pytest.raises(DataError, match="not a local folder; leave out output="):
        index_shards(server.url, output="s3://bucket/theirs")
    assert not (folder / "ours").exists() and not [*folder.glob("*.part")]


def test_secrets_of_the_url_are_not_kept(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server.url}?token=hidden-token"
    monkeypatch.setenv(URLS, "")  # the program that indexes adds the URL
    index_shards(url, output="ours")
    assert "hidden" not in (folder / "ours" / TARS).read_text()
    monkeypatch.setenv(URLS, "")
    with pytest.raises(ConfigError, match=URLS):
        open_index("ours", RemoteConfig())
    monkeypatch.setenv(URLS, url)
    assert len(open_index("ours", RemoteConfig())) == 8


def test_folders_that_are_no_tars(folder: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/nothing: no such folder, or its server lists no files"):
        index_shards((folder / "nothing").as_uri())
    with pytest.raises(DataError, match=r"/elsewhere: no such folder, or its server lists no files"):
        index_shards(server.url.replace("/set", "/elsewhere"))
    (folder / "theirs" / "a b.tar").touch()
    with pytest.raises(DataError, match=r"theirs/a b.tar: the name of a shard has"):
        index_shards((folder / "theirs").as_uri())
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"/empty: no \*.tar in this folder"):
        index_shards((folder / "empty").as_uri())
    (folder / "empty" / INDEX).write_text('{"packed_with": {}}')
    with pytest.raises(DataError, match=r"/empty: written by triderm pack"):
        index_shards((folder / "empty").as_uri())


def test_command_takes_the_task_and_writes_the_problems_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = (folder / "theirs").as_uri()
    (folder / "theirs" / "task.yaml").write_text("name: [")
    with pytest.raises(ConfigError, match=rf"{url}/task.yaml: "):
        main(IndexConfig(folder=url))
    (folder / "theirs" / "task.yaml").unlink()
    write_foreign(folder / "wrong", shard_lesions=2, change=set_record(5, group="no\nid"))
    shutil.copy(folder / "wrong" / "part-002.tar", folder / "theirs")
    with pytest.raises(InvalidLesions):
        main(IndexConfig(folder=url))
    [table] = folder.glob("*.problems.csv")
    assert f"{url}/part-002.tar, sample L5" in table.read_text()
    main(IndexConfig(folder=url, invalid="drop"))
    assert "7 lesions" in capsys.readouterr().out
    assert [*folder.glob("*theirs.groups.csv")] and not [*folder.glob("*.part")]
