"""Read tables as people have them: CSV with any usual delimiter and encoding, as Excel and pandas write it, and .xlsx.

A cell is text without blanks around it. Rows are numbered as in a spreadsheet, from 1 with the header.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import gc
import math
import re
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.runtime.extras import require
from triderm_dist.schema import (
    MISSING_WORDS,
    PLAIN_NUMBER,
    DataError,
    MetadataField,
    TableFormat,
    nearest,
    one_line,
    quoted,
)

DEFAULT_FORMAT = TableFormat()
SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx")
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_LOCK_OR_HIDDEN = ("~$", ".")
_COPY = re.compile(
    r"(?:(?:copy of|kopie von|copie de|copia de) )?(?P<stem>.+?)(?:(?: -)? (?:copy|kopie|copie|copia))?(?: ?\(\d+\))?",
    re.IGNORECASE,
)
"""How programs name a second copy of a file, in English, German, French, Spanish and Italian."""
MAX_WORKBOOK = 1 << 30
"""Bytes of an .xlsx file when unpacked."""
MAX_CELL = 1 << 15
"""Characters of a cell, as in Excel."""
_CHUNK = 1 << 16
"""Rows held as Python objects before they become columns, which take a tenth of the memory."""

_OTHER_FILES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "an Excel workbook or a zip; name it .xlsx if it is a workbook"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook of the old kind (.xls); save it as .xlsx or CSV"),
    (b"PAR1", "a parquet file; save it as CSV"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"version https://git-lfs", "a pointer of Git LFS instead of the file; run git lfs pull"),
    (b"<!DOCTYPE", "a web page; download the file itself"),
    (b"<html", "a web page; download the file itself"),
)
"""What a file is that begins so, and what to do."""


@dataclass(frozen=True)
class Table:
    """A table's cells by column.

    form: how the file was read.  cells: {name in the header: N strings}.  numbers: (N,) row of each in the
    spreadsheet.
    """

    path: Path
    form: TableFormat
    cells: dict[str, pa.Array]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def header(self) -> list[str]:
        return list(self.cells)

    def where(self, row: int) -> str:
        return f"{self.path}, row {self.numbers[row]}"

    def find(self, name: str) -> str | None:
        """Return the column of that name as the header spells it, in any case."""
        return next((column for column in self.cells if column.lower() == name.lower()), None)

    def named(self, known: Iterable[str]) -> Table:
        """Return the same table, with the spelling of `known` for columns that differ from it in case."""
        spelling = {name.lower(): name for name in known}
        return replace(self, cells={spelling.get(name.lower(), name): column for name, column in self.cells.items()})

    def require(self, names: Iterable[str], advice: str = "") -> None:
        """Raise DataError for the first of these columns that the table lacks."""
        for name in names:
            if name not in self.cells:
                near = nearest(name, self.cells)
                hint = f"; is {near!r} meant?" if near else ""
                raise DataError(f"{self.path}: column {name!r} is missing from the header{hint}{advice}")

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield (file and row, cells by column) of every row."""
        for start in range(0, len(self), _CHUNK):
            columns = [cells.slice(start, _CHUNK).to_pylist() for cells in self.cells.values()]
            for row, cells in enumerate(zip(*columns, strict=True), start):
                yield self.where(row), dict(zip(self.cells, cells, strict=True))


def find_tables(folder: Path) -> list[Path]:
    """Return the tables of a folder and of the folders in it, sorted, without lock files, hidden files, and copies of
    a file that is there too.
    """
    found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES]
    found = [path for path in found if not path.name.startswith(_LOCK_OR_HIDDEN)]
    there = {str(path).lower() for path in found}

    def is_copy(path: Path) -> bool:
        stem = _COPY.fullmatch(path.stem)["stem"]  # type: ignore[index]
        return stem != path.stem and str(path.with_stem(stem)).lower() in there

    return sorted(path for path in found if not is_copy(path))


class NotUtf8(DataError):
    """A text file that is in neither UTF-8 nor UTF-16."""


class SeveralSheets(DataError):
    """A workbook in which several sheets hold something."""

    def __init__(self, path: Path, sheets: Sequence[str]) -> None:
        names = ", ".join(map(repr, sheets))
        super().__init__(f"{path}: has the sheets {names}; name one by table: {{sheet: NAME}} in task.yaml")
        self.sheets = tuple(sheets)


