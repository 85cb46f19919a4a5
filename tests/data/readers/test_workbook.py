"""Excel workbooks are read as a spreadsheet shows them, or refused."""

from __future__ import annotations

import datetime
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triderm_dist.data.readers.table import read_header, read_table, without_garbage_collection
from triderm_dist.data.readers.workbook import SeveralSheets
from triderm_dist.runtime.extras import MissingPackage
from triderm_dist.schema import DataError, TableFormat


def write(path: Path, text: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


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


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's list of open files")
def test_workbook_is_closed(workbook: Any, tmp_path: Path) -> None:
    workbook.save(path := tmp_path / "a.xlsx")
    with without_garbage_collection():
        read_table(path)
        assert not [each for each in Path("/proc/self/fd").iterdir() if each.resolve() == path]


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
