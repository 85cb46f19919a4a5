"""What the stacker reads: columns that mean the same in every row, in memory or streamed from a parquet file.

Log-probabilities of every head, concepts and metadata always; by option embeddings of an untouched pretrained tower, or
fused features turned into one basis (`triderm_dist.align`). Both are wide, and are reduced inside the fold.
Shapes: N lesions, F columns, C diagnoses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from triderm_dist.calibration import log_probabilities
from triderm_dist.files import whole
from triderm_dist.predictions import OofTable
from triderm_dist.schema import METADATA_FIELDS, DataError

LEAST_LOG = -20.0
"""Log-probabilities are cut here: a tree can't use more, and infinities stay out of the columns."""

BATCH = 65_536
"""Rows of a parquet batch."""


_HEADS = ("logits", "aux_clinical", "aux_dermoscopic")


def column_names(table: OofTable, models: Sequence[str] | None = None) -> tuple[str, ...]:
    """F names of the columns of `stack_features`."""
    names = [
        f"{model}/{head.removesuffix('s')}/{diagnosis}"
        for model in (table.models if models is None else models)
        for head in _HEADS
        for diagnosis in table.diagnoses
    ]
    names += [f"concept/{name}" for name in table.concept_names] + [f"metadata/{name}" for name in METADATA_FIELDS]
    return tuple(names)


def stack_features(table: OofTable, models: Sequence[str] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """(N, F) float32 columns and their names: log-probabilities of every head of every model, concepts, metadata."""
    columns = [
        np.maximum(log_probabilities(getattr(table, head)[model], table.heads[model]), LEAST_LOG)
        for model in (table.models if models is None else models)
        for head in _HEADS
    ]
    return np.concatenate([*columns, table.concepts, table.metadata], axis=1).astype(np.float32), column_names(
        table, models
    )


def embeddings_path(run_folder: Path, split: str) -> Path:
    """Where launch.embed leaves those of a split, `train` or `test`."""
    return run_folder / f"embeddings.{split}.parquet"


def write_embeddings(path: Path, lesion_ids: Sequence[str], values: np.ndarray, source: str) -> None:
    """Write (N, E) embeddings of lesions by the tower `source`; whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
    lists = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    table = pa.table({"lesion_id": pa.array(list(lesion_ids), pa.string()), "columns": lists})
    with whole(path) as beside:
        pq.write_table(table.replace_schema_metadata({b"tower": source}), beside, compression="zstd")


def read_embeddings(path: Path, lesion_ids: np.ndarray) -> tuple[np.ndarray, str]:
    """((N, E) float32 in the order of `lesion_ids`, tower). Raises DataError naming the file, or a lesion it lacks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        place = {lesion: row for row, lesion in enumerate(table["lesion_id"].to_pylist())}
        values = table["columns"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        source = (table.schema.metadata or {})[b"tower"].decode()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run launch.embed first") from None
    except (OSError, pa.ArrowException, KeyError):
        raise DataError(f"{path}: not a file of embeddings; run launch.embed again") from None
    if absent := [lesion for lesion in lesion_ids if lesion not in place]:
        raise DataError(f"{path}: has no lesion {absent[0]}; run launch.embed again")
    return np.asarray(values[[place[lesion] for lesion in lesion_ids]], np.float32), source


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
            raise DataError(f"{self.path}: not a file of the stacker's columns; run launch.stack again") from None

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

        with whole(path) as beside:
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
