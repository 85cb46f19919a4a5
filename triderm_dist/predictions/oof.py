"""The out-of-fold table: gathered from prediction files, written and read; and the same table of a test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.checksums import checked_parquet_rows
from triderm_dist.predictions.files import LISTS, OUTPUTS, PredictionFile, as_lists, file_header, group_rows
from triderm_dist.predictions.gathering import DataSplit, Gathered, mismatch
from triderm_dist.predictions.rows import NO_FOLD, OUT_OF_FOLD, OofTable, Predictions, rows_of, single
from triderm_dist.schema import DataError

PARTS = (25, 50)
"""Percent of the training lesions of a fold that the learning curve trains on, besides all."""


def find_predictions(run_folder: Path, models: Sequence[str] | None = None) -> list[Path]:
    """Return the files MODEL/fold-K/predictions.parquet of a run, sorted; `models` None takes all models."""
    found = sorted(Path(run_folder).glob("*/fold-*/predictions.parquet"))
    return [path for path in found if models is None or path.parent.parent.name in models]


def gather(source: Path | str | Iterable[Path], models: Sequence[str] | None, data: DataSplit) -> OofTable:
    """Merge the prediction files of a run folder (or of a list of files, in any order) into the out-of-fold table.

    The table has the lesions of the data in their order; a missing file leaves NaN. `models` None takes all models that
    are found.

    Raises DataError for a wrong format or version, a test file, an unexpected lesion or model, a lesion predicted twice
    by a model, a label, a fold or a task that differs from the data's, a group in two folds, and weights that predict
    two folds (they were trained on one of them).
    """
    return Gathered(_open_files(source, models), models, data).table()


def write_gathered(
    path: Path, source: Path | str | Iterable[Path], models: Sequence[str] | None, data: DataSplit
) -> None:
    """Write the out-of-fold table that `gather` returns, without holding the outputs of more than a row group of it."""
    gathered = Gathered(_open_files(source, models), models, data)
    _write_oof(path, gathered.scalars, gathered.chunks)


def _open_files(source: Path | str | Iterable[Path], models: Sequence[str] | None) -> list[PredictionFile]:
    if isinstance(source, str | Path):
        paths = find_predictions(Path(source), models)
        if not paths:
            raise DataError(f"{source}: no MODEL/fold-K/predictions.parquet in this folder; run triderm crossval first")
    else:
        paths = [Path(path) for path in source]
    if not paths:
        raise DataError("no prediction files to gather; run triderm crossval first")
    return [PredictionFile(path) for path in paths]


def part_folder(run_folder: Path, model: str, percent: int, fold: int) -> Path:
    """Return the folder of a fold that was trained on a part of its lesions for the learning curve."""
    return run_folder / "learning_curve" / model / f"{percent}-percent" / f"fold-{fold}"


def gather_part(run_folder: Path, model: str, percent: int, full: OofTable) -> OofTable | None:
    """Merge the held-out predictions of folds that were trained on a part of their lesions.

    full: the out-of-fold table of the run. None where not all folds are trained, or not on those lesions.
    """
    paths = [part_folder(run_folder, model, percent, fold) / "predictions.parquet" for fold in np.unique(full.folds)]
    if not all(path.exists() for path in paths):
        return None
    table = gather(paths, [model], DataSplit(full.lesion_ids, full.labels, full.folds, full.task))
    return table if table.complete().all() else None


def write_oof(path: Path, table: OofTable) -> None:
    """Write the table as parquet, atomically: one row per lesion and model, NaN without a prediction."""

    def chunks(model: str) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        outputs = {key: getattr(table, key)[model] for key in OUTPUTS}
        size = group_rows(outputs["features"].shape[1])
        for start in range(0, len(table), size):
            yield start, {key: values[start : start + size] for key, values in outputs.items()}

    _write_oof(path, table, chunks)


def _write_oof(
    path: Path, table: OofTable, chunks: Callable[[str], Iterator[tuple[int, dict[str, np.ndarray]]]]
) -> None:
    """Write the out-of-fold table. chunks: yields (first row, outputs) of a model, which are not taken of `table`."""
    import pyarrow as pa

    header = file_header(table, OUT_OF_FOLD, {})
    with checked_parquet_rows(Path(path)) as file:
        for name in table.models:
            for start, outputs in chunks(name):
                part = slice(start, start + len(outputs["logits"]))
                rows = len(outputs["logits"])
                columns: dict[str, Any] = {
                    "lesion_id": pa.array(table.lesion_ids[part], pa.string()),
                    "group": pa.array(table.groups[part], pa.string()),
                    "fold": pa.array(table.folds[part], pa.int64()),
                    "model": pa.repeat(pa.scalar(name, pa.string()), rows),
                    "model_hash": pa.array(table.hashes[name][part], pa.string()),
                    "head": pa.repeat(pa.scalar(table.heads[name], pa.string()), rows),
                    "label": pa.array(table.labels[part], pa.int64()),
                }
                outputs |= {"concepts": table.concepts[part], "metadata": table.metadata[part]}
                columns |= {key: as_lists(outputs[key]) for key in LISTS}
                file.write(pa.table(columns).replace_schema_metadata(header))


def read_oof(path: Path, features: bool = False) -> OofTable:
    """Read what `write_oof` wrote; see `OofFile`."""
    return OofFile(path).table(features)


class OofFile:
    """An out-of-fold table in a file, which is checked when it is opened.

    scalars: the table without outputs. A group has the first id of its lesions as its name, so that nothing depends on
    the names in the file: hashes of patient ids under another salt give the same stacker. Raises DataError naming the
    file, also for leaks (`gather`).
    """

    def __init__(self, path: Path) -> None:
        file = PredictionFile(path)
        if file.split != OUT_OF_FOLD:
            raise DataError(f"{path}: holds {file.split} predictions, expected the out-of-fold table")
        if not file.rows:
            raise DataError(f"{path}: has no rows; run triderm crossval first")
        self.path, self._gathered = path, Gathered([file], None, None)
        scalars = self._gathered.scalars
        self.scalars = replace(scalars, groups=_named_by_lesion(scalars.groups, scalars.lesion_ids))
        self._gathered.scalars = self.scalars

    def table(
        self, features: bool = False, lesion_ids: Sequence[str] | None = None, logits_only: bool = False
    ) -> OofTable:
        """Read the table without the wide fused features, which are then (N, 0), unless asked for; or only the logits.

        lesion_ids: of these lesions only, in this order. Raises DataError naming the file for a lesion that it lacks.
        """
        keys = OUTPUTS[:1] if logits_only else OUTPUTS if features else OUTPUTS[:3]
        if lesion_ids is None:
            return self._gathered.table(keys)
        rows = rows_of(lesion_ids, self.scalars.lesion_ids)
        if (absent := np.flatnonzero(rows < 0)).size:
            raise DataError(f"{self.path}: has no lesion {lesion_ids[absent[0]]}; run triderm crossval again")
        return self._gathered.table(keys, rows)


def _named_by_lesion(groups: np.ndarray, lesion_ids: np.ndarray) -> np.ndarray:
    """Return the first id, in alphabetical order, of the lesions in each lesion's group, (N,) text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    codes = pa.array(groups, pa.string()).dictionary_encode().indices.to_numpy()
    order = pc.sort_indices(pa.array(lesion_ids, pa.string())).to_numpy()
    first = order[np.unique(codes[order], return_index=True)[1]]
    named: np.ndarray = lesion_ids[first][codes]
    return named


