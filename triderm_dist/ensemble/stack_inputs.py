"""Build the columns that a stacker reads about each lesion: predictions, concepts, metadata, and optional wide blocks.

Log-probabilities of every head, concepts and metadata mean the same in every row, whichever fold model predicted it.
By option a wide block follows: embeddings of the untouched pretrained tower, or fused features of the networks aligned
to one basis. Shapes: N lesions, F columns, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from triderm_dist.checksums import CheckedParquet, DamagedFile, matrix_of, read_checked_parquet, write_checked_parquet
from triderm_dist.ensemble.alignment import aligned_mean, aligned_rows, load_alignments
from triderm_dist.ensemble.calibration import log_probabilities
from triderm_dist.ensemble.run_files import ALIGNMENTS_FILE
from triderm_dist.predictions import OofTable, Predictions, rows_of
from triderm_dist.schema import DataError

MIN_LOG_PROBABILITY = -20.0
"""Lower bound of log-probabilities, so that columns stay finite; a stacker cannot use smaller ones."""


class EmbeddingTower(NamedTuple):
    """The tower of embeddings.  record: the name of its record in RUN/towers; "" in files of earlier versions."""

    source: str
    record: str


def training_columns(run_folder: Path, extra: str, table: OofTable, models: Sequence[str]) -> np.ndarray:
    """Return the (N, F) columns of the lesions of an out-of-fold table.

    extra: the wide block at the end of each row, one of `stack.extra`, or "" for none. Raises DataError if the block's
    file is missing or belongs to other data.
    """
    columns = base_columns(table, models)
    if not extra:
        return columns
    if extra == "embeddings":
        block, _ = read_embeddings(embeddings_path(run_folder, "train"), table.lesion_ids)
    else:
        block = aligned_rows(table, models, load_alignments(run_folder / ALIGNMENTS_FILE))
    return np.concatenate([columns, block], axis=1)


def prediction_columns(
    run_folder: Path,
    extra: str,
    table: OofTable,
    models: Sequence[str],
    parts: Sequence[Predictions],
    embeddings: np.ndarray | None,
) -> np.ndarray:
    """Return the (N, F) columns of the lesions of a test set, the mean of its `parts`; see `training_columns`.

    embeddings: (N, E) of the lesions; None reads them from the run.
    """
    columns = base_columns(table, models)
    if not extra:
        return columns
    if extra == "features":
        block = aligned_mean(parts, table.lesion_ids, models, load_alignments(run_folder / ALIGNMENTS_FILE))
    elif embeddings is not None:
        block = embeddings
    else:
        block, tower = read_embeddings(embeddings_path(run_folder, "test"), table.lesion_ids)
        if tower != embedding_tower(run_folder):
            raise DataError(
                f"{run_folder}: the embeddings of the test set and of training are by two towers; run triderm embed "
                "again"
            )
    return np.concatenate([columns, block], axis=1)


def check_refit(extra: str) -> None:
    """Raise DataError where refitted networks cannot replace those of the folds for a stacker with this wide block."""
    if extra == "features":
        raise DataError(
            "networks=refit: the stacker takes fused features (stack.extra), and those of a refitted network are "
            "aligned to no fold's; predict with networks=folds, or run triderm stack without features"
        )


def base_columns(table: OofTable, models: Sequence[str] | None = None) -> np.ndarray:
    """Return (N, F) float32 columns without a wide block: log-probabilities of every output of every model, concepts,
    metadata. Their names are `column_names`.
    """
    columns = np.empty((len(table), len(column_names(table, models))), np.float32)
    done = 0
    for model in table.models if models is None else models:
        for output in _outputs(table):
            block = log_probabilities(getattr(table, output)[model], table.heads[model])
            columns[:, done : done + block.shape[1]] = np.maximum(block, MIN_LOG_PROBABILITY)
            done += block.shape[1]
    columns[:, done:] = np.concatenate([table.concepts, table.metadata], axis=1)
    return columns


def column_names(table: OofTable, models: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the F names of `base_columns`, such as MODEL/logit/DIAGNOSIS, concept/CONCEPT, metadata/FIELD."""
    names = [
        f"{model}/{output.removesuffix('s')}/{diagnosis}"
        for model in (table.models if models is None else models)
        for output in _outputs(table)
        for diagnosis in table.diagnoses
    ]
    names += [f"concept/{name}" for name in table.concept_names]
    names += [f"metadata/{name}" for name in table.task.field_names]
    return tuple(names)


def _outputs(table: OofTable) -> tuple[str, ...]:
    """Return the outputs of a network that the stacker reads: those of the main head, and of the head of each view.

    With one view, its head sees nothing that the main head does not see.
    """
    views = table.task.view_names
    return ("logits", *(f"aux_{view}" for view in views if len(views) > 1))


def embeddings_path(run_folder: Path, split: str) -> Path:
    """Return where triderm embed writes the embeddings of a split, `train` or `test`."""
    return run_folder / f"embeddings.{split}.parquet"


def write_embeddings(path: Path, lesion_ids: Sequence[str], values: np.ndarray, tower: EmbeddingTower) -> None:
    """Write (N, E) embeddings of lesions by a tower, atomically."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
    lists = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    table = pa.table({"lesion_id": pa.array(list(lesion_ids), pa.string()), "columns": lists})
    write_checked_parquet(path, table, {b"tower": tower.source.encode(), b"record": tower.record.encode()})


def embedding_tower(run_folder: Path) -> EmbeddingTower:
    """Return the tower of a run's embeddings, which are not read. Raises DataError if it has none."""
    path = embeddings_path(run_folder, "train")
    with _embedding_errors(path):
        return _tower_of(CheckedParquet(path).metadata)


def read_embeddings(path: Path, lesion_ids: Sequence[str] | np.ndarray) -> tuple[np.ndarray, EmbeddingTower]:
    """Return ((N, E) float32 in the order of `lesion_ids`, tower).

    Raises DataError naming the file, or a lesion that it lacks.
    """
    with _embedding_errors(path):
        table = read_checked_parquet(path, kinds={"lesion_id": "text", "columns": "lists"})
        rows = rows_of(lesion_ids, table["lesion_id"].to_pylist())
        values, tower = matrix_of(table, "columns"), _tower_of(table.schema.metadata or {})
    if (absent := np.flatnonzero(rows < 0)).size:
        raise DataError(f"{path}: has no lesion {lesion_ids[absent[0]]}; run triderm embed again")
    return np.asarray(values[rows], np.float32), tower


def _tower_of(metadata: Mapping[bytes, bytes]) -> EmbeddingTower:
    return EmbeddingTower(metadata[b"tower"].decode(), metadata.get(b"record", b"").decode())


@contextmanager
def _embedding_errors(path: Path) -> Iterator[None]:
    """Raise DataError naming the file for errors of reading it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run triderm embed first") from None
    except DamagedFile as error:
        raise DataError(f"{path}: {error}; delete it and run triderm embed again") from None
    except (KeyError, UnicodeDecodeError):
        raise DataError(f"{path}: not a file of embeddings; run triderm embed again") from None
