"""Columns of samples.parquet as NumPy arrays and strings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import Challenge
from tests.processes import ROOT
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.format import Text, to_array
from triderm_dist.data.shards.pack import pack_shards

WORDS = ["ab", "", "ünï", "x", "melanoma"]


@pytest.mark.parametrize(
    "column",
    [
        pa.chunked_array([WORDS[:2], [], WORDS[2:]], pa.string()),
        pa.chunked_array([pa.array(["cut off", *WORDS]).slice(1)]),
    ],
    ids=["chunks", "slice"],
)
def test_text_by_rows(column: pa.ChunkedArray) -> None:
    text, rows = Text(column), np.array([4, 2, 2, 1])
    assert [*text] == [*text[:]] == [text[i] for i in range(5)] == WORDS
    assert text[rows].dtype == object and text[rows].tolist() == [WORDS[row] for row in rows]
    assert text[2:].tolist() == WORDS[2:] and text[np.arange(5) % 2 == 0].tolist() == WORDS[::2]


def test_text_without_rows() -> None:
    text = Text(pa.chunked_array([], pa.string()))
    assert len(text) == 0 and text[:].tolist() == text[np.zeros(0, int)].tolist() == []


@pytest.mark.parametrize("dtype", [pa.int16(), pa.int64(), pa.float32()])
def test_numbers_of_all_chunks(dtype: pa.DataType) -> None:
    for chunks in ([[1, 2], [], [3]], [[5]], []):
        found = to_array(pa.chunked_array(chunks, dtype))
        assert found.dtype == dtype.to_pandas_dtype()
        assert found.tolist() == [value for chunk in chunks for value in chunk]


def test_reading_a_packed_set_does_not_import_pandas(make_challenge: Callable[..., Challenge], tmp_path: Path) -> None:
    """It takes 0.3 s and 55 MB per process, which pyarrow would spend for `to_numpy`."""
    pack_shards(read_challenge(make_challenge(lesions=22).folder), tmp_path / "shards", short_side=None)
    program = (
        "import sys, numpy as np; from triderm_dist.data.shards.index import read_index;"
        f"index = read_index({str(tmp_path / 'shards')!r}); index.inputs(np.arange(3)), index.offsets, index.shard;"
        "assert 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_codes_are_in_the_order_of_the_strings() -> None:
    words = ["b", "", "a\U0001f600", "a\ufb00", "B", "b", "ab", "a"]
    text = Text(pa.chunked_array([words[:3], words[3:]], pa.string()))
    assert text.sorted_codes.tolist() == [sorted({*words}).index(word) for word in words]
    assert text.equals(Text(pa.chunked_array([words]))) and not text.equals(Text(pa.chunked_array([words[::-1]])))


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.one_of(
            st.integers(0, 10**8).map(lambda number: f"IL_{number:08d}"),
            st.integers(0, 10**8).map(str),
            st.text("a\x00\uffff", max_size=3),
            st.text(max_size=80),
        ),
        max_size=30,
    ),
    start=st.integers(0, 3),
)
def test_codes_of_any_strings(words: list[str], start: int) -> None:
    """Of those that 64 bits hold as a number, and of others."""
    text = Text(pa.chunked_array([pa.array(words, pa.string()).slice(start)]))
    words = words[start:]
    place = {word: number for number, word in enumerate(sorted({*words}))}
    assert text.sorted_codes.tolist() == [place[word] for word in words]


def test_ids_with_a_few_different_digits_are_sorted_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triderm_dist.data.shards.format.ROW_GROUP", 7)
    words = [f"patient-{'x' * 40}-{number * 7919 % 100:02d}{number % 3 * '0'}" for number in range(100)]
    numbers = Text(pa.chunked_array([words]))._numbers()
    assert numbers is not None
    assert np.argsort(numbers).tolist() == sorted(range(len(words)), key=words.__getitem__)
    assert Text(pa.chunked_array([[f"{number:064b}" for number in (0, 2**64 - 1, 2**63)]]))._numbers() is not None
    assert Text(pa.chunked_array([["0" * 21, "9" * 21]]))._numbers() is None
