"""The settings of triderm pack that name a slice."""

from __future__ import annotations

import pytest

from triderm_dist.commands.pack import PackConfig
from triderm_dist.schema import ConfigError


def config(**settings: object) -> PackConfig:
    return PackConfig(source="photos", output="shards", **settings)


def test_slices_are_counted_from_one() -> None:
    assert config(slice="3/8").slice_of == (3, 8)
    assert config().slice_of is None


@pytest.mark.parametrize("slice_", ["0/8", "9/8", "3", "a/b", "-1/8", "3/8/1", "1/0"])
def test_other_slices_are_refused(slice_: str) -> None:
    with pytest.raises(ConfigError, match="write K/N for the K-th of N slices"):
        config(slice=slice_).slice_of  # noqa: B018


def test_finishing_is_not_for_a_slice() -> None:
    with pytest.raises(ConfigError, match="leave out slice="):
        config(slice="1/2", finish=True).slice_of  # noqa: B018
