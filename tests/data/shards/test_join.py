"""Joined and selected sets hold the same lesions as a set packed of the same photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Challenge
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.select import select_rows
from triderm_dist.data.shards.index import ShardIndex, read_index, read_photo_bytes
from triderm_dist.data.shards.join import join_sets
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.verify import verify
from triderm_dist.schema import VIEWS, DataError


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


def test_two_sets_are_joined_as_if_packed_together(dataset: Dataset, tmp_path: Path) -> None:
    together = pack(dataset, tmp_path / "together")
    halves = [pack(dataset, tmp_path / "a", slice(0, 9)), pack(dataset, tmp_path / "b", slice(9, None))]
    joined = join_sets(halves, [everything(half) for half in halves], tmp_path / "joined")
    assert content(joined) == content(together)
    assert joined.photo_sizes == together.photo_sizes and joined.short_side == 24
    assert verify(joined, 2, 0) == []
    assert joined.path(0).samefile(halves[0].path(0))


def test_photos_in_common_are_found(dataset: Dataset, tmp_path: Path) -> None:
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
