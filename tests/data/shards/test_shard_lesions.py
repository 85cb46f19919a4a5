"""Which lesions each shard holds."""

import hashlib
from collections.abc import Callable

import numpy as np

from tests.conftest import Challenge
from triderm_dist.data.readers.lesion_table import LesionTable
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.shard_lesions import ShardLesions, _runs


def test_lesions_in_the_order_of_their_hashes(make_challenge: Callable[..., Challenge]) -> None:
    lesions = list(read_challenge(make_challenge(lesions=33).folder).lesions)
    shards = ShardLesions(LesionTable.of(lesions), 5)
    ordered = sorted(lesions, key=lambda lesion: hashlib.sha256(lesion.lesion_id.encode()).digest())
    names = [[lesion.lesion_id for lesion in shard] for shard in shards]
    assert [name for shard in names for name in shard] == [lesion.lesion_id for lesion in ordered]
    assert [shards.size(number) for number in range(len(shards))] == [len(shard) for shard in names]
    assert {len(shard) for shard in names[:-1]} == {5}


def test_runs_of_equal_keys() -> None:
    assert _runs(np.array([1, 2, 2, 2, 3, 4, 4])) == [(1, 4), (5, 7)]
    assert _runs(np.array([1, 2])) == _runs(np.array([])) == []
