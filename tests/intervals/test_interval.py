"""How an interval is written."""

import numpy as np
import pytest

from triderm_dist.intervals import Interval


@pytest.mark.parametrize(
    ("ends", "texts"),
    [
        ((0.042, 0.031, 0.053), ("+0.042", "+0.031", "+0.053")),
        ((0.0, 0.0, 0.0), ("+0.000", "+0.000", "+0.000")),
        ((0.0002, 0.0001, 0.0004), ("+0.0002", "+0.0001", "+0.0004")),
        ((-0.0006, -0.0009, -0.0003), ("-0.0006", "-0.0009", "-0.0003")),  # with three decimals, -0.001 to -0.000
        ((0.0001, -0.0002, 0.0004), ("+0.0001", "-0.0002", "+0.0004")),
        ((0.03, 0.00004, 0.06), ("+0.03000", "+0.00004", "+0.06000")),  # beyond the noise: no end looks like 0
        ((0.03, 0.0, 0.06), ("+0.030", "+0.000", "+0.060")),
        ((2e-9, 1e-9, 3e-9), ("+0.000000", "+0.000000", "+0.000000")),
        ((0.1, np.nan, np.nan), ("+0.100", "+nan", "+nan")),
    ],
)
def test_a_difference_has_the_decimals_that_its_interval_needs(ends: tuple[float, ...], texts: tuple[str, ...]) -> None:
    assert Interval(*ends).signed() == texts