def read_table(path: Path, form: TableFormat = DEFAULT_FORMAT) -> Table:
    """Read a table; wholly blank rows and columns are left out. Raises DataError for what is not a table."""
    try:
        with without_garbage_collection():
            return _columns(path, form)
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table ({one_line(error)})") from None


def read_header(path: Path, form: TableFormat = DEFAULT_FORMAT) -> list[str]:
    """Return the first line of a table that is not blank, without the rest. Raises DataError as `read_table`."""
    try:
        return next(([_column_name(name) for name in line] for _, line in _rows(path, form) if not _blank(line)), [])
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table ({one_line(error)})") from None


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect no reference cycles inside the block: millions of rows have none, and each search visits all of them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rows(path: Path, form: TableFormat) -> Iterator[tuple[int, list[str]]]:
    return _sheet(path, form.sheet) if path.suffix.lower() == ".xlsx" else _lines(path, form.encoding)


def _columns(path: Path, form: TableFormat) -> Table:
    """Gather the rows into columns; the first one that is not blank is the header."""
    lines = _rows(path, form)
    first = next(((number, line) for number, line in lines if not _blank(line)), None)
    if first is None:
        raise DataError(f"{path}: the file is empty")
    header = [_column_name(name) for name in first[1]]
    while header and not header[-1]:
        header.pop()
    names = [name or f"(column {number})" for number, name in enumerate(header, 1)]
    if duplicates := [name for name, count in Counter(map(str.lower, names)).items() if count > 1]:
        name = next(name for name in names if name.lower() == duplicates[0])
        raise DataError(f"{path}: column {name!r} appears twice in the header; remove one")
    width, numbers = len(names), [np.empty(0, np.int64)]
    parts: list[list[pa.Array]] = [[pa.array([], pa.string())] for _ in names]
    kept: list[list[str]] = []
    kept_numbers: list[int] = []

    def flush() -> None:
        for name, part, column in zip(names, parts, zip(*kept, strict=True), strict=True):
            part.append(_cells(column, f"{path}, column {name!r}", kept_numbers))
        numbers.append(np.array(kept_numbers, np.int64))
        kept.clear()
        kept_numbers.clear()

    for number, line in lines:
        if len(line) == width:
            if "".join(line).strip():
                kept.append(line)
                kept_numbers.append(number)
        elif not _blank(line):
            if len(line) < width or not _blank(line[width:]):
                above = (
                    ""
                    if kept or len(numbers) > 1
                    else f" (row {first[0]}: {quoted(', '.join(names))}); remove what is above it"
                )
                raise DataError(f"{path}, row {number}: {len(line)} cells, the header has {width}{above}")
            kept.append(line[:width])
            kept_numbers.append(number)
        if len(kept) == _CHUNK:
            flush()
    if kept:
        flush()
    cells = {}
    for at, name in enumerate(names):
        column = pa.concat_arrays(parts[at])
        parts[at].clear()
        if header[at] or pc.any(pc.not_equal(column, "")).as_py():
            cells[name] = column
    pa.default_memory_pool().release_unused()
    return Table(path, form, cells, np.concatenate(numbers))


def _column_name(text: str) -> str:
    """Return a name of the header without line breaks and invisible characters."""
    visible = text if text.isascii() else "".join(each for each in text if unicodedata.category(each) != "Cf")
    return " ".join(visible.split())


def _cells(column: Sequence[str], where: str, rows: Sequence[int]) -> pa.Array:
    """Return the cells of a column, trimmed and with composed accents. Raises DataError for a cell without an end."""
    cells = pc.utf8_trim_whitespace(pa.array(column, pa.string()))
    if (pc.max(pc.utf8_length(cells)).as_py() or 0) > MAX_CELL:
        row = next(row for row, cell in zip(rows, column, strict=True) if len(cell) > MAX_CELL)
        raise DataError(f"{where}, row {row}: a cell of more than {MAX_CELL:,} characters; is a quote missing?")
    return cells if pc.all(pc.string_is_ascii(cells)).as_py() else pc.utf8_normalize(cells, form="NFC")


def _blank(line: Sequence[str]) -> bool:
    return not any(map(str.strip, line))


