"""Joined and selected sets hold the same lesions as a set packed of the same photos."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Challenge
from tests.data.shards.faulty_server import serve
from tests.data.shards.test_index_foreign import write_foreign
from triderm_dist.commands.join import JoinConfig, main
from triderm_dist.data.loader import Loader
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.select import select_rows
from triderm_dist.data.shards import join
from triderm_dist.data.shards.index import ShardIndex, read_index, read_photo_bytes
from triderm_dist.data.shards.index_foreign import index_shards
from triderm_dist.data.shards.join import join_sets
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.verify import verify
from triderm_dist.files import LOCK_SECONDS, exclusive_lock
from triderm_dist.schema import VIEWS, Busy, ConfigError, DataError, FineLabels


@pytest.fixture
def dataset(make_challenge: Callable[..., Challenge]) -> Dataset:
    return read_challenge(make_challenge().write().folder)


def pack(dataset: Dataset, output: Path, part: slice = slice(None)) -> ShardIndex:
    part_of_set = replace(dataset, lesions=dataset.lesions[part])
    return pack_shards(part_of_set, output, short_side=24, shard_samples=5)


def everything(index: ShardIndex) -> np.ndarray:
    return np.ones(len(index), bool)


def content(index: ShardIndex) -> dict[str, tuple[object, ...]]:
    """Return all that is known of each lesion, by its id."""
    inputs = index.inputs(np.arange(len(index)))
    photos = [[read_photo_bytes(index, row, view) for view in VIEWS] for row in range(len(index))]
    columns = (index.groups.tolist(), inputs.labels.tolist(), photos)
    numbers = [np.nan_to_num(each, nan=-1).tolist() for each in (inputs.concepts, inputs.metadata)]
    return dict(zip(inputs.lesion_ids, zip(*columns, *numbers, strict=True), strict=True))


@pytest.mark.parametrize("probe", [4096, 640, 64], ids=["whole photos", "headers", "parts of headers"])
def test_two_sets_are_joined_as_if_packed_together(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: int
) -> None:
    monkeypatch.setattr(join, "PROBE", probe)
    together = pack(dataset, tmp_path / "together")
    halves = [pack(dataset, tmp_path / "a", slice(0, 9)), pack(dataset, tmp_path / "b", slice(9, None))]
    joined = join_sets(halves, [everything(half) for half in halves], tmp_path / "joined")
    assert content(joined) == content(together)
    assert joined.photo_sizes == together.photo_sizes and joined.short_side == 24
    assert verify(joined, 2, 0) == []
    assert joined.path(0).samefile(halves[0].path(0))


@pytest.mark.parametrize("probe", [4096, 64])
def test_photos_in_common_are_found(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: int
) -> None:
    monkeypatch.setattr(join, "PROBE", probe)
    first = dataset.lesions[0]
    copies = replace(dataset, lesions=[replace(first, lesion_id="copy", group="other"), *dataset.lesions[1:6]])
    sets = [pack(dataset, tmp_path / "a", slice(0, 1)), pack(copies, tmp_path / "b")]
    joined = join_sets(sets, [everything(each) for each in sets], tmp_path / "joined")
    assert joined.shared_photos == ((first.lesion_id, "copy"),)


def test_a_selection_lists_its_lesions_only(dataset: Dataset, tmp_path: Path) -> None:
    index = pack(dataset, tmp_path / "all")
    condition = f"diagnosis != '{index.diagnoses[int(index.labels[0])]}'"
    keep = select_rows(index, condition)
    part = join_sets([index], [keep], tmp_path / "part", condition)
    expected = {name: known for name, known in content(index).items() if name in index.lesion_ids[keep]}
    assert content(part) == expected and 0 < len(part) < len(index)
    assert read_index(tmp_path / "part").selected == condition
    assert verify(part, 2, 0) == []
    again = join_sets([part], [everything(part)], tmp_path / "again")
    assert again.selected == condition and verify(again, 2, 0) == []


def test_sets_that_do_not_fit_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    index = pack(dataset, tmp_path / "all")
    salted = replace(index, group_salt="other")
    task = replace(index, task=replace(index.task, name="other"))
    cases = [
        ([index, index], [everything(index)] * 2, "is in .* and .*; leave it out of one"),
        ([index], [~everything(index)], "no lesion is kept"),
        ([index, salted], [everything(index)] * 2, "hashed with other salts"),
        ([index, task], [everything(index)] * 2, "cannot be joined: the task"),
    ]
    for sets, keep, message in cases:
        with pytest.raises(DataError, match=message):
            join_sets(sets, keep, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(DataError, match="exists"):
        join_sets([index], [everything(index)], tmp_path / "all")


def test_photos_that_begin_alike_are_told_apart(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first bytes and their number are equal, and only the last pixels differ."""
    monkeypatch.setattr(join, "PROBE", 640)
    first, second, *_ = dataset.lesions
    views = zip(first.images.values(), second.images.values(), strict=True)
    for one, (mine, other) in enumerate(views):
        pixels = np.zeros((200, 200, 3), np.uint8)
        for path, value in ((mine, 200), (other, 208)):
            pixels[-16:, -16:] = value + one
            Image.fromarray(pixels).save(path, "JPEG")
    halves = []
    for name, lesion in (("a", first), ("b", second)):
        alone = replace(dataset, lesions=[lesion])
        halves.append(pack_shards(alone, tmp_path / name, short_side=None))
    photos = [read_photo_bytes(half, 0, VIEWS[0]) for half in halves]
    assert len(photos[0]) == len(photos[1]) and photos[0][:640] == photos[1][:640] and photos[0] != photos[1]
    joined = join_sets(halves, [everything(half) for half in halves], tmp_path / "joined")
    assert joined.shared_photos == () and joined.photo_sizes == {(200, 200): 4}


