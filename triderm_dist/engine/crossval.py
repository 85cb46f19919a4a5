"""Cross-validation: train each fold of each model, then predict the lesions that it was not trained on."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from triderm_dist.config import Experiment, ModelConfig, TrainConfig
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed import collectives, parallel
from triderm_dist.distributed.collectives import on_main
from triderm_dist.distributed.out_of_memory import MicroBatch
from triderm_dist.distributed.stop import Stop
from triderm_dist.engine.checkpoint import load_weights, read_info, write_info
from triderm_dist.engine.evaluate import Evaluation, evaluate
from triderm_dist.engine.extra_sets import open_extra_sets, without_shared_photos
from triderm_dist.engine.fold import (
    as_predictions,
    assigned_folds,
    check_task,
    is_fold_finished,
    model_config,
    new_network,
    result_hash,
    resume_hash,
)
from triderm_dist.engine.fold_folder import FoldFolder, exclusive
from triderm_dist.engine.trainer import Trainer, TrainingData, check_names
from triderm_dist.engine.views import Views, open_views
from triderm_dist.predictions import write_predictions
from triderm_dist.schema import VIEWS

OnStart = Callable[[], None]
OnValidation = Callable[[int, dict[str, float]], None]


@collectives.interrupt_on_lost_rank()
def run_folds(
    experiment: Experiment,
    index: ShardIndex,
    models: Iterable[str],
    folds: Iterable[int],
    on_validation: OnValidation | None = None,
    on_start: OnStart = lambda: None,
) -> None:
    """Train every fold of every model one after the other on all ranks, skipping finished ones. Call on all ranks.

    Writes OUTPUT/MODEL/fold-K/{weights.safetensors, fold.json, metrics.jsonl, predictions.parquet} and
    without_VIEW.parquet: predictions for the same lesions with one view treated as missing. `on_start` is called on
    rank 0 once a fold's settings have passed all checks; no file of an earlier run is touched before. `on_validation`
    is called with (epoch, scores). Raises Interrupted after a request to stop or where another rank was lost,
    InputError where another run trains the same fold, DataError where the run has folds of another task.
    """
    models, folds = list(models), list(folds)
    check_task(experiment, index)
    assignment = assigned_folds(index, experiment.data)
    for name in models:
        check_names(model_config(experiment, name).train)
    matched, extra = open_extra_sets(experiment, index), None
    with Stop() as stop:
        for name in models:
            model = experiment.models[name]
            remaining = [fold for fold in folds if not is_fold_finished(experiment, index, name, fold)]
            if not remaining:
                continue
            accelerator = parallel.start_training(model.train, experiment.rank_timeout)
            on_main(lambda: experiment.folder.mkdir(parents=True, exist_ok=True))
            if extra is None:
                extra = without_shared_photos(matched, index, experiment, accelerator, stop.check)
            views = open_views(
                experiment, model, index, accelerator,
                train=True, transforms=experiment.oof.tta, after_chunk=stop.check, extra=extra,
                record=True,
            )  # fmt: skip
            for fold in remaining:
                stop.check_now()  # a request that arrived while the previous fold ended
                with exclusive(experiment.fold_folder(name, fold)):
                    _FoldRun(experiment, name, fold, views, assignment, stop, on_start, on_validation).run()


@dataclass(frozen=True)
class _Outcome:
    """Outputs for the validation rows, by view the outputs without that view, and the changed settings."""

    evaluation: Evaluation
    without_view: dict[str, Evaluation]
    changes: list[dict[str, Any]]


@dataclass(frozen=True)
class _FoldRun:
    """One fold of one model.

    assignment: the fold of each lesion (N,), -1 without a label.  on_start, on_validation: see `run_folds`.
    """

    experiment: Experiment
    name: str
    fold: int
    views: Views
    assignment: np.ndarray
    stop: Stop
    on_start: OnStart
    on_validation: OnValidation | None

    @property
    def index(self) -> ShardIndex:
        return self.views.loaders.index

    @property
    def model(self) -> ModelConfig:
        return self.experiment.models[self.name]

    @property
    def validation_rows(self) -> np.ndarray:
        """Index rows of the fold."""
        return np.flatnonzero(self.assignment == self.fold)

    def run(self) -> None:
        """Train and predict, with smaller micro-batches where memory runs out, and write fold.json and predictions."""
        fold = (self.experiment, self.index, self.name, self.fold)
        digest, path = result_hash(*fold), self.experiment.fold_folder(self.name, self.fold)
        folder = FoldFolder(path, digest, resume_hash(*fold))
        if on_main(folder.is_trained):  # in a folder that was set aside, or predicted with other transforms
            on_main(folder.claim)
            if not on_main(lambda: is_fold_finished(self.experiment, self.index, self.name, self.fold)):
                self._predict_again(path)
            return
        micro_batch = MicroBatch(path, digest, self.model.train.micro_batch, self.model.train.global_batch)
        while (outcome := self._attempt(micro_batch, folder)) is None:
            gc.collect()  # tensors of the attempt that ran out of memory
            torch.cuda.empty_cache()
        on_main(partial(self._write, path, digest, outcome))
        if not self.model.train.keep_checkpoints:
            on_main(lambda: shutil.rmtree(path / "checkpoints", ignore_errors=True))

    def _predict_again(self, path: Path) -> None:
        """Replace the predictions of a trained fold by those with the transforms of the settings."""
        accelerator = parallel.start_inference(self.model.train.precision, self.experiment.rank_timeout)
        evaluation, without_view = self._predict(path, accelerator, self.experiment.predict.batch)
        on_main(partial(self._write_predictions, path, evaluation, without_view))
        rows = len(self.validation_rows)
        transforms = self.experiment.oof.tta
        accelerator.print(
            f"{self.name} fold {self.fold}: {rows} held-out lesions predicted again, mean of {transforms} transforms",
            flush=True,
        )

    def _attempt(self, micro_batch: MicroBatch, folder: FoldFolder) -> _Outcome | None:
        """Train and predict; None where memory ran out, and the next attempt takes a smaller micro-batch."""
        size = micro_batch.agreed()
        config = self.model.train.model_copy(update={"micro_batch": size})
        # A new Accelerator for each training: DeepSpeed binds it to one engine.
        accelerator = parallel.start_training(config)
        with micro_batch.fits(size) as attempt:
            changes = self._train(config, folder, accelerator)
            evaluation, without_view = self._predict(folder.path, accelerator, size)
        if attempt.failed:
            return None
        accelerator.free_memory()
        return _Outcome(evaluation, without_view, changes)

    def _train(self, config: TrainConfig, folder: FoldFolder, accelerator: Accelerator) -> list[dict[str, Any]]:
        """Train, or resume, and return the changes of settings (see `Trainer.train`)."""
        train_rows = np.flatnonzero((self.assignment >= 0) & (self.assignment != self.fold))
        train_rows = np.concatenate([train_rows, self.views.extra_rows])
        data = TrainingData(self.views.training, train_rows, self.views.loaders, self.validation_rows)
        torch.manual_seed(self.experiment.seed * 1_009 + self.fold)
        network = new_network(self.model, self.views).to(accelerator.device)
        trainer = Trainer(
            name=f"{self.name} fold {self.fold}", network=network, head=self.model.head, config=config, data=data,
            folder=folder, seed=self.experiment.seed, accelerator=accelerator,
        )  # fmt: skip
        return trainer.train(self.stop, self.on_start, self.on_validation)

    def _predict(
        self, path: Path, accelerator: Accelerator, micro_batch: int
    ) -> tuple[Evaluation, dict[str, Evaluation]]:
        """Predict the validation rows, with all views and with each view treated as missing."""
        # Not the network that was trained: it may be sharded, or hold other weights than the selected ones.
        network = new_network(self.model, self.views, pretrained=False)
        load_weights(path / "weights", network)
        network = accelerator.prepare_model(network.to(accelerator.device), evaluation_mode=True)
        predict = partial(
            evaluate, network, self.views.loaders, self.validation_rows, accelerator,
            micro_batch=micro_batch, transforms=self.experiment.oof.tta, after_batch=self.stop.check,
        )  # fmt: skip
        # What a missing view costs can be measured only where the model uses both.
        hidden = VIEWS if set(VIEWS) <= {*self.model.use} & {*self.index.signature.views} else ()
        return predict(), {view: predict(hide=view) for view in hidden}

    def _write(self, path: Path, digest: str, outcome: _Outcome) -> None:
        """Write the predictions, then fold.json, which marks the fold as finished."""
        weights = self._write_predictions(path, outcome.evaluation, outcome.without_view)
        write_info(
            path / "fold",
            identity=digest,
            model=self.model.model_dump(mode="json"),
            task=self.index.task.to_mapping(),
            concepts=self.index.concepts,
            fold=self.fold,
            weights=weights,
            tower=self.views.tower.name,
            photos={"canvas": self.index.canvas, "short_side": self.index.short_side},
            changes=outcome.changes,
            **({"extra": [each.about() for each in self.views.extra]} if self.views.extra else {}),
        )

    def _write_predictions(self, path: Path, evaluation: Evaluation, without_view: dict[str, Evaluation]) -> str:
        """Write the predictions; return the hash of the weights that made them."""
        weights: str = read_info(path / "weights")["sha256"]
        shared, transforms = (self.index, self.name, self.model.head, self.fold, weights), self.experiment.oof.tta
        for view, hidden in without_view.items():
            write_predictions(
                path / f"without_{view}.parquet", as_predictions(hidden, *shared), hidden=view, transforms=transforms
            )
        write_predictions(path / "predictions.parquet", as_predictions(evaluation, *shared), transforms=transforms)
        return weights
