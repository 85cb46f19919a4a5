"""All common dialects of tables are read alike; files that are not tables are identified."""

from __future__ import annotations

import datetime
import math
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triderm_dist.data.readers import table
from triderm_dist.data.readers.table import (
    NotUtf8,
    SeveralSheets,
    find_tables,
    is_missing,
    numbers_in,
    parse_field,
    parse_number,
    read_header,
    read_table,
)
from triderm_dist.runtime.extras import MissingPackage
from triderm_dist.schema import DataError, MetadataField, TableFormat

AGE = MetadataField("age", "age", "number", high=120)


def write(path: Path, text: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("id,Age\na,1\nb,2\n", "utf-8"),
        ("id;Age\r\na;1\r\nb;2\r\n", "utf-8-sig"),
        ("id\tAge\na\t1\nb\t2\n", "utf-16"),
        ("id\tAge\na\t1\nb\t2\n", "utf-16-le"),
        ("sep=;\nid;Age\na;1\nb;2\n", "utf-8"),
        ("id|Age\n a | 1\nb|2", "utf-8"),
        ("id\tAge\na\t1\nb\t2\n", "utf-16-be"),
        ("id,Age\na,1\nb,2\n", "utf-32"),
        ("\ufeff\ufeffid,A\u200bge \na,1\nb,2\n", "utf-8"),
        ('"id","\nAge"\ra,1\rb,2\r', "utf-8"),
        (",,,\nid,,Age,,\n,,,,\na,,1,,\n,,\nb,,2,,,\n\n", "utf-8"),
        ('"id","Age"\n"a","1"\n"b","2"\n', "utf-8"),
    ],
    ids=[
        "comma",
        "semicolon",
        "utf-16",
        "utf-16-le",
        "sep",
        "bar",
        "utf-16-be",
        "utf-32",
        "marks",
        "cr",
        "blank",
        "quoted",
    ],
)
def test_all_csv_dialects_are_read_alike(tmp_path: Path, text: str, encoding: str) -> None:
    table = read_table(write(tmp_path / "a.csv", text, encoding)).named(["age"])
    assert [cells for _, cells in table.rows()] == [{"id": "a", "age": "1"}, {"id": "b", "age": "2"}]


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


def test_text_is_read_in_the_encoding_of_the_task(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id;größe\na;5\n", "cp1252")
    assert read_table(path, TableFormat(encoding="cp1252")).header == ["id", "größe"]
    with pytest.raises(NotUtf8, match=r"write table: \{encoding: cp1252\} in task.yaml, or save it as 'CSV UTF-8'"):
        read_table(path)
    with pytest.raises(DataError, match="unknown encoding 'windows'"):
        read_table(path, TableFormat(encoding="windows"))
    with pytest.raises(DataError, match="is not in utf-8 "):
        read_table(path, TableFormat(encoding="utf-8"))


def test_missing_column_is_named_with_the_closest_one(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "Lesion,age\na,1\n"))
    with pytest.raises(DataError, match="column 'lesion_id' is missing from the header; is 'Lesion' meant"):
        table.require(["lesion_id"])


def test_workbooks_with_several_sheets_or_without_openpyxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="reads .xlsx: pip install 'triderm-dist[excel]'")
    book = openpyxl.Workbook()
    for row in (["id", "age", "itch"], ["a", 3.0, True], ["b", None, False]):
        book.active.append(row)
    path = tmp_path / "a.xlsx"
    book.save(path)
    assert next(cells for _, cells in read_table(path).rows()) == {"id": "a", "age": "3", "itch": "TRUE"}
    book.create_sheet("other").append(["x"])
    book.create_sheet("empty")
    book.save(path)
    with pytest.raises(SeveralSheets, match=r"has the sheets 'Sheet', 'other'; name one by table: \{sheet: NAME\}"):
        read_table(path)
    assert read_table(path, TableFormat(sheet="other")).header == read_header(path, TableFormat(sheet="other")) == ["x"]
    with pytest.raises(DataError, match=r"has no sheet 'third' .* it has 'Sheet', 'other'"):
        read_table(path, TableFormat(sheet="third"))
    with pytest.raises(DataError, match="not a readable Excel workbook"):
        read_table(write(tmp_path / "b.xlsx", "id,age\n"))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingPackage, match=r"needs openpyxl; pip install 'triderm-dist\[excel\]', or save it as CSV"):
        read_table(path)


Sheet = Callable[[Any], object]
WORKBOOKS: dict[str, tuple[Sheet, str]] = {
    "formula without a value": (lambda sheet: sheet.append(["c", "=1+1"]), "cell B4: a formula without a stored value"),
    "merged cells": (lambda sheet: sheet.merge_cells("B2:B3"), "the cells B2:B3 are merged"),
    "wide row": (lambda sheet: sheet.append(["c", 1, 2]), "row 4: 3 cells, the header has 2"),
}