def test_part_of_a_set_with_one_photo_size_is_taken_without_its_photos(dataset: Dataset, tmp_path: Path) -> None:
    """Only lesions that share a photo are read: where the first of three is left out, the others remain a pair."""
    one, two, *others = dataset.lesions[:8]
    copies = [replace(one, lesion_id=f"copy{number}", group=f"G{number}") for number in range(3)]
    index = pack(replace(dataset, lesions=[*copies, two, *others]), tmp_path / "all")
    assert len(index.photo_sizes) == 1 and len(index.shared_photos) == 2
    first = {pair[0] for pair in index.shared_photos}
    keep = np.array([name not in first for name in index.lesion_ids])
    read = {name for pair in index.shared_photos for name in pair} - first
    for row, name in enumerate(index.lesion_ids):
        if name not in read:
            with index.path(int(index.shard[row])).open("r+b") as file:
                for view in range(len(VIEWS)):
                    file.seek(int(index.offsets[row, view]))
                    file.write(bytes(int(index.sizes[row, view])))
    part = join_sets([index], [keep], tmp_path / "part")
    assert {frozenset(pair) for pair in part.shared_photos} == {frozenset(read)}
    assert part.photo_sizes == {index.canvas: 2 * len(part)}


def test_finer_labels_are_kept(dataset: Dataset, tmp_path: Path) -> None:
    name = dataset.task.diagnosis_names[0]
    task = replace(dataset.task, fine=FineLabels("subtype", {name: ("one", "two")}))
    fine = [replace(each, fine=number % 3 - 1) for number, each in enumerate(dataset.lesions)]
    index = pack(replace(dataset, task=task, lesions=fine), tmp_path / "all")
    keep = np.arange(len(index)) % 2 == 0
    part = join_sets([index], [keep], tmp_path / "part")
    assert part.fine.tolist() == index.fine[keep].tolist() and set(part.fine.tolist()) == {-1, 0, 1}


