"""Cells are parsed as numbers and fields; other text is refused or missing."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from triderm_dist.data.readers.cells import is_missing, numbers_in, parse_field, parse_number
from triderm_dist.schema import MetadataField

AGE = MetadataField("age", "age", "number", high=120)


@pytest.mark.parametrize(("text", "value"), [("85+", 85.0), ("2,5", 2.5), ("2.5", 2.5), ("unknown", math.nan)])
def test_numbers_with_comma_or_plus_are_parsed(text: str, value: float) -> None:
    assert parse_field(AGE, text) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("text", ["", "NA", "#N/A", "-", "?", ".", "<NA>", "Unknown"])
def test_markers_of_missing_values(text: str) -> None:
    assert is_missing(text) and not is_missing("old")


@pytest.mark.parametrize(
    "text", ["1,234,5", "1,234", "1.234,5", "3_0", "inf", "nan", "1e999", "0x1e", "\u0663\u0660", "3 0", "1/2"]
)
def test_numbers_that_other_programs_write_or_read_otherwise_are_none(text: str) -> None:
    assert parse_number(text) is None
    assert np.isnan(numbers_in(pa.array([text]), -math.inf, math.inf)).all()
