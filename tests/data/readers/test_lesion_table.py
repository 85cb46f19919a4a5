"""Columns of numbers are stored without loss."""

from __future__ import annotations

import numpy as np
import pytest

from triderm_dist.data.readers.lesion_table import Numbers


@pytest.mark.parametrize("highest", [253, 254, 255, 256, 65534, 65535, 2**32 - 1, 25.4, 25.5, 1e300])
def test_largest_number_is_not_taken_for_a_missing_one(highest: float) -> None:
    values = np.array([0.0, highest, np.nan])
    np.testing.assert_array_equal(Numbers(values).values(), values)
