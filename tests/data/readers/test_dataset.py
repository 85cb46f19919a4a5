"""Ids that programs change or spreadsheets and terminals act on are refused; their spellings are compared."""

from __future__ import annotations

import pyarrow as pa
import pytest

from triderm_dist.data.readers.dataset import folded, spelled_alike, why_no_lesion_id


@pytest.mark.parametrize(
    "text",
    ["IL_0000652", "7", "007", "a:b", 'a"b', "a,b", "ä", "病变1", "3e12", "a-b", "a b", "Foto 12 (Rücken)", "x" * 80],
)
def test_usual_ids_are_allowed(text: str) -> None:
    assert why_no_lesion_id(text) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("x" * 81, "has 81 characters"),
        ("a.b", "a dot, a slash or an unusual space"),
        ("a/b", "a dot, a slash or an unusual space"),
        ("a\\b", "a dot, a slash or an unusual space"),
        (" a", "a dot, a slash or an unusual space"),
        ("a\tb", "U+0009"),
        ("a\u00a0b", "a dot, a slash or an unusual space"),
        ("a\0b", "U+0000"),
        ("a\x1b[31m", "U+001B"),
        ("a\x7f", "U+007F"),
        ("a\x9b", "U+009B"),
        ("a\u202eb", "U+202E (right-to-left override)"),
        ("a\u2066b", "U+2066"),
        ("a\u200bb", "U+200B (zero width space)"),
        ("\ufeffa", "U+FEFF"),
        ("a\u00adb", "U+00AD (soft hyphen)"),
        ("a\u2028b", "U+2028"),
        ("a\ud800", "U+D800"),
        ("a\ufffd", "U+FFFD"),
        ("=1+1", "begins with ="),
        ("+1", "begins with +"),
        ("-1", "begins with -"),
        ("@a", "begins with @"),
        ("\uff1da", "begins with"),
        ("1E+05", "a number that a spreadsheet has shortened"),
        ("1.23457E+11", "a number that a spreadsheet has shortened"),
        ("123.0", "write 123"),
        ("#REF!", "an error value of a spreadsheet"),
        ("#name?", "an error value of a spreadsheet"),
    ],
)
def test_other_ids_are_refused_with_the_reason(text: str, why: str) -> None:
    assert why in (why_no_lesion_id(text) or "")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("IL_007", "il_7"),
        ("0012", "12"),
        ("12.0", "12"),
        ("1E+05", "100000"),
        ("\uff21\uff11", "a1"),
        ("a\u200b", "A"),
        ("'a_1", "A-1"),
    ],
)
def test_spellings_that_programs_make_of_one_id_are_alike(one: str, other: str) -> None:
    assert folded(one) == folded(other)


@pytest.mark.parametrize(
    ("one", "other"), [("P01", "p1"), ("12.0", "012"), ("a_1", "A-1"), ("\uff21", "a"), ("'a", "a")]
)
def test_ids_of_a_set_that_are_spelled_alike_are_noted(one: str, other: str) -> None:
    assert spelled_alike(pa.array([one, other]), "ids")[0].startswith("ids: 1 equal another one but for case")


def test_other_ids_are_not_alike() -> None:
    assert spelled_alike(pa.array(["a1", "a10", "a1b", "b1", "1", "10", "a-1"]), "ids") == []
