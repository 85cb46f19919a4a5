"""Read tables in CSV (any usual delimiter and encoding), Excel (.xlsx) and Parquet files.

A cell is text without surrounding whitespace. Rows are numbered as in a spreadsheet: the header is row 1. Parquet
files have no header row; their first data row is row 1.
"""

from __future__ import annotations

import bisect
import csv
import gc
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from triderm_dist.data.readers.cells import MAX_CELL, is_blank, tidy
from triderm_dist.data.readers.csv_file import open_csv, plain_columns
from triderm_dist.data.readers.parquet_file import as_text, open_parquet
from triderm_dist.data.readers.workbook import sheet_rows
from triderm_dist.runtime.messages import nearest, one_line, quoted
from triderm_dist.schema import DataError, TableFormat

DEFAULT_FORMAT = TableFormat()
SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".parquet")
_SKIPPED_PREFIXES = ("~$", ".")
_NAME_OF_COPY = re.compile(
    r"(?:(?:copy of|kopie von|copie de|copia de) )?(?P<stem>.+?)(?:(?: -)? (?:copy|kopie|copie|copia))?(?: ?\(\d+\))?",
    re.IGNORECASE,
)
"""File names that programs give to a second copy of a file, in English, German, French, Spanish and Italian."""
_ROWS_PER_CHUNK = 1 << 16
"""Rows kept as Python objects before they are converted to columns, which take a tenth of the memory."""
_IN_MEMORY = 1 << 24
"""Bytes of a table's columns that are kept in memory; larger tables are written to a temporary file."""


class RowNumbers(Sequence[int]):
    """The spreadsheet row number of each row of a table, stored as runs of consecutive numbers."""

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
    """The columns of a large table, stored in a temporary Parquet file to save memory.

    columns: {name in the table: name in the Parquet file}.
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

    def named(self, names: Mapping[str, Sequence[str]]) -> StoredCells:
        """Return the same columns under other names. names: the new ones of each column."""
        return StoredCells(self._file, {new: self._columns[name] for name, own in names.items() for new in own})

    def parts(self, names: Sequence[str]) -> Iterator[list[pa.Array]]:
        """Yield these columns, one row group of the Parquet file at a time."""
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

    def find(self, *names: str | None) -> str | None:
        """Return the first of these columns that the table has, as `find_column`."""
        return find_column(self.cells, *names)

    def named(self, known: Iterable[str]) -> Table:
        """Return the same table; columns that differ from a name in `known` by case only are renamed to it.

        A column has each of several such names.
        """
        spellings: dict[str, list[str]] = {}
        for name in dict.fromkeys(known):
            spellings.setdefault(name.lower(), []).append(name)
        names = {name: spellings.get(name.lower(), [name]) for name in self.cells}
        if isinstance(self.cells, StoredCells):
            return replace(self, cells=self.cells.named(names))
        return replace(self, cells={new: self.cells[name] for name, own in names.items() for new in own})

    def require(self, names: Iterable[str], advice: str = "") -> None:
        """Raise DataError for the first of these columns that the table lacks."""
        for name in names:
            if name not in self.cells:
                near = nearest(name, self.cells)
                hint = f"; is {near!r} meant?" if near else ""
                raise DataError(f"{self.path}: column {name!r} is missing from the header{hint}{advice}")

    def parts(self, *names: str) -> Iterator[list[pa.Array]]:
        """Yield these columns in consecutive parts, so that a large table is never in memory as a whole."""
        if isinstance(self.cells, StoredCells):
            yield from self.cells.parts(names)
        elif len(self):
            yield [self.cells[name] for name in names]

    def encoded(self, name: str) -> tuple[np.ndarray, pa.Array]:
        """Return the code of each row's text (N,) and the distinct texts, in the order of their first appearance."""
        column = pa.chunked_array([cells for (cells,) in self.parts(name)], pa.string()).dictionary_encode()
        codes = [chunk.indices.to_numpy() for chunk in column.chunks]
        names = column.chunk(0).dictionary if codes else pa.array([], pa.string())
        pa.default_memory_pool().release_unused()
        return np.concatenate(codes or [np.empty(0, np.int32)]), names

    def rows(self, chosen: np.ndarray | None = None) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield ("FILE, row NUMBER", {column: cell}) of every row, or of those where `chosen` (N,) is true."""
        start = 0
        for columns in self.parts(*self.cells):
            rows = np.arange(start, start + len(columns[0]))
            start += len(rows)
            if chosen is not None:
                rows = rows[chosen[rows]]
                columns = [column.take(pa.array(rows - (start - len(column)))) for column in columns]
            for at, cells in enumerate(zip(*(column.to_pylist() for column in columns), strict=True)):
                yield self.where(int(rows[at])), dict(zip(self.cells, cells, strict=True))


def find_column(header: Iterable[str], *names: str | None) -> str | None:
    """Return the first of these names that is in the header, ignoring case, as the header spells it; None for none."""
    wanted = [name.lower() for name in names if name]
    return next((column for name in wanted for column in header if column.lower() == name), None)


def find_tables(folder: Path) -> list[Path]:
    """Return the tables in a folder and its direct subfolders, sorted.

    Lock files and hidden files are skipped, and so are copies (`a (1).csv`) of a table that exists.
    """
    found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES]
    found = [path for path in found if not path.name.startswith(_SKIPPED_PREFIXES)]
    existing = {str(path).lower() for path in found}

    def is_copy(path: Path) -> bool:
        stem = _NAME_OF_COPY.fullmatch(path.stem)["stem"]  # type: ignore[index]
        return stem != path.stem and str(path.with_stem(stem)).lower() in existing

    return sorted(path for path in found if not is_copy(path))


def read_table(path: Path, form: TableFormat = DEFAULT_FORMAT) -> Table:
    """Read a table without its blank rows and its blank unnamed columns. Raises DataError for other files."""
    try:
        with without_garbage_collection():
            return _read_columns(path, form)
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table ({one_line(error)})") from None


def read_header(path: Path, form: TableFormat = DEFAULT_FORMAT) -> list[str]:
    """Read only the header, the first row that is not blank. Raises DataError as `read_table`."""
    try:
        return next(([_column_name(name) for name in line] for _, line in _rows(path, form) if not is_blank(line)), [])
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table ({one_line(error)})") from None


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable the cyclic garbage collector in the block: its passes over millions of rows free nothing."""
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
        yield from sheet_rows(path, form.sheet)
    elif path.suffix.lower() == ".parquet":
        with open_parquet(path) as parquet:
            yield 0, parquet.schema_arrow.names
    else:
        with open_csv(path, form.encoding) as file:
            yield from file


