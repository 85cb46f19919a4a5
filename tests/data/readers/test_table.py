"""All common dialects of tables are read alike; files that are not tables are identified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from triderm_dist.data.readers import csv_file, table
from triderm_dist.data.readers.table import find_tables, read_table
from triderm_dist.schema import DataError


def write(path: Path, text: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def test_rows_are_numbered_as_in_a_spreadsheet(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "sep=,\nid,age\n\na,1\n,\nb,2\n"))
    assert [where.rpartition(" ")[2] for where, _ in table.rows()] == ["4", "6"]


def test_unnamed_column_is_kept_if_it_has_values(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "a.csv", ",id,\n0,a,\n1,b,\n")).header == ["(column 1)", "id"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b",,\n,,\n", "the file is empty"),
        ("größe,id\n1,2\n".encode("cp1252"), "not in UTF-8 (byte 0xf6), so probably in Windows-1252"),
        (b"\xff\xfea", "begins as UTF-16 and is cut off"),
        (b"PK\x03\x04abc", "an Excel workbook or a zip; name it .xlsx"),
        (b"<!doctype html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"PAR1", "a Parquet file; name it .parquet"),
        (b"id;age\na;1;2\n", "row 2: 3 cells, the header has 2"),
        (b"id;Id\na;b\n", "appears twice in the header"),
        (
            b"Export of 2024\nid,age\na,1\n",
            "row 2: 2 cells, the header has 1 (row 1: 'Export of 2024'); remove what is",
        ),
        (b"id,age\na,1\n\0\0\0", "line 3: holds NUL characters"),
        (b"id,age\na\0b,1\n", "line 2: holds NUL characters"),
        (b"id,age\na," + b"1" * 40000 + b"\n", "column 'age', row 2: a cell of more than 32,768 characters"),
        (b"id,age\na," + b"1" * 200000 + b"\n", "field larger than field limit"),
        (b'id;age\n"a;1\n', "not a readable CSV with the delimiter semicolon"),
    ],
)
def test_file_that_is_not_a_table_is_identified(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(DataError) as error:
        read_table(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_column_is_named_with_the_closest_one(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "Lesion,age\na,1\n"))
    with pytest.raises(DataError, match="column 'lesion_id' is missing from the header; is 'Lesion' meant"):
        table.require(["lesion_id"])


def test_text_is_compared_with_composed_accents(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "id\na\u0308\n"))
    assert table.cells["id"].to_pylist() == ["ä"]


def test_copy_without_its_original_is_a_table(tmp_path: Path) -> None:
    for name in ("Copy of b.csv", "c (1).csv", "a.csv", "a (1).csv", "Kopie von a.csv", "a copy.csv", "a copy 2.csv"):
        write(tmp_path / name, "x")
    assert [path.name for path in find_tables(tmp_path)] == ["Copy of b.csv", "a copy 2.csv", "a.csv", "c (1).csv"]


def test_lock_files_and_copies_are_not_tables(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a.csv", "inner/b.XLSX", "~$a.csv", ".a.csv", "Copy of a.csv", "a - Copy.csv", "a.jpg"):
        write(tmp_path / name, "x")
    assert [path.name for path in find_tables(tmp_path)] == ["a.csv", "b.XLSX"]


def test_large_tables_are_read_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.csv").write_text("a,,B\n" + "".join(f"{n},,{n % 3}\n" for n in range(100)))
    whole = read_table(tmp_path / "t.csv")
    monkeypatch.setattr(csv_file, "_BLOCK", 40)
    found = read_table(tmp_path / "t.csv").named(["b"])
    assert isinstance(found.cells, table.StoredCells) and found.header == ["a", "b"] and whole.header == ["a", "B"]
    assert found.cells["b"].equals(whole.cells["B"]) and [*found.rows()][70] == (
        f"{tmp_path}/t.csv, row 72", {"a": "70", "b": "1"},
    )  # fmt: skip
    chosen = np.isin(np.arange(100), [3, 40, 99])
    assert [cells["a"] for _, cells in found.rows(chosen)] == ["3", "40", "99"]
    codes, names = found.encoded("b")
    assert names.to_pylist() == ["0", "1", "2"] and codes.tolist() == [n % 3 for n in range(100)]
    (tmp_path / "t.csv").write_text("a,b\n" + "1,2\n" * 50 + "1\n")
    with pytest.raises(DataError, match=r"t.csv, row 52: 1 cells, the header has 2$"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("a,b\n" + "1,2\n" * 50 + "1,\0\n")
    with pytest.raises(DataError, match=r"t.csv, line 52: holds NUL characters"):
        read_table(tmp_path / "t.csv")