def _lines(path: Path, encoding: str | None) -> Iterator[tuple[int, list[str]]]:
    """Yield (number, cells) of the lines of a CSV. Raises DataError for a file of another kind."""
    if encoding is not None and not _is_encoding(encoding):
        raise DataError(f"{path}: unknown encoding {encoding!r} (table in task.yaml); write cp1252, utf-8 or another")
    with path.open("rb") as file:
        start = file.read(4096)
    if kind := next((what for magic, what in _OTHER_FILES if start.lower().startswith(magic.lower())), None):
        raise DataError(f"{path}: is {kind}")
    given, encoding = encoding, encoding or _encoding(start)
    with path.open(encoding=encoding, newline="") as file:
        try:
            text = file.readline()
            skipped = 0
            if separated := re.match(r'"?sep=(.)"?\r?\n?$', text):
                skipped, delimiter = 1, separated[1]
            else:
                while text and not text.strip(",;|\t\r\n "):
                    text, skipped = file.readline(), skipped + 1
                delimiter = _delimiter(text)
                file.seek(0)
                for _ in range(skipped):
                    file.readline()
            lines = _without_nul(file, path, skipped)
            yield from enumerate(csv.reader(lines, delimiter=delimiter, strict=True), start=skipped + 1)
        except UnicodeDecodeError as error:
            if given:
                raise DataError(f"{path}: is not in {given} ({error.reason}); correct table.encoding") from None
            if encoding.startswith("utf-16"):
                raise DataError(f"{path}: begins as UTF-16 and is cut off or damaged ({error.reason})") from None
            byte = error.object[error.start]
            raise NotUtf8(
                f"{path}: is not in UTF-8 (byte 0x{byte:02x}), so probably in Windows-1252, as Excel's plain CSV; "
                "write table: {encoding: cp1252} in task.yaml, or save it as 'CSV UTF-8'"
            ) from None
        except csv.Error as error:
            name = DELIMITERS.get(delimiter, repr(delimiter))
            raise DataError(f"{path}: not a readable CSV with the delimiter {name} ({one_line(error)})") from None


def _without_nul(lines: Iterable[str], path: Path, above: int) -> Iterator[str]:
    """Yield the lines of a file. Raises DataError for one with a NUL character, which no text has."""
    for number, line in enumerate(lines, start=above + 1):
        if "\0" in line:
            raise DataError(
                f"{path}, line {number}: holds NUL characters; it is cut off, damaged or no text; copy it again"
            )
        yield line


def _is_encoding(name: str) -> bool:
    try:
        codecs.lookup(name)
    except LookupError:
        return False
    return True


def _encoding(start: bytes) -> str:
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if start[first:200:2].count(0) > len(start[first:200:2]) // 2:
            return encoding
    return "utf-8-sig"


def _delimiter(header: str) -> str:
    """Return the delimiter that cuts the header into most cells; a comma where none does."""
    return max(DELIMITERS, key=lambda each: len(next(csv.reader([header], delimiter=each), [])))


def _sheet(path: Path, name: str | None) -> Iterator[tuple[int, list[str]]]:
    """Yield (number, cells) of the rows of a workbook's sheet of that name; None for the only one with content."""
    require(f"{path}: reading .xlsx", "openpyxl", instead="save it as CSV")
    try:
        with warnings.catch_warnings(action="ignore"):  # of openpyxl, on what it leaves out, such as colors
            yield from _sheet_rows(path, name)
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # of zipfile, the XML parser or openpyxl, which reads while rows are asked for
        raise DataError(f"{path}: not a readable Excel workbook ({one_line(error, 200)}); save it again") from None


def _sheet_rows(path: Path, name: str | None) -> Iterator[tuple[int, list[str]]]:
    import openpyxl

    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > MAX_WORKBOOK:
            raise DataError(f"{path}: more than {MAX_WORKBOOK >> 30} GiB when unpacked; save it as CSV")
        parts = [archive.read(part) for part in archive.namelist() if part.startswith("xl/worksheets/")]
    has_formulas = any(b"<f>" in part or b"<f " in part for part in parts)
    has_merged = any(b"<mergeCell " in part for part in parts)
    del parts
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # which other programs write wrong, and openpyxl would leave out what is outside
    full = [sheet for sheet in book.worksheets if any(any(cell is not None for cell in row) for row in sheet.values)]
    if name is not None:
        if not (chosen := [sheet for sheet in full if sheet.title == name]):
            names = ", ".join(repr(sheet.title) for sheet in full)
            raise DataError(f"{path}: has no sheet {name!r} (table.sheet in task.yaml) with content; it has {names}")
        full = chosen
    if len(full) > 1:
        raise SeveralSheets(path, [sheet.title for sheet in full])
    for sheet in full:
        if has_merged and (merged := openpyxl.load_workbook(path)[sheet.title].merged_cells.ranges):
            first = min(map(str, merged))
            raise DataError(f"{path}: the cells {first} are merged, so that only the first has a value; unmerge them")
        if has_formulas:
            _check_formulas(path, sheet)
        width = 0
        for number, row in enumerate(sheet.iter_rows(), start=1):
            cells = [_excel_text(cell) for cell in row]
            if not width:
                width = len(cells) if not _blank(cells) else 0
            yield number, cells + [""] * (width - len(cells))


