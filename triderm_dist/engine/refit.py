"""Refit: train each model again on all labeled lesions, so that one network per model predicts instead of one per fold.

No lesions are held out, so there is no validation and no score; the estimate remains that of the folds. The training
stops after the median of the epochs that the folds selected, which is before the end of the schedule if
train.select=best selected earlier ones. OUTPUT/refit/MODEL holds the files of a fold without predictions. Its fold.json
also has `refit_of`, the hashes of the folds' weights, by which the stacker and the ensemble fitted on them accept the
network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any

import numpy as np

from triderm_dist.config import EXECUTION, Experiment, TrainConfig
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed import collectives
from triderm_dist.distributed.collectives import on_main
from triderm_dist.engine.crossval import FoldRun, FoldRunFactory, run_trainings
from triderm_dist.engine.fold import assigned_folds, model_config, result_hashes
from triderm_dist.engine.fold_folder import is_trained, remove_obsolete_checkpoints
from triderm_dist.engine.network_files import read_info, write_info
from triderm_dist.predictions import NO_FOLD
from triderm_dist.schema import CheckpointError, DataError


@collectives.interrupt_on_lost_rank()
def refit(experiment: Experiment, index: ShardIndex, models: Sequence[str]) -> None:
    """Train every model on all labeled lesions, one after the other on all ranks, skipping finished ones.

    Call on all ranks. Raises as `run_folds`, and DataError if a fold is not trained with these settings and data.
    """
    assignment = assigned_folds(index, experiment.data)
    folds = {name: _TrainedFolds.read(experiment, index, name) for name in models}

    def remaining(name: str) -> list[FoldRunFactory]:
        path, trained = experiment.refit_folder(name), folds[name]
        if is_trained(path, result_hashes(experiment, index, name, trained.key)):
            on_main(partial(_record_folds, path, trained))
            on_main(partial(remove_obsolete_checkpoints, path))
            return []
        return [partial(_Refit, experiment=experiment, name=name, fold=NO_FOLD, assignment=assignment, folds=trained)]

    run_trainings(experiment, index, models, remaining)


@dataclass(frozen=True)
class _TrainedFolds:
    """Results of the folds that a refit uses.

    epochs: median of the selected epochs, the higher one of two.  weights: hashes of the folds' weights.
    """

    epochs: int
    weights: tuple[str, ...]

    @property
    def key(self) -> str:
        """Text that replaces the fold's number in the hashes of the refit."""
        return f"refit, {self.epochs} epochs"

    @staticmethod
    def read(experiment: Experiment, index: ShardIndex, name: str) -> _TrainedFolds:
        """Read the files of all folds. Raises DataError if one is not trained."""
        model_config(experiment, name)
        epochs, weights = [], []
        for fold in range(experiment.data.folds):
            folder = experiment.fold_folder(name, fold)
            if not is_trained(folder, result_hashes(_executed_as(experiment, name, folder), index, name, fold)):
                raise DataError(
                    f"{folder}: not trained with these settings and data, and a refit takes its epochs from all folds; "
                    "run triderm crossval first"
                )
            info, last = read_info(folder / "weights"), experiment.models[name].train.epochs
            if not 0 < info["epoch"] <= last:
                raise CheckpointError(
                    f"{folder / 'weights.json'}: epoch {info['epoch']} of {last}; delete {folder} and train this fold "
                    "again"
                )
            epochs.append(info["epoch"])
            weights.append(info["sha256"])
        return _TrainedFolds(median_high(epochs), tuple(sorted(weights)))


def _executed_as(experiment: Experiment, name: str, folder: Path) -> Experiment:
    """Return the settings with the execution settings of a finished fold, such as the micro-batch.

    A refit on other devices may use other ones without a change of its hash.
    """
    if not (folder / "fold.json").exists():
        return experiment
    trained, model = read_info(folder / "fold")["model"]["train"], experiment.models[name]
    train = model.train.model_copy(update={key: trained[key] for key in EXECUTION if key in trained})
    return experiment.model_copy(
        update={"models": {**experiment.models, name: model.model_copy(update={"train": train})}}
    )


@dataclass(frozen=True, kw_only=True)
class _Refit(FoldRun):
    """A training without held-out lesions."""

    folds: _TrainedFolds

    @property
    def path(self) -> Path:
        return self.experiment.refit_folder(self.name)

    @property
    def key(self) -> str:
        return self.folds.key

    @property
    def title(self) -> str:
        return f"{self.name} refit"

    @property
    def train(self) -> TrainConfig:
        return self.model.train.model_copy(update={"select": "last"})  # no score to select by

    @property
    def epochs(self) -> int:
        return self.folds.epochs

    @property
    def extra_info(self) -> dict[str, Any]:
        return {"refit_of": self.folds.weights}

    @property
    def validation_rows(self) -> np.ndarray:
        return np.empty(0, np.int64)

    def update(self) -> None:
        on_main(partial(_record_folds, self.path, self.folds))


def _record_folds(path: Path, folds: _TrainedFolds) -> None:
    """Record new hashes in fold.json after the folds were trained again with equal settings."""
    info = read_info(path / "fold")
    if tuple(info["refit_of"]) != folds.weights:
        write_info(path / "fold", **{**info, "refit_of": folds.weights})
