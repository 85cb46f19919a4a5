"""The settings of triderm pack that say which shards it writes."""

from __future__ import annotations

import pytest

from triderm_dist.commands.pack import PackConfig, main
from triderm_dist.config import slice_of
from triderm_dist.schema import ConfigError


def config(**settings: object) -> PackConfig:
    return PackConfig(source="photos", output="shards", **settings)


def test_tables_behind_a_url_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"source=s3://bucket/clinic: tables are read from a folder"):
        main(PackConfig(source="s3://bucket/clinic", output="shards"))


def test_slices_are_counted_from_one() -> None:
    assert slice_of("3/8") == (3, 8)
    assert slice_of(None) is None


@pytest.mark.parametrize("slice_", ["0/8", "9/8", "3", "a/b", "-1/8", "3/8/1", "1/0"])
def test_other_slices_are_refused(slice_: str) -> None:
    with pytest.raises(ConfigError, match="write K/N for the K-th of N slices"):
        main(config(slice=slice_))


@pytest.mark.parametrize("other", [{"finish": True}, {"address": "auto"}])
def test_a_slice_is_neither_finished_nor_packed_by_a_cluster(other: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="leave out slice="):
        main(config(slice="1/2", **other))