def test_two_processes_do_not_write_one_set(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCK_SECONDS, "0")
    index = pack(dataset, tmp_path / "all")
    (tmp_path / "out.part").mkdir()
    with (
        exclusive_lock(tmp_path / "out.part" / "lock", ""),
        pytest.raises(Busy, match="another process writes out; wait for it or end it"),
    ):
        join_sets([index], [everything(index)], tmp_path / "out")
    (tmp_path / "out.part" / "shards").mkdir()  # of a process that was killed
    assert len(join_sets([index], [everything(index)], tmp_path / "out")) == len(index)
    assert not list(tmp_path.glob("*.part"))


def test_output_that_is_a_symbolic_link_is_written_where_it_leads(dataset: Dataset, tmp_path: Path) -> None:
    index = pack(dataset, tmp_path / "all")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    join_sets([index], [everything(index)], tmp_path / "link")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
    assert (tmp_path / "link").is_symlink() and len(read_index(tmp_path / "link")) == len(index)


def test_joined_tar_folders_train_like_one(tmp_path: Path) -> None:
    """Tars of other programs: indexed as one folder, or as two that are joined, an epoch gives the same batches."""
    both = tmp_path / "both"
    both.mkdir()
    for number, name in enumerate(("a", "b")):
        write_foreign(tmp_path / name, change=lambda sample, at, name=name: sample.update(__key__=f"{name}{at}"))
        for tar in (tmp_path / name).glob("*.tar"):
            shutil.copy(tar, both / f"set{number}-{tar.name}")
    together, halves = index_shards(both), [index_shards(tmp_path / name) for name in ("a", "b")]
    joined = join_sets(halves, [everything(half) for half in halves], tmp_path / "joined")
    batches = []
    for index in (together, joined):
        plan = EpochPlan(Samples.of(index, np.arange(len(index))), Sampling("balanced"), 0, 0)
        source = PhotoSource(index, 36, (0.5,) * 3, (0.5,) * 3)
        loader = Loader(index, source, plan.batches(0, 1, 6), micro_batch=3, device=torch.device("cpu"))
        batches.append([batch for step in loader for batch in step.micro_batches])
        source.close()
    for one, other in zip(*batches, strict=True):
        assert one.lesion_ids == other.lesion_ids
        for name in ("clinical", "dermoscopic", "concepts", "metadata", "labels"):
            assert torch.equal(getattr(one, name).nan_to_num(-1), getattr(other, name).nan_to_num(-1))


def test_sets_behind_urls_are_joined(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    half = len(dataset.lesions) // 2
    first, second = pack(dataset, tmp_path / "a", slice(half)), pack(dataset, tmp_path / "b", slice(half, None))
    expected = join_sets([first, second], [everything(first), everything(second)], tmp_path / "local")
    with serve(tmp_path / "a") as server:
        main(JoinConfig(sets=(server.url, str(tmp_path / "b")), output=str(tmp_path / "both")))
        with pytest.raises(DataError, match=rf"is in {server.url} and {tmp_path / 'a'}; leave it out of one"):
            main(JoinConfig(sets=(server.url, str(tmp_path / "a")), output=str(tmp_path / "twice")))
    index = read_index(tmp_path / "both", verify=True)
    assert index.fingerprint == expected.fingerprint
    assert {path.name: path.read_bytes() for path in index.folder.iterdir()} == {
        path.name: path.read_bytes() for path in expected.folder.iterdir()
    }
    with pytest.raises(ConfigError, match="output=s3://bucket/both: not a local folder"):
        main(JoinConfig(sets=(str(tmp_path / "a"),), output="s3://bucket/both"))


def test_full_disk_is_named_by_the_copy(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the tar that is copied, where the file system has no links."""

    def no_links(*paths: Path) -> None:
        raise OSError(errno.EXDEV, "another file system")

    index = pack(dataset, tmp_path / "all")
    monkeypatch.setattr(os, "link", no_links)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(each.bytes for each in index.shards) // 2, hard))
    try:
        with pytest.raises(
            DataError, match=r"out\.part/new/[\w.-]+\.tar: File too large; fix that and rerun the same command$"
        ):
            join_sets([index], [everything(index)], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []
