"""Read CSV files with any usual delimiter and encoding."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.csv as pa_csv

from triderm_dist.data.readers.cells import tidy
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import DataError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_BLOCK = 1 << 22
"""Characters of a CSV that are read at a time."""
_OTHER_FILES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "an Excel workbook or a zip; name it .xlsx if it is a workbook"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook of the old kind (.xls); save it as .xlsx or CSV"),
    (b"PAR1", "a Parquet file; name it .parquet"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"version https://git-lfs", "a pointer of Git LFS instead of the file; run git lfs pull"),
    (b"<!DOCTYPE", "a web page; download the file itself"),
    (b"<html", "a web page; download the file itself"),
)
"""First bytes of other kinds of files, with what they are and what to do."""


class NotUtf8(DataError):
    """A text file that is in neither UTF-8 nor UTF-16."""


def plain_columns(text: str, delimiter: str, width: int) -> list[pa.Array] | None:
    """Return the columns of lines that need no quoting rules, parsed by pyarrow; None for other lines.

    Such lines hold no quote or NUL and as many cells as the header. The result equals that of Python's csv module, ten
    times as fast.
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
    columns = [tidy(column.combine_chunks()) for column in found.columns]
    return None if any(column is None for column in columns) else columns


class CsvFile:
    """An open CSV file: iterates over (row number, cells), or returns its text in blocks of complete lines.

    number: of the row that was read last.  delimiter: between cells.
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
        """Advance the row number by rows that the caller parsed from a block, one row per line."""
        self.number += rows
        self._line += rows

    def rows_of(self, block: str) -> Iterator[tuple[int, list[str]]]:
        """Yield (row number, cells) of the rows that begin in a block."""
        self._block = io.StringIO(block, newline="")
        while self._block.tell() < len(block) and (row := next(self, None)):
            yield row

    def _lines(self) -> Iterator[str]:
        """Yield the lines of the block, then those of the file. Raises DataError for a line with a NUL character."""
        while line := self._block.readline() or self._file.readline():
            self._line += 1
            if "\0" in line:
                raise DataError(
                    f"{self._path}, line {self._line}: holds NUL characters; it is cut off, damaged or no text; "
                    "copy it again"
                )
            yield line


@contextmanager
def open_csv(path: Path, encoding: str | None) -> Iterator[CsvFile]:
    """Open a CSV file as a context manager.

    Raises DataError for a file of another kind, or for text in the block that cannot be decoded or split.
    """
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
            file = CsvFile(path, text)
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
    """Return whether Python knows the encoding, and it is one of text: not `hex`, for example."""
    try:
        "".encode(name)
    except LookupError:
        return False
    return True


def _encoding(start: bytes) -> str:
    """Return the encoding of a text file from its byte order mark or its zero bytes; else UTF-8."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if start[first:200:2].count(0) > len(start[first:200:2]) // 2:
            return encoding
    return "utf-8-sig"


def _delimiter(header: str) -> str:
    """Return the delimiter that splits the header into the most cells; a comma if none splits it."""
    return max(DELIMITERS, key=lambda each: len(next(csv.reader([header], delimiter=each), [])))