@pytest.fixture
def workbook() -> Any:
    book = pytest.importorskip("openpyxl", reason="reads .xlsx: pip install 'triderm-dist[excel]'").Workbook()
    for row in (["id", "age"], [12, datetime.datetime(2024, 3, 1)], [7, None]):
        book.active.append(row)
    return book


@pytest.mark.parametrize("name", WORKBOOKS)
def test_workbook_whose_cells_have_no_value_is_refused(workbook: Any, tmp_path: Path, name: str) -> None:
    change, message = WORKBOOKS[name]
    change(workbook.active)
    workbook.save(tmp_path / "a.xlsx")
    with pytest.raises(DataError) as error:
        read_table(tmp_path / "a.xlsx")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_workbook_is_read_as_it_is_shown(workbook: Any, tmp_path: Path) -> None:
    workbook.active["A2"].number_format, workbook.active["A3"].number_format = "00000", '"IL_"0000'
    workbook.active.append([12345678901234567890, 2.5])
    workbook.save(tmp_path / "a.xlsx")
    rows = [list(cells.values()) for _, cells in read_table(tmp_path / "a.xlsx").rows()]
    assert rows == [["00012", "2024-03-01"], ["IL_0007", ""], ["1.23456789012346E+19", "2.5"]]


def test_workbook_with_wrong_dimensions_is_read_whole_and_a_damaged_one_refused(workbook: Any, tmp_path: Path) -> None:
    good, path = tmp_path / "good.xlsx", tmp_path / "a.xlsx"
    workbook.save(good)

    def copy(change: Callable[[bytes], bytes]) -> None:
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, change(old.read(name)) if name.startswith("xl/worksheets/") else old.read(name))

    copy(lambda xml: re.sub(rb'<dimension ref="[^"]*"', b'<dimension ref="A1:A2"', xml))
    assert len(read_table(path)) == 2 and read_table(path).header == ["id", "age"]
    copy(lambda xml: xml[: len(xml) // 2])
    with pytest.raises(DataError, match="not a readable Excel workbook"):
        read_table(path)


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


@pytest.mark.parametrize(("text", "value"), [("85+", 85.0), ("2,5", 2.5), ("2.5", 2.5), ("unknown", math.nan)])
def test_number_formats(text: str, value: float) -> None:
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


LINES = {
    "plain": "a,b\n1, x \n2,\n3,z\n",
    "crlf": "a,b\r\n1,x\r\n\r\n2,y\r\n",
    "blank rows": "a,b\n1,x\n,\n  , \n4,y\n\n6,z\n",
    "quotes": 'a,b\n1,x\n2,"two\nlines, ""quoted"""\n4,y\n5,"z"\n6,w\n',
    "more cells": "a,b\n1,x,,\n2,y\n3,z, \n",
    "accents": "a,b\n1,e\u0301\n2,\u00e9\n3,\u3000x\n",
    "carriage returns": "a,b\r1,x\r2,y\r",
    "no end": "a,b\n1,x\n2,y",
    "one column": "a\n1\n\n3\n",
}


@pytest.mark.parametrize("text", LINES.values(), ids=LINES)
def test_blocks_of_lines_are_read_as_pythons_csv_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode())

    def read() -> tuple[dict[str, list[str]], list[int]]:
        found = read_table(tmp_path / "t.csv")
        return {name: cells.to_pylist() for name, cells in found.cells.items()}, found.numbers[:]

    whole = read()
    for characters in (1, 9, 17):
        monkeypatch.setattr(table, "_BLOCK", characters)
        assert read() == whole
    monkeypatch.setattr(table, "plain_columns", lambda *arguments: None)
    assert read() == whole


def test_large_tables_are_read_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.csv").write_text("a,,B\n" + "".join(f"{n},,{n % 3}\n" for n in range(100)))
    whole = read_table(tmp_path / "t.csv")
    monkeypatch.setattr(table, "_BLOCK", 40)
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


def test_parquet_is_read_as_a_csv_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {
        "lesion_id": pa.array([" a ", "b", "\u00e9", None], pa.large_string()),
        "Sex": pa.array(["m", None, "f", None]).dictionary_encode(),
        "age": pa.array([55.0, None, 3.0, math.nan]),
        "score": pa.array([0.1, 1e-7, 1, None], pa.float32()),
        "count": pa.array([1, 2, 2**60, None], pa.int64()),
        "none": pa.array([None] * 4, pa.null()),
        "biopsied": pa.array([True, False, None, None]),
        "day": pa.array([datetime.date(2020, 1, 2), None, None, None]),
    }
    expected = {
        "lesion_id": ["a", "b", "\u00e9"], "sex": ["m", "", "f"], "age": ["55", "", "3"],
        "score": ["0.1", "1e-7", "1"], "count": ["1", "2", str(2**60)], "none": [""] * 3,
        "biopsied": ["true", "false", ""], "day": ["2020-01-02", "", ""],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    for rows in (1 << 16, 1):
        monkeypatch.setattr(table, "_CHUNK", rows)
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