def _read_columns(path: Path, form: TableFormat) -> Table:
    """Read all rows into columns; the first row that is not blank is the header."""
    if path.suffix.lower() == ".xlsx":
        lines = sheet_rows(path, form.sheet)
        columns = _begin_columns(path, lines)
        for number, line in lines:
            columns.add_line(number, line)
    elif path.suffix.lower() == ".parquet":
        with open_parquet(path) as parquet:
            names = parquet.schema_arrow.names
            columns, number = _begin_columns(path, iter([(0, names)])), 1
            for batch in parquet.iter_batches(_ROWS_PER_CHUNK, use_threads=False):
                parts = [as_text(cells, path, name) for cells, name in zip(batch.columns, names, strict=True)]
                columns.add_part(number, parts[: len(columns.names)])
                number += len(batch)
    else:
        with open_csv(path, form.encoding) as file:
            columns = _begin_columns(path, file)
            while text := file.block():
                if (part := plain_columns(text, file.delimiter, len(columns.names))) is not None:
                    columns.add_part(file.number + 1, part)
                    file.skip(len(part[0]))
                else:
                    for number, line in file.rows_of(text):
                        columns.add_line(number, line)
    return columns.table(form)


def _begin_columns(path: Path, lines: Iterator[tuple[int, list[str]]]) -> _ColumnBuilder:
    """Read the header and return a builder without rows.

    Raises DataError for an empty file, or a name that appears twice.
    """
    first = next(((number, line) for number, line in lines if not is_blank(line)), None)
    if first is None:
        raise DataError(f"{path}: the file is empty")
    header = [_column_name(name) for name in first[1]]
    while header and not header[-1]:
        header.pop()
    names = [name or f"(column {number})" for number, name in enumerate(header, 1)]
    if duplicates := [name for name, count in Counter(map(str.lower, names)).items() if count > 1]:
        name = next(name for name in names if name.lower() == duplicates[0])
        raise DataError(f"{path}: column {name!r} appears twice in the header; remove one")
    return _ColumnBuilder(path, names, [not name for name in header], first[0])


class _ColumnBuilder:
    """Collects rows into columns.

    names, optional: of each column; an optional one is dropped if all its cells are empty.  header_row: its number.
    """

    def __init__(self, path: Path, names: Sequence[str], optional: Sequence[bool], header_row: int) -> None:
        self.path, self.names, self.optional, self.header_row = path, names, optional, header_row
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
        elif is_blank(line):
            return
        elif len(line) < width or not is_blank(line[width:]):
            begun = len(self.numbers) or self._lines
            above = (
                "" if begun else f" (row {self.header_row}: {quoted(', '.join(self.names))}); remove what is above it"
            )
            raise DataError(f"{self.path}, row {number}: {len(line)} cells, the header has {width}{above}")
        self._lines.append(line[:width])
        self._line_numbers.append(number)
        if len(self._lines) == _ROWS_PER_CHUNK:
            self._flush()

    def add_part(self, number: int, columns: list[pa.Array]) -> None:
        """Append rows that are numbered consecutively from `number`, without blank ones."""
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
            _to_array(column, f"{self.path}, column {name!r}", self._line_numbers)
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
    """Return a column name without line breaks and invisible characters."""
    visible = text if text.isascii() else "".join(each for each in text if unicodedata.category(each) != "Cf")
    return " ".join(visible.split())


def _to_array(column: Sequence[str], where: str, rows: Sequence[int]) -> pa.Array:
    """Return the cells of a column after `tidy`. Raises DataError for a cell that is too long."""
    cells = tidy(pa.array(column, pa.string()))
    if cells is None:
        row = next(row for row, cell in zip(rows, column, strict=True) if len(cell.strip()) > MAX_CELL)
        raise DataError(f"{where}, row {row}: a cell of more than {MAX_CELL:,} characters; is a quote missing?")
    return cells
