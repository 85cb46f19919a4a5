"""Write the results of a test set by the fitted stacker and ensemble, and score them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.checksums import DamagedFile, read_checked_parquet, write_checked_json
from triderm_dist.ensemble.artifact import read_task
from triderm_dist.ensemble.fitted_ensemble import FittedEnsemble
from triderm_dist.ensemble.run_files import ENSEMBLE_FILE, HELD_OUT_FILE, OOF_FILE, PREDICTIONS_FILE
from triderm_dist.predictions import (
    TEST,
    OofTable,
    PredictionFile,
    Predictions,
    average_test,
    concatenate_tables,
    write_predictions,
)
from triderm_dist.schema import UNLABELED, DataError
from triderm_dist.submission import (
    TABLE_FILE,
    Results,
    read_probabilities,
    result_files,
    results_table,
    write_probabilities,
    write_results,
    write_table,
)

LESIONS = 16_384
"""Test lesions that are predicted at once."""


def write_test_results(fitted: FittedEnsemble, test_files: Sequence[Path], folder: Path | None = None) -> list[Path]:
    """Average `test_files` (MODEL/fold-K/test.parquet), apply the stacker and ensemble of a run, write the results.

    folder: for the files, by default that of the run. They are `result_files`, the files of `write_probabilities`,
    probabilities.parquet with those of the members, and predictions.parquet: one row per lesion and model, the mean
    over folds and transforms. Lesions are predicted `LESIONS` at once, or all where the files differ in their order or
    the stacker takes embeddings. Returns the paths of `result_files`. Raises DataError if the files hold different
    lesions or the ensemble needs another model.
    """
    folder = folder or fitted.folder
    extra = fitted.stacker.extra if fitted.stacker else ""
    files = [PredictionFile(path) for path in test_files]
    size = (
        LESIONS if _agree_in_order(files) and extra != "embeddings" else max((file.rows for file in files), default=0)
    )
    found = []
    for parts in zip(*(file.chunks(extra == "features", size) for file in files), strict=True):
        table = average_test(parts)
        found.append((table, *fitted.predict(table, parts)))
    table = concatenate_tables([each[0] for each in found] or [average_test([])])
    results = Results(
        [lesion for _, part, _ in found for lesion in part.lesion_ids],
        np.concatenate([part.probabilities for _, part, _ in found]),
        np.concatenate([part.decisions for _, part, _ in found]),
    )
    members = np.concatenate([each[2] for each in found], axis=1)
    task = fitted.task  # a test set may be described with another decision
    write_predictions(folder / PREDICTIONS_FILE, _to_rows(table), split=TEST)
    (folder / HELD_OUT_FILE).unlink(missing_ok=True)  # the score of earlier results
    by_member = dict(zip(fitted.members, members, strict=True))
    about = {"task": task.to_mapping(), "members": fitted.members}
    write_table(folder / TABLE_FILE, results_table(results, by_member, task.diagnosis_names), about)
    template = sorted(results.lesion_ids)
    if task.submission:
        write_probabilities(folder, task, results, template)
    return write_results(folder, task, results, template)


def score(
    run_folder: Path,
    truth: Mapping[str, int],
    partial: bool = False,
    folder: Path | None = None,
    with_trained_photo: Collection[str] = (),
) -> dict[str, Any]:
    """Score results by macro F1 of their decisions against {lesion id: label}, and write heldout.json beside them.

    macro_f1 is over the diagnoses in the truth, which `diagnoses` counts. `absent` names the others: a challenge's
    scorer has no score then. `in_training`, where there are any, counts the lesions whose id or group is that of a
    lesion in oof.parquet, on which the networks were trained, or which are among `with_trained_photo`.
    partial: score the lesions with a truth only. folder: of the results, by default RUN. with_trained_photo: ids of
    lesions with a photo of a training lesion. Raises DataError if a lesion of the results has no truth.
    """
    folder = folder or run_folder
    task = read_task(run_folder / ENSEMBLE_FILE)
    ids, probabilities, decisions = read_probabilities(folder, task)
    labels = np.array([truth.get(name, UNLABELED) for name in ids], np.int64)
    known = labels != UNLABELED
    if not (known.any() if partial else known.all()):
        path = folder / result_files(task)[0]
        first = ids[int(np.argmin(known))]
        raise DataError(f"{path}: {(~known).sum()} lesions are not in the ground truth, the first is {first}")
    trained_ids, trained_groups = trained_on(run_folder)
    group_of: dict[str, str] = {}
    for rows in PredictionFile(folder / PREDICTIONS_FILE).tables(["lesion_id", "group"]):
        group_of.update(zip(rows["lesion_id"].to_pylist(), rows["group"].to_pylist(), strict=True))
    groups = np.array([group_of[name] for name in ids], object)[known]
    names = np.array(ids, object)[known]
    trained_ids.update(with_trained_photo)
    in_training = sum(name in trained_ids or group in trained_groups for name, group in zip(names, groups, strict=True))
    labels, probabilities, decisions = labels[known], probabilities[known], decisions[known]
    interval, classes = intervals.macro_f1(decisions, labels, groups), len(task.diagnoses)
    result = {
        "macro_f1": interval.value,
        "interval": [interval.low, interval.high],
        "argmax": metrics.argmax_macro_f1(probabilities, labels),
        "n": len(labels),
        "absent": [name for label, name in enumerate(task.diagnosis_names) if not (labels == label).any()],
        "diagnoses": dict(zip(task.diagnosis_names, np.bincount(labels, minlength=classes).tolist(), strict=True)),
    }
    if in_training:
        result["in_training"] = in_training
    write_checked_json(folder / HELD_OUT_FILE, result)
    return result


def trained_on(run_folder: Path) -> list[set[str]]:
    """Return the ids and the groups of the lesions in oof.parquet; none without the file, as in an exported run."""
    path = run_folder / OOF_FILE
    if not path.exists():
        return [set(), set()]
    try:
        table = read_checked_parquet(path, ["lesion_id", "group"])
    except DamagedFile as error:
        raise DataError(f"{path}: {error}; run triderm crossval again") from None
    return [{name for name in column.unique().to_pylist() if name} for column in table.columns]


def _agree_in_order(files: Sequence[PredictionFile]) -> bool:
    """Return whether all files hold the same lesions, each once, in the same order."""
    import pyarrow as pa

    def ids(file: PredictionFile) -> pa.ChunkedArray:
        return pa.chunked_array(
            [rows["lesion_id"].combine_chunks() for rows in file.tables(["lesion_id"])], pa.string()
        )

    first = ids(files[0]) if files else pa.chunked_array([], pa.string())
    return len(first.unique()) == len(first) and all(ids(file).equals(first) for file in files[1:])


def _to_rows(table: OofTable) -> Predictions:
    """Flatten the averaged table to one row per lesion and model."""
    models = table.models

    def repeat(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values] * len(models))

    def concatenate(by_model: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([by_model[model] for model in models])

    return Predictions(
        lesion_ids=repeat(table.lesion_ids),
        groups=repeat(table.groups),
        labels=repeat(table.labels),
        fold=repeat(table.folds),
        model=np.repeat(np.array(models, object), len(table)),
        model_hash=concatenate(table.hashes),
        head=np.repeat(np.array([table.heads[model] for model in models], object), len(table)),
        logits=concatenate(table.logits),
        aux_clinical=concatenate(table.aux_clinical),
        aux_dermoscopic=concatenate(table.aux_dermoscopic),
        features=concatenate(table.features),
        concepts=repeat(table.concepts),
        metadata=repeat(table.metadata),
        task=table.task,
        concept_names=table.concept_names,
    )