def average_test(parts: Iterable[Predictions]) -> OofTable:
    """Average the test predictions of each model over its fold models: logits and auxiliary logits.

    Logits rather than probabilities are averaged, since the stacker was fitted on logits. Features are dropped, (N, 0).
    Raises DataError unless every part holds the same lesions, each once, and all parts are by different weights.
    """
    parts = list(parts)
    if not parts:
        raise DataError("no test predictions to average; run triderm predict on the fold models first")
    first = parts[0]
    ids = first.lesion_ids
    seen: set[tuple[str, str]] = set()
    by_model: dict[str, list[tuple[Predictions, np.ndarray]]] = {}
    for part in parts:
        key = (single(part.model, "model"), single(part.model_hash, "model_hash"))
        if key in seen:
            raise DataError(
                f"two folds of {key[0]} have the same weights ({key[1][:12]}): one is a copy; delete its folder and "
                "run triderm crossval again"
            )
        seen.add(key)
        if difference := mismatch(part, first):
            raise DataError(f"test predictions of {key[0]} are for {difference} than the first file's")
        rows = rows_of(ids, part.lesion_ids)
        if len(part) != len(ids) or (np.sort(rows) != np.arange(len(ids))).any():
            raise DataError(
                f"test predictions of {key[0]} ({key[1][:12]}) hold other lesions than the first file; "
                "run triderm predict again"
            )
        by_model.setdefault(key[0], []).append((part, rows))

    def mean(name: str, model: str) -> np.ndarray:
        return np.asarray(np.mean([getattr(part, name)[order] for part, order in by_model[model]], axis=0))

    models = tuple(by_model)
    return OofTable(
        lesion_ids=ids,
        groups=first.groups,
        labels=first.labels,
        folds=np.full(len(ids), NO_FOLD, np.int64),
        concepts=first.concepts,
        metadata=first.metadata,
        models=models,
        heads={model: single(by_model[model][0][0].head, "head") for model in models},
        logits={model: mean("logits", model) for model in models},
        aux_clinical={model: mean("aux_clinical", model) for model in models},
        aux_dermoscopic={model: mean("aux_dermoscopic", model) for model in models},
        # The features of different fold models have different axes: their mean would be meaningless.
        features={model: np.full((len(ids), 0), np.nan, np.float32) for model in models},
        hashes={model: np.full(len(ids), "", object) for model in models},
        task=first.task,
        concept_names=first.concept_names,
    )


def concatenate_tables(tables: Sequence[OofTable]) -> OofTable:
    """Join tables of other lesions by the same models of one task."""
    if len(tables) == 1:
        return tables[0]
    columns: dict[str, Any] = {}
    for each in fields(OofTable):
        values = [getattr(table, each.name) for table in tables]
        if isinstance(values[0], np.ndarray):
            columns[each.name] = np.concatenate(values)
        elif each.name in (*OUTPUTS, "hashes"):
            columns[each.name] = {name: np.concatenate([value[name] for value in values]) for name in tables[0].models}
    return replace(tables[0], **columns)
