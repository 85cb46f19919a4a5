"""The values of each metadata field among the lesions that a run was trained on.

They are those in the out-of-fold table. An export, which has no table of lesions, holds them as field_values.json: the
smallest and the largest number, and all categories that occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from triderm_dist.checksums import DamagedFile, read_checked_json, write_checked_json
from triderm_dist.ensemble.run_files import OOF_FILE
from triderm_dist.schema import MetadataField

VALUES_FILE = "field_values.json"


def read_seen(folder: Path, fields: Sequence[MetadataField]) -> list[np.ndarray | None]:
    """Return the different values of each field in ascending order; None if the run does not record them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if (folder / VALUES_FILE).exists():
            recorded = read_checked_json(folder / VALUES_FILE)
            known = [np.array(recorded.get(field.name, []), np.float64) for field in fields]
        else:
            column = pq.read_table(folder / OOF_FILE, columns=["metadata"])["metadata"].combine_chunks()
            values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
            known = [np.unique(each[~np.isnan(each)]) for each in values.T]
    except (OSError, ValueError, KeyError, TypeError, DamagedFile, pa.ArrowException):
        return [None] * len(fields)
    return [each if len(each) else None for each in known]


def write_seen(folder: Path, fields: Sequence[MetadataField], seen: Sequence[np.ndarray | None]) -> None:
    """Write FOLDER/field_values.json."""
    values = {
        field.name: [each.min().item(), each.max().item()] if field.is_number else each.tolist()
        for field, each in zip(fields, seen, strict=True)
        if each is not None
    }
    write_checked_json(folder / VALUES_FILE, values)
