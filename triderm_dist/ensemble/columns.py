"""A stacker's columns in memory, or in a parquet file that is read in batches if they do not fit.

Shapes: N rows, F columns, n rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from triderm_dist.files import PATIENT_DATA, atomic_path
from triderm_dist.schema import DataError

BATCH = 65_536
"""Rows of a batch, and of a row group of the parquet file."""


class ColumnFile:
    """(N, F) float32 columns in a parquet file. Raises DataError for a file that was not written by `write`."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = Path(path)
        try:
            file = pq.ParquetFile(self.path)
            self.shape = (file.metadata.num_rows, file.schema_arrow.field("columns").type.list_size)
        except (OSError, pa.ArrowException, KeyError, AttributeError):
            raise DataError(f"{self.path}: not a file of the stacker's columns; run triderm stack again") from None

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index of the first row, (n, F) float32), in order."""
        import pyarrow.parquet as pq

        first = 0
        for batch in pq.ParquetFile(self.path, pre_buffer=False).iter_batches(BATCH):
            # Not `flatten`, which skips null rows; no row is null.
            values = batch.column("columns").values.to_numpy(zero_copy_only=False)
            rows = np.asarray(values, np.float32).reshape(-1, self.shape[1])
            yield first, rows
            first += len(rows)

    @staticmethod
    def write(path: Path, batches: Iterable[np.ndarray]) -> ColumnFile:
        """Write (n, F) batches one after the other, NaN where missing, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic_path(path, PATIENT_DATA) as temporary:
            writer = None
            for batch in batches:
                flat = pa.array(np.ascontiguousarray(batch, np.float32).ravel(), from_pandas=False)
                table = pa.table({"columns": pa.FixedSizeListArray.from_arrays(flat, batch.shape[1])})
                if writer is None:
                    writer = pq.ParquetWriter(temporary, table.schema, compression="zstd", use_dictionary=False)
                writer.write_table(table, row_group_size=BATCH)
            if writer is None:
                raise DataError(f"{path}: there are no rows to write")
            writer.close()
        return ColumnFile(path)


Columns = np.ndarray | ColumnFile
"""(N, F) columns, in memory or in a file."""


def batches_of(columns: Columns, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices (n,), columns (n, F)) of `rows` (ascending indices): one batch in memory, several from a file."""
    if isinstance(columns, np.ndarray):
        yield rows, columns[rows]
        return
    for first, batch in columns.batches():
        start, end = np.searchsorted(rows, (first, first + len(batch)))
        if start < end:
            yield rows[start:end], batch[rows[start:end] - first]
