"""Predict a test set with the fitted stacker and ensemble, write the results, and score them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.checksums import DamagedFile, read_checked_parquet, write_checked_json
from triderm_dist.ensemble import fitted_stacker
from triderm_dist.ensemble.artifact import Ensemble, EnsembleKeys, FitKeys, check_same_fit, read_artifact, read_task
from triderm_dist.ensemble.calibration import member_probabilities
from triderm_dist.ensemble.fitted_stacker import FittedStacker
from triderm_dist.ensemble.run_files import (
    ENSEMBLE_FILE,
    HELD_OUT_FILE,
    OOF_FILE,
    PREDICTIONS_FILE,
    STACK_FILE,
    STACKER,
    STACKER_FILES,
)
from triderm_dist.ensemble.stack_inputs import column_names, embedding_tower, embeddings_path, stacker_columns
from triderm_dist.predictions import (
    TEST,
    OofTable,
    PredictionFile,
    Predictions,
    average_test,
    concatenate_tables,
    write_predictions,
)
from triderm_dist.schema import UNLABELED, DataError, Task
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
    task = read_task(fitted.folder / ENSEMBLE_FILE)  # a test set may be described with another decision
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
    trained_ids, trained_groups = _trained_on(run_folder / OOF_FILE)
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


def _trained_on(path: Path) -> list[set[str]]:
    """Return the ids and the groups of the lesions in oof.parquet; none without the file, as in an exported run."""
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


@dataclass(frozen=True)
class FittedEnsemble:
    """The ensemble of a run and its stacker, read once."""

    folder: Path
    ensemble: Ensemble

    @classmethod
    def load(cls, run_folder: Path) -> FittedEnsemble:
        """Read ensemble.json. Raises DataError if it is missing."""
        return cls(run_folder, Ensemble.load(run_folder / ENSEMBLE_FILE))

    @property
    def members(self) -> tuple[str, ...]:
        return self.ensemble.members

    @property
    def models(self) -> tuple[str, ...]:
        """The networks among the members, whose predictions the stacker reads too."""
        return tuple(name for name in self.members if name != STACKER)

    @cached_property
    def stacker(self) -> FittedStacker | None:
        """None if it is not a member. Raises DataError if stack.json is missing or of another fit, or if the embeddings
        that it reads are by another tower.
        """
        if STACKER not in self.members:
            return None
        stacker = FittedStacker.load(self.folder / STACK_FILE)
        check_same_fit(self.folder, *STACKER_FILES)
        if stacker.extra == "embeddings":
            check_embeddings(self.folder)
        return stacker

    def predict(
        self, table: OofTable, parts: Sequence[Predictions] = (), embeddings: np.ndarray | None = None
    ) -> tuple[Results, np.ndarray]:
        """Return the results for a test set in the order of `table.lesion_ids`, and the members' probabilities
        (M, N, C).

        table: `predictions.average_test` of `parts`, the predictions of every fold model.  embeddings: see
        `stacker_columns`. Raises DataError if this was fitted for another task or on other models, weights or
        columns.
        """
        check_ensemble_task(self.folder, table.task)
        used = (
            (name, part.refit_of or part.model_hash[part.model == name])
            for part in parts
            for name in sorted(set(part.model))
        )
        check_weights(self.folder, used)
        for model in self.models:
            if model not in table.models:
                raise DataError(
                    f"{self.folder / ENSEMBLE_FILE}: needs predictions of model {model!r}; "
                    f"got predictions of {', '.join(table.models)}"
                )
        members = []
        for name, temperature in zip(self.members, self.ensemble.temperatures, strict=True):
            if name != STACKER:
                members.append(member_probabilities(table, name, temperature))
                continue
            assert self.stacker is not None
            names = column_names(table, self.models)
            if names != self.stacker.feature_names[: len(names)]:
                raise DataError(f"{self.folder / STACK_FILE}: was fitted on other columns than the test set's")
            columns = stacker_columns(self.folder, self.stacker.extra, table, self.models, parts, embeddings)
            members.append(self.stacker.predict(columns))
        ids = [str(lesion) for lesion in table.lesion_ids]
        return Results(ids, self.ensemble.combine(members), self.ensemble.decide(members)), np.stack(members)


def check_ensemble_task(run_folder: Path, task: Task) -> None:
    """Check that ensemble.json, and stack.json if there is one, were fitted for this task; raise DataError if not."""
    fitted = {ENSEMBLE_FILE: read_task(run_folder / ENSEMBLE_FILE)}
    if (run_folder / STACK_FILE).exists():
        fitted[STACK_FILE] = read_task(run_folder / STACK_FILE, fitted_stacker.FORMAT, fitted_stacker.VERSION)
    for name, other in fitted.items():
        if not other.matches(task):
            raise DataError(
                f"{run_folder / name}: was fitted for task {other.name!r}, the predictions are for {task.name!r}"
                + (", described differently" if other.name == task.name else "")
                + "; run triderm stack again"
            )


def check_embeddings(run_folder: Path) -> None:
    """Raise DataError if the run's embeddings are by another tower than those that the stacker was fitted on.

    Earlier versions did not record it.
    """
    fitted_on = read_artifact(run_folder / ENSEMBLE_FILE, schema=EnsembleKeys).get("embeddings_of")
    if fitted_on and embedding_tower(run_folder).record != fitted_on:
        raise DataError(
            f"{embeddings_path(run_folder, 'train')}: by another tower than the embeddings that the stacker was fitted "
            "on; run triderm stack again"
        )


def check_weights(run_folder: Path, used: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Check that predictions are by the network weights that ensemble.json was fitted on.

    used: models with the hashes of their weights, or of the folds' weights whose refit they are. Raises DataError for
    other weights.
    """
    fitted_on = read_artifact(run_folder / ENSEMBLE_FILE, schema=FitKeys)["weights_of"]
    for model, hashes in used:
        if model in fitted_on and not set(hashes) <= set(fitted_on[model]):
            raise DataError(
                f"{run_folder / ENSEMBLE_FILE}: was fitted on other weights of {model} than the predictions; "
                "run triderm stack again"
            )


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
