"""What the stacker reads: columns that mean the same in every row, in memory or streamed from a parquet file.

Log-probabilities of every head, concepts and metadata always; by option embeddings of an untouched pretrained tower, or
fused features turned into one basis (`triderm_dist.align`). Both are wide, and are reduced inside the fold.
Shapes: N lesions, F columns, C diagnoses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from triderm_dist.files import atomic_path
from triderm_dist.schema import DataError

BATCH = 65_536
"""Rows of a parquet batch."""


class ColumnFile:
    """(N, F) float32 columns in a parquet file, read batch by batch: what does not fit in memory."""

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
        """(number of the first row, (n, F) float32), in order."""
        import pyarrow.parquet as pq

        first = 0
        for batch in pq.ParquetFile(self.path).iter_batches(BATCH):
            # Not `flatten`, which leaves out rows that are null: there are none here.
            values = batch.column("columns").values.to_numpy(zero_copy_only=False)
            rows = np.asarray(values, np.float32).reshape(-1, self.shape[1])
            yield first, rows
            first += len(rows)

    @staticmethod
    def write(path: Path, batches: Iterable[np.ndarray]) -> ColumnFile:
        """Write (n, F) batches one after the other, NaN where missing; whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic_path(path) as beside:
            writer = None
            for batch in batches:
                flat = pa.array(np.ascontiguousarray(batch, np.float32).ravel(), from_pandas=False)
                table = pa.table({"columns": pa.FixedSizeListArray.from_arrays(flat, batch.shape[1])})
                if writer is None:
                    writer = pq.ParquetWriter(beside, table.schema, compression="zstd", use_dictionary=False)
                writer.write_table(table, row_group_size=BATCH)
            if writer is None:
                raise DataError(f"{path}: there is no row to write")
            writer.close()
        return ColumnFile(path)


Columns = np.ndarray | ColumnFile
"""(N, F) columns, wherever they are."""


def batches_of(columns: Columns, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices (n,), columns (n, F)) of `rows` (ascending indices): all at once in memory, in batches from a file."""
    if isinstance(columns, np.ndarray):
        yield rows, columns[rows]
        return
    for first, batch in columns.batches():
        start, end = np.searchsorted(rows, (first, first + len(batch)))
        if start < end:
            yield rows[start:end], batch[rows[start:end] - first]
