"""Read tables as people have them: CSV with any usual delimiter and encoding, as Excel and pandas write it, .xlsx, and
Parquet.

A cell is text without blanks around it. Rows are numbered as in a spreadsheet, from 1 with the header; those of
Parquet, which has none, from 1.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import datetime
import gc
import io
import math
import re
import tempfile
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

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
SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".parquet")
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
_BLOCK = 1 << 22
"""Characters of a CSV that are read at a time."""
_IN_MEMORY = 1 << 24
"""Bytes of the columns of a table that are kept in memory; more go to a temporary file."""

_OTHER_FILES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "an Excel workbook or a zip; name it .xlsx if it is a workbook"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook of the old kind (.xls); save it as .xlsx or CSV"),
    (b"PAR1", "a Parquet file; name it .parquet"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"version https://git-lfs", "a pointer of Git LFS instead of the file; run git lfs pull"),
    (b"<!DOCTYPE", "a web page; download the file itself"),
    (b"<html", "a web page; download the file itself"),
)
"""What a file is that begins so, and what to do."""


class RowNumbers(Sequence[int]):
    """The number in the spreadsheet of each row of a table: runs of rows without a gap between them."""

    def __init__(self) -> None:
        self._first: list[int] = []
        self._number: list[int] = []
        self._rows = 0

    def add(self, number: int, rows: int = 1) -> None:
        """Append rows with the numbers from `number` on."""
        if not self._first or number != self[-1] + 1:
            self._first.append(self._rows)
            self._number.append(number)
        self._rows += rows

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, row: int) -> int: ...
    @overload
    def __getitem__(self, row: slice) -> list[int]: ...
    def __getitem__(self, row: int | slice) -> int | list[int]:
        if isinstance(row, slice):
            return [self[each] for each in range(len(self))[row]]
        row = range(len(self))[row]
        run = bisect.bisect_right(self._first, row) - 1
        return self._number[run] + row - self._first[run]


class StoredCells(Mapping[str, pa.Array]):
    """The columns of a large table in a temporary Parquet file: a tenth of the memory, and on disk where they are many.

    columns: the column of the file by name.
    """

    def __init__(self, file: pq.ParquetFile, columns: Mapping[str, str]) -> None:
        self._file, self._columns = file, dict(columns)

    def __getitem__(self, name: str) -> pa.Array:
        column = self._columns[name]
        return self._file.read([column], use_threads=False)[column].combine_chunks()

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def renamed(self, spelling: Mapping[str, str]) -> StoredCells:
        """Return the same columns, with the names that `spelling` gives for those in lower case."""
        return StoredCells(self._file, {spelling.get(k.lower(), k): column for k, column in self._columns.items()})

    def parts(self, names: Sequence[str]) -> Iterator[list[pa.Array]]:
        """Yield these columns part by part, as many rows at a time as were read at once."""
        columns = [self._columns[name] for name in names]
        for group in range(self._file.num_row_groups):
            part = self._file.read_row_group(group, [*dict.fromkeys(columns)], use_threads=False)
            yield [part[column].combine_chunks() for column in columns]


@dataclass(frozen=True)
class Table:
    """A table's cells by column.

    form: how the file was read.  cells: {name in the header: N strings}.  numbers: (N,) row of each in the
    spreadsheet.
    """

    path: Path
    form: TableFormat
    cells: Mapping[str, pa.Array]
    numbers: Sequence[int]

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
        if isinstance(self.cells, StoredCells):
            return replace(self, cells=self.cells.renamed(spelling))
        return replace(self, cells={spelling.get(name.lower(), name): column for name, column in self.cells.items()})

    def require(self, names: Iterable[str], advice: str = "") -> None:
        """Raise DataError for the first of these columns that the table lacks."""
        for name in names:
            if name not in self.cells:
                near = nearest(name, self.cells)
                hint = f"; is {near!r} meant?" if near else ""
                raise DataError(f"{self.path}: column {name!r} is missing from the header{hint}{advice}")

    def parts(self, *names: str) -> Iterator[list[pa.Array]]:
        """Yield these columns part by part, so that the strings of a large table are never all in memory."""
        if isinstance(self.cells, StoredCells):
            yield from self.cells.parts(names)
        elif len(self):
            yield [self.cells[name] for name in names]

    def encoded(self, name: str) -> tuple[np.ndarray, pa.Array]:
        """Return the number of each row's text (N,) and the different texts, in the order in which they appear."""
        column = pa.chunked_array([cells for (cells,) in self.parts(name)], pa.string()).dictionary_encode()
        codes = [chunk.indices.to_numpy() for chunk in column.chunks]
        names = column.chunk(0).dictionary if codes else pa.array([], pa.string())
        pa.default_memory_pool().release_unused()
        return np.concatenate(codes or [np.empty(0, np.int32)]), names

    def rows(self, chosen: np.ndarray | None = None) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield (file and row, cells by column) of every row, or of the chosen ones (bool, (N,))."""
        start = 0
        for columns in self.parts(*self.cells):
            own = np.arange(start, start + len(columns[0]))
            start += len(own)
            if chosen is not None:
                own = own[chosen[own]]
                columns = [column.take(pa.array(own - (start - len(column)))) for column in columns]
            for at, cells in enumerate(zip(*(column.to_pylist() for column in columns), strict=True)):
                yield self.where(int(own[at])), dict(zip(self.cells, cells, strict=True))


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
    """Yield (number, cells) of the rows of a table."""
    if path.suffix.lower() == ".xlsx":
        yield from _sheet(path, form.sheet)
    elif path.suffix.lower() == ".parquet":
        with _open_parquet(path) as parquet:
            yield 0, parquet.schema_arrow.names
    else:
        with _open_csv(path, form.encoding) as file:
            yield from file


def _columns(path: Path, form: TableFormat) -> Table:
    """Gather the rows into columns; the first one that is not blank is the header."""
    if path.suffix.lower() == ".xlsx":
        lines = _sheet(path, form.sheet)
        columns = _start(path, lines)
        for number, line in lines:
            columns.add_line(number, line)
    elif path.suffix.lower() == ".parquet":
        with _open_parquet(path) as parquet:
            names = parquet.schema_arrow.names
            columns, number = _start(path, iter([(0, names)])), 1
            for batch in parquet.iter_batches(_CHUNK, use_threads=False):
                parts = [_as_text(cells, path, name) for cells, name in zip(batch.columns, names, strict=True)]
                columns.add_part(number, parts[: len(columns.names)])
                number += len(batch)
    else:
        with _open_csv(path, form.encoding) as file:
            columns = _start(path, file)
            while text := file.block():
                if (part := plain_columns(text, file.delimiter, len(columns.names))) is not None:
                    columns.add_part(file.number + 1, part)
                    file.skip(len(part[0]))
                else:
                    for number, line in file.rows_of(text):
                        columns.add_line(number, line)
    return columns.table(form)


def _start(path: Path, lines: Iterator[tuple[int, list[str]]]) -> _Columns:
    """Return the columns of a table without rows, after reading its header."""
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
    return _Columns(path, names, [not name for name in header], first[0])


class _Columns:
    """The columns of a table while its rows are read.

    names: one of each.  optional: whether it is left out where all its cells are empty.  above: row of the header.
    """

    def __init__(self, path: Path, names: Sequence[str], optional: Sequence[bool], above: int) -> None:
        self.path, self.names, self.optional, self.above = path, names, optional, above
        self.numbers = RowNumbers()
        self._lines: list[list[str]] = []
        self._line_numbers: list[int] = []
        self._first: list[pa.Array] | None = None
        self._writer: pq.ParquetWriter | None = None
        self._used = [False] * len(names)

    def add_line(self, number: int, line: list[str]) -> None:
        """Append a row, unless it is blank. Raises DataError for one with more or fewer cells than the header."""
        width = len(self.names)
        if len(line) == width:
            if not "".join(line).strip():
                return
        elif _blank(line):
            return
        elif len(line) < width or not _blank(line[width:]):
            begun = len(self.numbers) or self._lines
            above = "" if begun else f" (row {self.above}: {quoted(', '.join(self.names))}); remove what is above it"
            raise DataError(f"{self.path}, row {number}: {len(line)} cells, the header has {width}{above}")
        self._lines.append(line[:width])
        self._line_numbers.append(number)
        if len(self._lines) == _CHUNK:
            self._flush()

    def add_part(self, number: int, columns: list[pa.Array]) -> None:
        """Append rows without a gap between their numbers, from `number` on, except for blank ones."""
        self._flush()
        rows = len(columns[0])
        blank = pc.equal(columns[0], "")
        if pc.any(blank).as_py():
            for column in columns[1:]:
                blank = pc.and_(blank, pc.equal(column, ""))
            kept = np.flatnonzero(~blank.to_numpy(zero_copy_only=False))
            columns = [column.take(pa.array(kept)) for column in columns]
            for row in kept.tolist():
                self.numbers.add(number + row)
        elif rows:
            self.numbers.add(number, rows)
        self._store(columns)

    def table(self, form: TableFormat) -> Table:
        """Return the table of all rows."""
        self._flush()
        columns = {name: str(at) for at, name in enumerate(self.names) if self._used[at] or not self.optional[at]}
        cells: Mapping[str, pa.Array]
        if self._writer is None:
            first = self._first or [pa.array([], pa.string())] * len(self.names)
            cells = {name: first[int(at)] for name, at in columns.items()}
        else:
            self._writer.close()
            cells = StoredCells(pq.ParquetFile(self._file, pre_buffer=False), columns)
        pa.default_memory_pool().release_unused()
        return Table(self.path, form, cells, self.numbers)

    def _flush(self) -> None:
        if not self._lines:
            return
        columns = [
            _cells(column, f"{self.path}, column {name!r}", self._line_numbers)
            for name, column in zip(self.names, zip(*self._lines, strict=True), strict=True)
        ]
        for number in self._line_numbers:
            self.numbers.add(number)
        self._lines.clear()
        self._line_numbers.clear()
        self._store(columns)

    def _store(self, columns: list[pa.Array]) -> None:
        if not len(columns[0]):
            return
        for at, column in enumerate(columns):
            self._used[at] = self._used[at] or bool(pc.any(pc.not_equal(column, "")).as_py())
        if self._first is None:
            self._first = columns
            return
        if self._writer is None:
            schema = pa.schema([(str(at), pa.string()) for at in range(len(columns))])
            self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115, closed with the table
            self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")
            self._writer.write_table(pa.table(self._first, schema=schema))
        self._writer.write_table(pa.table(columns, schema=self._writer.schema))


def _column_name(text: str) -> str:
    """Return a name of the header without line breaks and invisible characters."""
    visible = text if text.isascii() else "".join(each for each in text if unicodedata.category(each) != "Cf")
    return " ".join(visible.split())


def _cells(column: Sequence[str], where: str, rows: Sequence[int]) -> pa.Array:
    """Return the cells of a column as `_tidy` does. Raises DataError for a cell without an end."""
    cells = _tidy(pa.array(column, pa.string()))
    if cells is None:
        row = next(row for row, cell in zip(rows, column, strict=True) if len(cell.strip()) > MAX_CELL)
        raise DataError(f"{where}, row {row}: a cell of more than {MAX_CELL:,} characters; is a quote missing?")
    return cells


def _tidy(cells: pa.Array) -> pa.Array | None:
    """Return cells trimmed and with composed accents; None where one of them is too long."""
    cells = pc.utf8_trim_whitespace(cells)
    if (pc.max(pc.utf8_length(cells)).as_py() or 0) > MAX_CELL:
        return None
    return cells if pc.all(pc.string_is_ascii(cells)).as_py() else pc.utf8_normalize(cells, form="NFC")


def plain_columns(text: str, delimiter: str, width: int) -> list[pa.Array] | None:
    """Return the columns of lines that pyarrow reads as Python's csv does, ten times as fast; None for other lines.

    These are lines without a quote or NUL, each with as many cells as the header.
    """
    if '"' in text or "\0" in text or text.count("\r") != text.count("\r\n"):
        return None
    names = [str(at) for at in range(width)]
    try:
        found = pa_csv.read_csv(
            pa.py_buffer(text.encode()),
            pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=4 * len(text) + 1),
            pa_csv.ParseOptions(delimiter=delimiter, quote_char=False, ignore_empty_lines=False),
            pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), check_utf8=False),
        )
    except (pa.ArrowException, UnicodeEncodeError):
        return None
    columns = [_tidy(column.combine_chunks()) for column in found.columns]
    return None if any(column is None for column in columns) else columns


def _blank(line: Sequence[str]) -> bool:
    return not any(map(str.strip, line))


class _CsvFile:
    """The rows of an open CSV, as (number, cells), or its text in blocks of whole lines.

    number: that of the row that was read last.  delimiter: between cells.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file, self._block = path, file, io.StringIO()
        text = file.readline()
        self.number = 0
        if separated := re.match(r'"?sep=(.)"?\r?\n?$', text):
            self.number, self.delimiter = 1, separated[1]
        else:
            while text and not text.strip(",;|\t\r\n "):
                text, self.number = file.readline(), self.number + 1
            self.delimiter = _delimiter(text)
            file.seek(0)
            for _ in range(self.number):
                file.readline()
        self._line = self.number
        self._reader = csv.reader(self._lines(), delimiter=self.delimiter, strict=True)

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        return self

    def __next__(self) -> tuple[int, list[str]]:
        cells = next(self._reader)
        self.number += 1
        return self.number, cells

    def block(self) -> str:
        """Return the next lines, empty at the end of the file."""
        text = self._file.read(_BLOCK)
        return text + self._file.readline() if text else ""

    def skip(self, rows: int) -> None:
        """Count rows that were read out of a block, one in each line."""
        self.number += rows
        self._line += rows

    def rows_of(self, block: str) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows that begin in a block."""
        self._block = io.StringIO(block, newline="")
        while self._block.tell() < len(block) and (row := next(self, None)):
            yield row

    def _lines(self) -> Iterator[str]:
        """Yield the lines, of the block first. Raises DataError for one with a NUL character, which no text has."""
        while line := self._block.readline() or self._file.readline():
            self._line += 1
            if "\0" in line:
                raise DataError(
                    f"{self._path}, line {self._line}: holds NUL characters; it is cut off, damaged or no text; "
                    "copy it again"
                )
            yield line


@contextmanager
def _open_csv(path: Path, encoding: str | None) -> Iterator[_CsvFile]:
    """Context with an open CSV. Raises DataError for a file of another kind, also out of the block."""
    if encoding is not None and not _is_encoding(encoding):
        raise DataError(f"{path}: unknown encoding {encoding!r} (table in task.yaml); write cp1252, utf-8 or another")
    with path.open("rb") as binary:
        start = binary.read(4096)
    if kind := next((what for magic, what in _OTHER_FILES if start.lower().startswith(magic.lower())), None):
        raise DataError(f"{path}: is {kind}")
    given, encoding = encoding, encoding or _encoding(start)
    delimiter = ","
    with path.open(encoding=encoding, newline="") as text:
        try:
            file = _CsvFile(path, text)
            delimiter = file.delimiter
            yield file
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


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Context with an open Parquet file. Raises DataError for a file that is none, also out of the block."""
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({one_line(error, 200)}); write it again") from None