def _check_formulas(path: Path, values: Any) -> None:
    """Raise DataError for a formula without a stored value, which programs that do not calculate leave out."""
    import openpyxl

    sheet = openpyxl.load_workbook(path, read_only=True)[values.title]
    sheet.reset_dimensions()
    for formulas, results in zip(sheet.iter_rows(), values.values, strict=False):
        for cell, result in zip(formulas, results, strict=False):
            if result is None and cell.data_type == "f":
                raise DataError(
                    f"{path}, cell {cell.coordinate}: a formula without a stored value; open and save the workbook in "
                    "a spreadsheet program, or save it as CSV"
                )


_SHOWN_WITH_ZEROS = re.compile(r'(?:"([^"]*)")?(0+)(?:"([^"]*)")?')


def _excel_text(cell: Any) -> str:
    """Return a cell as the spreadsheet shows it, as far as ids depend on that: `00123` may be stored as 123."""
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


# --- cells -----------------------------------------------------------------------------------------------------------


def is_missing(text: str, words: Sequence[str] = MISSING_WORDS) -> bool:
    """Return whether a cell is empty or one of the words that mean a missing value, in any case."""
    return not text or text.lower() in map(str.lower, words)


def parse_number(text: str) -> float | None:
    """Return a finite number, also with a decimal comma; None for other text."""
    pointed = _with_point(text)
    number = float(pointed) if PLAIN_NUMBER.fullmatch(pointed) else math.nan
    return number if math.isfinite(number) else None


_DECIMAL_COMMA = r"^([-+]?[0-9]*),([0-9]+)$"
_AMBIGUOUS_COMMA = r"^[-+]?[1-9][0-9]{0,2},[0-9]{3}$"
"""A thousand in English, and one with three decimals elsewhere."""


def _with_point(text: str) -> str:
    return text if re.fullmatch(_AMBIGUOUS_COMMA, text) else re.sub(_DECIMAL_COMMA, r"\1.\2", text)


def numbers_in(texts: pa.Array, low: float, high: float) -> np.ndarray:
    """Return the numbers (N,) from low to high, also with a decimal comma; NaN for other text."""
    ambiguous = pc.match_substring_regex(texts, _AMBIGUOUS_COMMA)
    pointed = pc.if_else(ambiguous, texts, pc.replace_substring_regex(texts, _DECIMAL_COMMA, r"\1.\2"))
    plain = pc.match_substring_regex(pointed, r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)$")
    numbers = pc.if_else(plain, pointed, "nan").cast(pa.float64()).to_numpy(zero_copy_only=False)
    return np.where((low <= numbers) & (numbers <= high), numbers, np.nan)


def parse_field(field: MetadataField, text: str, words: Sequence[str] = MISSING_WORDS) -> float:
    """Return the value of a field, NaN where missing; `85+` is 85. Raises ValueError as `MetadataField.parse`."""
    if is_missing(text, words):
        return math.nan
    return field.parse(_with_point(text.removesuffix("+")) if field.is_number else text)


def parse_score(
    name: str, text: str, words: Sequence[str] = MISSING_WORDS, scores: Mapping[str, float] = MappingProxyType({})
) -> float:
    """Return a concept score from 0 to 1, NaN where missing. Raises ValueError otherwise.

    scores: the score of a word, in any case; it precedes `words`, those that mean a missing value.
    """
    for word, number in scores.items():
        if word.lower() == text.lower():
            return number
    if is_missing(text, words):
        return math.nan
    score = parse_number(text)
    if score is None or not 0 <= score <= 1:
        raise ValueError(f"{name} {quoted(text)} is not a score from 0 to 1")
    return score
