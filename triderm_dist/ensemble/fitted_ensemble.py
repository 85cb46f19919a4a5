"""The ensemble of a run with its stacker, as triderm stack fitted them, for predictions and reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.ensemble.artifact import Ensemble, FitKeys, read_artifact
from triderm_dist.ensemble.calibration import member_probabilities
from triderm_dist.ensemble.fitted_stacker import FittedStacker
from triderm_dist.ensemble.run_files import ENSEMBLE_FILE, STACK_FILE, STACKER, STACKER_FILES
from triderm_dist.ensemble.stack_inputs import column_names, embedding_tower, embeddings_path, prediction_columns
from triderm_dist.files import file_sha256
from triderm_dist.predictions import OofTable, Predictions
from triderm_dist.schema import DataError, Task
from triderm_dist.submission import Results
from triderm_dist.tasks import recorded_task


@dataclass(frozen=True)
class FittedEnsemble:
    """The ensemble of a run and its stacker, each read once. fit: the content of ensemble.json (`FitKeys`)."""

    folder: Path
    ensemble: Ensemble
    task: Task
    fit: Mapping[str, Any]

    @classmethod
    def load(cls, run_folder: Path) -> FittedEnsemble:
        """Read ensemble.json. Raises DataError naming the file if it is missing or damaged."""
        path = run_folder / ENSEMBLE_FILE
        fit = read_artifact(path, schema=FitKeys)
        return cls(run_folder, Ensemble.of(fit, path), recorded_task(fit, str(path)), fit)

    @property
    def path(self) -> Path:
        return self.folder / ENSEMBLE_FILE

    @property
    def members(self) -> tuple[str, ...]:
        return self.ensemble.members

    @property
    def models(self) -> tuple[str, ...]:
        """The networks among the members, whose predictions the stacker reads too."""
        return tuple(name for name in self.members if name != STACKER)

    @cached_property
    def stacker(self) -> FittedStacker | None:
        """None if it is not a member. Raises DataError as `load_stacker`, and if the embeddings that it reads are by
        another tower than those that it was fitted on, which earlier versions did not record.
        """
        if STACKER not in self.members:
            return None
        stacker, fitted_on = self.load_stacker(), self.fit.get("embeddings_of")
        if stacker.extra == "embeddings" and fitted_on and embedding_tower(self.folder).record != fitted_on:
            raise DataError(
                f"{embeddings_path(self.folder, 'train')}: by another tower than the embeddings that the stacker was "
                "fitted on; run triderm stack again"
            )
        return stacker

    def load_stacker(self) -> FittedStacker:
        """Read the stacker, member or not. Raises DataError if it is missing, or of another fit or task."""
        stacker = FittedStacker.load(self.folder / STACK_FILE, self.task)
        self.check_files(*STACKER_FILES)
        return stacker

    def predict(
        self, table: OofTable, parts: Sequence[Predictions] = (), embeddings: np.ndarray | None = None
    ) -> tuple[Results, np.ndarray]:
        """Return the results for a test set in the order of `table.lesion_ids`, and the members' probabilities
        (M, N, C).

        table: `predictions.average_test` of `parts`, the predictions of every fold model.  embeddings: see
        `prediction_columns`. Raises DataError if this was fitted for another task or on other models, weights or
        columns.
        """
        self.check_task(table.task)
        self.check_weights(
            (name, part.refit_of or part.model_hash[part.model == name])
            for part in parts
            for name in sorted(set(part.model))
        )
        for model in self.models:
            if model not in table.models:
                raise DataError(
                    f"{self.path}: needs predictions of model {model!r}; got predictions of {', '.join(table.models)}"
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
            columns = prediction_columns(self.folder, self.stacker.extra, table, self.models, parts, embeddings)
            members.append(self.stacker.predict(columns))
        ids = [str(lesion) for lesion in table.lesion_ids]
        return Results(ids, self.ensemble.combine(members), self.ensemble.decide(members)), np.stack(members)

    def check_task(self, task: Task) -> None:
        """Raise DataError for predictions of another task than that of the fit."""
        if not self.task.matches(task):
            raise DataError(
                f"{self.path}: was fitted for task {self.task.name!r}, the predictions are for {task.name!r}"
                + (", described differently" if self.task.name == task.name else "")
                + "; run triderm stack again"
            )

    def check_weights(self, used: Iterable[tuple[str, Iterable[str]]]) -> None:
        """Raise DataError for predictions by other weights than those of the fit.

        used: models with the hashes of their weights, or of the folds' weights whose refit they are.
        """
        fitted_on = self.fit["weights_of"]
        for model, hashes in used:
            if model in fitted_on and not set(hashes) <= set(fitted_on[model]):
                raise DataError(
                    f"{self.path}: was fitted on other weights of {model} than the predictions; run triderm stack again"
                )

    def check_files(self, *names: str) -> None:
        """Raise DataError for files, where they exist, of another fit than that of ensemble.json, which has the SHA-256
        of each. Earlier versions recorded none.
        """
        recorded = self.fit.get("files", {})
        for path in (self.folder / name for name in names):
            if path.name in recorded and path.exists() and file_sha256(path) != recorded[path.name]:
                raise DataError(f"{path}: not written together with {ENSEMBLE_FILE}; run triderm stack again")
