"""Columns that the stacker is fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from triderm_dist.ensemble.alignment import load_turns, turned_mean, turned_rows
from triderm_dist.ensemble.calibration import log_probabilities
from triderm_dist.ensemble.run_files import TURNS_FILE
from triderm_dist.files import atomic_path
from triderm_dist.predictions import NO_FOLD, OofTable, Predictions
from triderm_dist.schema import DataError


def stacker_columns(
    run_folder: Path,
    extra: str,
    table: OofTable,
    models: Sequence[str],
    parts: Sequence[Predictions] = (),
) -> np.ndarray:
    """(N, F) what a stacker reads about the lesions of an out-of-fold table, or of a test set with its `parts`.

    extra: the block at the end of each row, one of `stack.extra`, or "" for none.
    """
    columns = stack_features(table, models)[0]
    test = bool((table.folds == NO_FOLD).all())
    if extra == "embeddings":
        block, tower = read_embeddings(embeddings_path(run_folder, "test" if test else "train"), table.lesion_ids)
        if test and tower != (other := read_embeddings(embeddings_path(run_folder, "train"), np.empty(0))[1]):
            raise DataError(f"{run_folder}: embeddings of the test set are by {tower}, of training by {other}")
    elif extra == "features":
        turns = load_turns(run_folder / TURNS_FILE)
        block = turned_mean(parts, table.lesion_ids, models, turns) if test else turned_rows(table, models, turns)
    else:
        return columns
    return np.concatenate([columns, block], axis=1)


LEAST_LOG = -20.0
"""Log-probabilities are cut here: a tree can't use more, and infinities stay out of the columns."""
_HEADS = ("logits", "aux_clinical", "aux_dermoscopic")


def column_names(table: OofTable, models: Sequence[str] | None = None) -> tuple[str, ...]:
    """F names of the columns of `stack_features`."""
    names = [
        f"{model}/{head.removesuffix('s')}/{diagnosis}"
        for model in (table.models if models is None else models)
        for head in _HEADS
        for diagnosis in table.diagnoses
    ]
    names += [f"concept/{name}" for name in table.concept_names]
    names += [f"metadata/{name}" for name in table.metadata_fields]
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
    """Where triderm embed leaves those of a split, `train` or `test`."""
    return run_folder / f"embeddings.{split}.parquet"


def write_embeddings(path: Path, lesion_ids: Sequence[str], values: np.ndarray, source: str) -> None:
    """Write (N, E) embeddings of lesions by the tower `source`; whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
    lists = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    table = pa.table({"lesion_id": pa.array(list(lesion_ids), pa.string()), "columns": lists})
    with atomic_path(path) as beside:
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
        raise DataError(f"{path}: no such file; run triderm embed first") from None
    except (OSError, pa.ArrowException, KeyError):
        raise DataError(f"{path}: not a file of embeddings; run triderm embed again") from None
    if absent := [lesion for lesion in lesion_ids if lesion not in place]:
        raise DataError(f"{path}: has no lesion {absent[0]}; run triderm embed again")
    return np.asarray(values[[place[lesion] for lesion in lesion_ids]], np.float32), source
