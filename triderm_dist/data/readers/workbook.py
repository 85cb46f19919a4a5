"""Read the sheets of Excel workbooks (.xlsx)."""

from __future__ import annotations

import datetime
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from triderm_dist.data.readers.cells import is_blank
from triderm_dist.runtime.extras import require
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import DataError

MAX_WORKBOOK = 1 << 30
"""Bytes of an .xlsx file when unpacked."""
_SHOWN_WITH_ZEROS = re.compile(r'(?:"([^"]*)")?(0+)(?:"([^"]*)")?')


class SeveralSheets(DataError):
    """A workbook with content in several sheets."""

    def __init__(self, path: Path, sheets: Sequence[str]) -> None:
        names = ", ".join(map(repr, sheets))
        super().__init__(f"{path}: has the sheets {names}; name one by table: {{sheet: NAME}} in task.yaml")
        self.sheets = tuple(sheets)


def sheet_rows(path: Path, name: str | None) -> Iterator[tuple[int, list[str]]]:
    """Yield (row number, cells) of the sheet `name` of a workbook; None reads the only sheet with content.

    Raises DataError for other files, merged cells and formulas without a value; SeveralSheets if `name` is needed.
    """
    require(f"{path}: reading .xlsx", "openpyxl", instead="save it as CSV")
    try:
        with warnings.catch_warnings(action="ignore"):  # openpyxl warns of what it skips, such as colors
            yield from _rows_of_sheet(path, name)
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # zipfile, the XML parser or openpyxl, which parses lazily
        raise DataError(f"{path}: not a readable Excel workbook ({one_line(error, 200)}); save it again") from None


def _rows_of_sheet(path: Path, name: str | None) -> Iterator[tuple[int, list[str]]]:
    import openpyxl

    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > MAX_WORKBOOK:
            raise DataError(f"{path}: more than {MAX_WORKBOOK >> 30} GiB when unpacked; save it as CSV")
        parts = [archive.read(part) for part in archive.namelist() if part.startswith("xl/worksheets/")]
    has_formulas = any(b"<f>" in part or b"<f " in part for part in parts)
    has_merged = any(b"<mergeCell " in part for part in parts)
    del parts
    with closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
        sheet = _sheet_with_content(path, book, name)
        if sheet is None:
            return
        if has_merged and (merged := openpyxl.load_workbook(path)[sheet.title].merged_cells.ranges):
            first = min(map(str, merged))
            raise DataError(f"{path}: the cells {first} are merged, so that only the first has a value; unmerge them")
        if has_formulas:
            _check_formulas(path, sheet)
        width = 0
        for number, row in enumerate(sheet.iter_rows(), start=1):
            cells = [_excel_text(cell) for cell in row]
            if not width:
                width = len(cells) if not is_blank(cells) else 0
            yield number, cells + [""] * (width - len(cells))


def _sheet_with_content(path: Path, book: Any, name: str | None) -> Any | None:
    """Return the sheet `name`, by default the only one with content; None if no sheet has any."""
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # wrong in files of some programs; openpyxl would skip cells outside
    full = [sheet for sheet in book.worksheets if any(any(cell is not None for cell in row) for row in sheet.values)]
    if name is not None:
        if not (chosen := [sheet for sheet in full if sheet.title == name]):
            names = ", ".join(repr(sheet.title) for sheet in full)
            raise DataError(f"{path}: has no sheet {name!r} (table.sheet in task.yaml) with content; it has {names}")
        full = chosen
    if len(full) > 1:
        raise SeveralSheets(path, [sheet.title for sheet in full])
    return full[0] if full else None


def _check_formulas(path: Path, values: Any) -> None:
    """Raise DataError for a formula without a stored value, as programs write that do not calculate."""
    import openpyxl

    with closing(openpyxl.load_workbook(path, read_only=True)) as book:
        sheet = book[values.title]
        sheet.reset_dimensions()
        for formulas, results in zip(sheet.iter_rows(), values.values, strict=False):
            for cell, result in zip(formulas, results, strict=False):
                if result is None and cell.data_type == "f":
                    raise DataError(
                        f"{path}, cell {cell.coordinate}: a formula without a stored value; open and save the workbook "
                        "in a spreadsheet program, or save it as CSV"
                    )


def _excel_text(cell: Any) -> str:
    """Return a cell's text as the spreadsheet shows it, for the formats that ids use: `00123` may be stored as 123."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float) and float(value).is_integer():
        if abs(value) >= 1e15:
            return f"{value:.15G}"  # a spreadsheet keeps 15 digits; an id was longer
        digits = str(int(value))
        shown = _SHOWN_WITH_ZEROS.fullmatch(cell.number_format.partition(";")[0]) if value >= 0 else None
        return f"{shown[1] or ''}{digits.zfill(len(shown[2]))}{shown[3] or ''}" if shown else digits
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return str(value)
