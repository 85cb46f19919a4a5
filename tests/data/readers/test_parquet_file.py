"""Parquet files are read as a CSV of them."""

from __future__ import annotations

import datetime
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triderm_dist.data.readers import table
from triderm_dist.data.readers.table import find_tables, read_header, read_table
from triderm_dist.schema import DataError


def test_parquet_is_read_as_a_csv_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {
        "lesion_id": pa.array([" a ", "b", "\u00e9", None], pa.large_string()),
        "Sex": pa.array(["m", None, "f", None]).dictionary_encode(),
        "age": pa.array([55.0, -math.inf, 3.0, math.nan]),
        "score": pa.array([0.1, 1e-7, 1, None], pa.float32()),
        "count": pa.array([1, 2, 2**60, None], pa.int64()),
        "none": pa.array([None] * 4, pa.null()),
        "biopsied": pa.array([True, False, None, None]),
        "day": pa.array([datetime.date(2020, 1, 2), None, None, None]),
    }
    expected = {
        "lesion_id": ["a", "b", "\u00e9"], "sex": ["m", "", "f"], "age": ["55", "-inf", "3"],
        "score": ["0.1", "1e-7", "1"], "count": ["1", "2", str(2**60)], "none": [""] * 3,
        "biopsied": ["true", "false", ""], "day": ["2020-01-02", "", ""],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    for rows in (1 << 16, 1):
        monkeypatch.setattr(table, "_ROWS_PER_CHUNK", rows)
        found = read_table(tmp_path / "t.parquet").named(["sex"])
        assert {name: cells.to_pylist() for name, cells in found.cells.items()} == expected
        assert found.numbers[:] == [1, 2, 3] and read_header(tmp_path / "t.parquet") == list(columns)
    assert find_tables(tmp_path) == [tmp_path / "t.parquet"]
    (tmp_path / "t.csv").write_bytes((tmp_path / "t.parquet").read_bytes())
    with pytest.raises(DataError, match=r"is a Parquet file; name it \.parquet"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(DataError, match=r"not a readable Parquet file"):
        read_table(tmp_path / "t.parquet")
    pq.write_table(pa.table({"a": [[1]]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet, column 'a': holds list<.*>, which no cell of a table can"):
        read_table(tmp_path / "t.parquet")
