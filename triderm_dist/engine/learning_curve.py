"""Learning curve: train the folds of a run again on subsets of their training lesions.

OUTPUT/learning_curve/MODEL/P-percent/fold-K holds the files of a fold without weights, since only its held-out
predictions are compared with those of the fold that was trained on all lesions. Each subset contains the smaller ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.config import Experiment, TrainConfig
from triderm_dist.data.folds import assign_folds
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed import collectives
from triderm_dist.distributed.collectives import on_main
from triderm_dist.engine.crossval import FoldRun, FoldRunFactory, run_trainings
from triderm_dist.engine.fold import assigned_folds, is_fold_finished, model_config, result_hashes
from triderm_dist.engine.fold_folder import is_finished
from triderm_dist.predictions import PARTS, part_folder
from triderm_dist.schema import ConfigError, DataError

QUARTERS = 4


@collectives.interrupt_on_lost_rank()
def train_learning_curve(experiment: Experiment, index: ShardIndex, models: Sequence[str]) -> None:
    """Train every fold of every model on each of `PARTS` percent of its training lesions, skipping finished ones.

    Call on all ranks. Raises as `run_folds`, and DataError if a fold is not trained on all lesions with these settings.
    """
    for name in models:
        model_config(experiment, name)
        for fold in range(experiment.data.folds):
            if not is_fold_finished(experiment, index, name, fold):
                raise DataError(
                    f"{experiment.fold_folder(name, fold)}: not trained with these settings and data, and the learning "
                    "curve ends there; run triderm crossval first"
                )
    assignment = assigned_folds(index, experiment.data)

    def remaining(name: str) -> list[FoldRunFactory]:
        trainings = [(percent, fold) for percent in PARTS for fold in range(experiment.data.folds)]
        return [
            partial(_PartOfFold, experiment=experiment, name=name, fold=fold, assignment=assignment, percent=percent)
            for percent, fold in trainings
            if not is_finished(
                part_folder(experiment.folder, name, percent, fold),
                result_hashes(experiment, index, name, _key(fold, percent)),
            )
        ]

    run_trainings(experiment, index, models, remaining, transforms=experiment.oof.tta)


def models_of_learning_curve(experiment: Experiment) -> list[str]:
    """Return the models with a frozen tower, whose tokens are cached. Raises ConfigError if there is none."""
    names = [name for name, model in experiment.models.items() if model.tower.frozen]
    if not names:
        raise ConfigError(
            "learning_curve: trains models with a frozen tower (models.NAME.tower.frozen), and these settings have none"
        )
    return names


def part_of_lesions(index: ShardIndex, rows: np.ndarray, percent: int, seed: int) -> np.ndarray:
    """Return a subset of the index rows (N,), in order. percent: 25, 50, 75 or 100.

    The lesions are divided into four parts like folds: groups stay together, and diagnoses have nearly equal shares in
    all parts. A larger percentage includes the parts of the smaller ones.
    """
    parts = assign_folds(index.labels[rows], index.fold_groups[rows], QUARTERS, seed)
    return np.asarray(rows[parts < percent * QUARTERS // 100])


def _key(fold: int, percent: int) -> str:
    """Return the text that replaces the fold's number in the hashes of the training."""
    return f"fold {fold}, {percent}% of its training lesions"


@dataclass(frozen=True, kw_only=True)
class _PartOfFold(FoldRun):
    """The training of a fold on a subset of its lesions."""

    percent: int

    @property
    def path(self) -> Path:
        return part_folder(self.experiment.folder, self.name, self.percent, self.fold)

    @property
    def key(self) -> str:
        return _key(self.fold, self.percent)

    @property
    def title(self) -> str:
        return f"{super().title}, {self.percent}% of the lesions"

    @property
    def train(self) -> TrainConfig:
        return self.model.train.model_copy(update={"trackers": (), "profile": None})

    @property
    def extra_info(self) -> dict[str, Any]:
        return {"percent": self.percent, "lesions": len(self.train_rows)}

    @cached_property
    def train_rows(self) -> np.ndarray:
        return part_of_lesions(self.index, super().train_rows, self.percent, self.experiment.data.fold_seed)

    @property
    def hidden_inputs(self) -> tuple[str, ...]:
        return ()

    def run(self) -> None:
        super().run()
        on_main(partial((self.path / "weights.safetensors").unlink, missing_ok=True))

    def update(self) -> None:
        """Do nothing: a finished training has its predictions."""
