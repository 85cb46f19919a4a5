"""Read Parquet files as text, as a CSV of them would be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from triderm_dist.data.readers.cells import MAX_CELL, tidy
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import DataError


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file as a context manager. Raises DataError for other files, also on errors in the block."""
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({one_line(error, 200)}); write it again") from None


def as_text(cells: pa.Array, path: Path, name: str) -> pa.Array:
    """Return the cells of a column as a CSV would hold them.

    Whole numbers have no decimal point, although pandas stores integers with gaps as floats.
    Raises DataError for lists and other types that have no text, or for a cell that is too long.
    """
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    kind = cells.type
    try:
        if pa.types.is_floating(kind):
            cells = pc.if_else(pc.is_nan(cells), None, cells)
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
    trimmed = tidy(pc.fill_null(texts, ""))
    if trimmed is None:
        raise DataError(f"{path}, column {name!r}: a cell of more than {MAX_CELL:,} characters")
    return trimmed
