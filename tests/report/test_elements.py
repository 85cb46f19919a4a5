"""Values as text and as CSV."""

import csv
import io
import math

import numpy as np
import pytest

from triderm_dist.intervals import UNKNOWN, Interval
from triderm_dist.report.elements import Column, Flag, Row, Share, Table, shown

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (0.4949, "", "0.495"),
        (np.float64(0.5), "+.2f", "+0.50"),
        (0.123, ".1%", "12.3%"),
        (4717, "", "4,717"),
        (np.int64(1234), "", "1,234"),
        (True, "", "yes"),
        (np.bool_(False), "", "no"),
        (None, "", "–"),
        (NAN, "+.3f", "–"),
        ("a <b>", "", "a <b>"),
        (Interval(0.494, 0.471, 0.52), "", "0.494 (0.471 to 0.520)"),
        (Interval(0.01, -0.02, 0.04), "+.3f", "+0.010 (-0.020 to +0.040)"),
        (Interval(0.0002, 0.0001, 0.0004), "+.3f", "+0.0002 (+0.0001 to +0.0004)"),
        (Interval(0.0002, 0.0001, 0.0004), "+.4f", "+0.0002 (+0.0001 to +0.0004)"),
        (Interval(0.6332, 0.6331, 0.6334), "", "0.633 (0.633 to 0.633)"),
        (Interval(NAN, NAN, NAN), "+.3f", "–"),
        (UNKNOWN, "", "–"),
        (Share(12, 300), "", "12 of 300 (4.0%)"),
        (Share(0, 0), "", "0 of 0"),
        (Flag("significant"), "", "significant"),
    ],
)
def test_text_of_a_value(value: object, spec: str, text: str) -> None:
    assert shown(value, spec) == text  # type: ignore[arg-type]


TABLE = Table(
    "scores",
    "Scores",
    [Column("f1", "F1"), Column("lesions", "lesions"), Column("missing", "missing")],
    [
        Row("a, b", (Interval(1 / 3, 0.25, 0.5), 20, Share(1, 20)), group="first"),
        Row("a, b", (0.5, 1000, None), note="a note", group="second"),
        Row("c", (None, None, Flag("too few", strong=False)), group="second"),
    ],
    head="diagnosis",
)


def test_csv_has_all_digits_and_both_ends_of_intervals() -> None:
    rows = list(csv.DictReader(io.StringIO(TABLE.csv())))
    names = ["group", "diagnosis", "note", "f1", "f1_low", "f1_high", "lesions", "missing", "missing_of"]
    assert list(rows[0]) == names
    assert float(rows[0]["f1"]) == 1 / 3 and rows[0]["f1_high"] == "0.5" and rows[0]["missing_of"] == "20"
    assert list(rows[1].values()) == ["second", "a, b", "a note", "0.5", "", "", "1000", "", ""]
    assert list(rows[2].values()) == ["second", "c", "", "", "", "", "", "too few", ""]


def test_cells_are_quoted_by_row_and_column() -> None:
    assert TABLE.text("a, b", "f1", group="first") == "0.333 (0.250 to 0.500)"
    assert TABLE.text("a, b", "f1", "low", group="first") == "0.250"
    assert TABLE.text("a, b", "lesions", group="second") == "1,000"
    for row, column, group in (("a, b", "f1", ""), ("a, b", "auc", "first"), ("d", "f1", "first")):
        with pytest.raises(KeyError, match="table scores has"):
            TABLE.text(row, column, group=group)
    twice = Table("t", "T", [Column("x", "x")], [Row("a", (1,)), Row("a", (2,))])
    with pytest.raises(KeyError, match="2 rows 'a'"):
        twice.value("a", "x")


def test_a_difference_is_quoted_with_the_decimals_of_its_cell() -> None:
    table = Table("t", "T", [Column("x", "x", "+.3f")], [Row("a", (Interval(0.0002, 0.0001, 0.0004),))])
    assert [table.text("a", "x", part) for part in ("value", "low", "high")] == ["+0.0002", "+0.0001", "+0.0004"]


def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="table t, row a: 2 values for 1 columns"):
        Table("t", "T", [Column("x", "x")], [Row("a", (1, 2))])
    assert math.isnan(UNKNOWN.value)