def _as_text(cells: pa.Array, path: Path, name: str) -> pa.Array:
    """Return the cells of a column as a CSV of them has them; whole numbers, which gaps make 3.0, without a point.

    Raises DataError for lists and other types without a text, or a cell that is too long.
    """
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    kind = cells.type
    try:
        if pa.types.is_floating(kind):
            cells = pc.if_else(pc.is_finite(cells), cells, None)
            exact = cells.cast(pa.float64())
            whole = pc.and_(pc.equal(pc.trunc(exact), exact), pc.less(pc.abs(exact), 2.0**53))
            texts = pc.if_else(
                whole, pc.if_else(whole, exact, None).cast(pa.int64()).cast(pa.string()), cells.cast(pa.string())
            )
        else:
            texts = cells.cast(pa.string())
    except pa.ArrowException:
        raise DataError(
            f"{path}, column {name!r}: holds {kind}, which no cell of a table can; write it as text or as columns of "
            "numbers, or leave it out"
        ) from None
    tidy = _tidy(pc.fill_null(texts, ""))
    if tidy is None:
        raise DataError(f"{path}, column {name!r}: a cell of more than {MAX_CELL:,} characters")
    return tidy


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


def parsed_texts(
    texts: pa.Array, parse: Callable[[str], float], span: tuple[float, float] | None, words: Iterable[str]
) -> tuple[np.ndarray, dict[int, str]]:
    """Return the number of each text (N,), NaN where `parse` raises, and what it raised (ValueError or KeyError).

    span: numbers in it are taken as they are, unless they are one of `words` in any case.
    """
    values, errors = np.full(len(texts), np.nan), dict[int, str]()
    if span:
        own = pc.is_in(pc.utf8_lower(texts), pa.array([*map(str.lower, words)], pa.string()))
        values = np.where(own.to_numpy(zero_copy_only=False), np.nan, numbers_in(texts, *span))
    for code in np.flatnonzero(np.isnan(values)).tolist():
        try:
            values[code] = parse(texts[code].as_py())
        except (ValueError, KeyError) as error:
            errors[code] = str(error)
    return values, errors
