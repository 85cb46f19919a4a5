"""Cross-validation: train each fold of each model, then predict the lesions that it was not trained on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from triderm_dist.config import Experiment, ModelConfig, TrainConfig
from triderm_dist.data.photo_source import CanvasSource
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed import collectives, parallel
from triderm_dist.distributed.collectives import is_main, on_main
from triderm_dist.distributed.out_of_memory import MicroBatch, with_smaller_batches
from triderm_dist.distributed.stop import Stop
from triderm_dist.engine import cpu_precision
from triderm_dist.engine.epochs import TrainingData
from triderm_dist.engine.evaluate import evaluate_parts
from triderm_dist.engine.extra_sets import open_extra_sets, without_shared_photos
from triderm_dist.engine.fold import (
    add_trained_parts,
    as_predictions,
    assigned_folds,
    check_run_task,
    hidden_inputs,
    is_fold_finished,
    load_network,
    model_config,
    new_network,
    result_hashes,
    resume_hashes,
)
from triderm_dist.engine.fold_folder import (
    FoldFolder,
    lock_fold,
    mark_checkpoints_obsolete,
    remove_obsolete_checkpoints,
)
from triderm_dist.engine.fold_results import later_seconds
from triderm_dist.engine.model_inputs import ModelInputs, Notes, mean_tokens, open_training_inputs
from triderm_dist.engine.network_files import read_info, write_info
from triderm_dist.engine.trainer import Display, Trainer, check_train_settings
from triderm_dist.engine.warm_start import transfer_weights
from triderm_dist.models.network import Network
from triderm_dist.predictions import Predictions, predictions_writer
from triderm_dist.runtime.redact import redact_tree
from triderm_dist.runtime.terminal import counted, wrapped

OnStart = Callable[[], None]
OnValidation = Callable[[int, dict[str, float]], None]
FoldRunFactory = Callable[..., "FoldRun"]
"""Creates a `FoldRun` from its `model_inputs`, `stop` and `display`, given by name."""


@collectives.interrupt_on_lost_rank()
def run_folds(
    experiment: Experiment,
    index: ShardIndex,
    models: Iterable[str],
    folds: Iterable[int],
    on_validation: OnValidation | None = None,
    on_start: OnStart = lambda: None,
    *,
    in_parallel: bool = False,
    brief: bool = False,
) -> None:
    """Train every fold of every model one after the other on all ranks, skipping finished ones. Call on all ranks.

    Writes OUTPUT/MODEL/fold-K/{weights.safetensors, fold.json, metrics.jsonl, predictions.parquet} and
    without_INPUT.parquet: predictions for the same lesions with one input (a view, the concepts, the metadata) treated
    as missing.

    on_start: called on rank 0 when a fold's settings have passed all checks, before any file is changed.
    on_validation: called with (epoch, scores).
    in_parallel: other processes train at the same time and print on the same terminal.
    brief: another process prints what the start-up reports of a model's folds have in common.

    Raises Interrupted after a request to stop or if another rank is lost, Busy if another run trains the same fold,
    DataError if the run has folds of another task.
    """
    check_run_task(experiment, index)
    folds, assignment = list(folds), assigned_folds(index, experiment.data)

    def remaining(name: str) -> list[FoldRunFactory]:
        if is_main():
            for fold in folds:
                remove_obsolete_checkpoints(experiment.fold_folder(name, fold))
        return [
            partial(
                FoldRun, experiment=experiment, name=name, fold=fold, assignment=assignment,
                on_start=on_start, on_validation=on_validation,
            )
            for fold in folds
            if not is_fold_finished(experiment, index, name, fold)
        ]  # fmt: skip

    run_trainings(
        experiment, index, list(models), remaining,
        transforms=experiment.oof.tta, in_parallel=in_parallel, brief=brief,
    )  # fmt: skip


def run_trainings(
    experiment: Experiment,
    index: ShardIndex,
    models: Sequence[str],
    remaining: Callable[[str], Sequence[FoldRunFactory]],
    *,
    transforms: int = 1,
    in_parallel: bool = False,
    brief: bool = False,
) -> None:
    """Run the remaining trainings of every model one after the other. Call on all ranks.

    remaining: returns the trainings of a model that are not finished.
    transforms: number of transforms of the dihedral group in the predictions after training.
    in_parallel, brief: see `run_folds`.
    """
    for name in models:
        check_train_settings(model_config(experiment, name).train)
    matched, extra = open_extra_sets(experiment, index), None
    trainings = {name: remaining(name) for name in models}
    order = [name for name in models for _ in trainings[name]]
    note = Notes(quiet=brief)
    with Stop() as stop:
        for name in dict.fromkeys(order):
            accelerator = parallel.start_training(experiment.models[name].train, experiment.rank_timeout)
            on_main(lambda: experiment.folder.mkdir(parents=True, exist_ok=True))
            if extra is None:
                extra = without_shared_photos(matched, index, experiment, accelerator, stop.check)
            model_inputs = open_training_inputs(
                experiment, name, index, accelerator,
                extra=extra, transforms=transforms, note=note, after_chunk=stop.check,
            )  # fmt: skip
            for position, create in enumerate(trainings[name]):
                stop.check_now()  # a request that arrived while the previous training ended
                number = order.index(name) + position
                later = later_seconds(experiment, order, number)
                run = experiment.folder.resolve().name
                display = Display(run, number + 1, len(order), brief or position > 0, in_parallel, later)
                training = create(model_inputs=model_inputs, stop=stop, display=display)
                with lock_fold(training.path):
                    training.run()


@dataclass(frozen=True)
class _Outcome:
    """What fold.json records of a training. changes: see `Trainer.train`.  init: of `models.NAME.init`."""

    changes: list[dict[str, Any]]
    init: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class FoldRun:
    """Training and prediction of one fold of one model.

    assignment: fold of each lesion (N,), -1 without a label.  on_start, on_validation: see `run_folds`.
    """

    experiment: Experiment
    name: str
    fold: int
    assignment: np.ndarray
    model_inputs: ModelInputs
    stop: Stop
    display: Display
    on_start: OnStart = lambda: None
    on_validation: OnValidation | None = None

    @property
    def path(self) -> Path:
        return self.experiment.fold_folder(self.name, self.fold)

    @property
    def key(self) -> int | str:
        """What the hashes of the training contain of its lesions, see `result_hash`."""
        return self.fold

    @property
    def title(self) -> str:
        """The name of the training in logs."""
        return f"{self.name} fold {self.fold}"

    @property
    def train(self) -> TrainConfig:
        return self.model.train

    @property
    def epochs(self) -> int:
        """Number of epochs to train, of the `train.epochs` of the schedule."""
        return self.train.epochs

    @property
    def extra_info(self) -> dict[str, Any]:
        """Additional values of fold.json."""
        return {}

    @cached_property
    def folder(self) -> FoldFolder:
        training = (self.experiment, self.index, self.name, self.key)
        return FoldFolder(self.path, result_hashes(*training), resume_hashes(*training))

    @property
    def index(self) -> ShardIndex:
        return self.model_inputs.loaders.index

    @property
    def model(self) -> ModelConfig:
        return self.experiment.models[self.name]

    @property
    def validation_rows(self) -> np.ndarray:
        """Index rows of the fold."""
        return np.flatnonzero(self.assignment == self.fold)

    @property
    def train_rows(self) -> np.ndarray:
        """Index rows to train on; extra sets add others, see `ModelInputs.extra_rows`."""
        return np.flatnonzero((self.assignment >= 0) & (self.assignment != self.fold))

    def run(self) -> None:
        """Train, predict the held-out lesions, and write fold.json. Halves the micro-batch when memory runs out."""
        if on_main(self.folder.is_trained):  # its folder was moved aside, or predicted with other transforms
            on_main(self.folder.claim)
            self.update()
            return
        micro_batch = MicroBatch(self.path, self.folder.result_hash, self.train)
        while (outcome := self._attempt(micro_batch)) is None:
            for loaders in (self.model_inputs.training, self.model_inputs.loaders):
                if isinstance(loaders.source, CanvasSource):
                    loaders.source.free_buffers()
            gc.collect()  # tensors of the attempt that ran out of memory
            torch.cuda.empty_cache()
        if not self.train.keep_checkpoints:
            on_main(partial(mark_checkpoints_obsolete, self.path))
        on_main(partial(self._write, outcome))
        on_main(partial(remove_obsolete_checkpoints, self.path))

    def update(self) -> None:
        """Update the files of a finished training: predict again if predictions lack or have other transforms."""
        if on_main(lambda: is_fold_finished(self.experiment, self.index, self.name, self.fold)):
            return
        accelerator = parallel.start_inference(self.train.precision, self.experiment.rank_timeout)
        predict = partial(self._predict, accelerator)
        with_smaller_batches(predict, self.experiment.predict.batch, "predict.batch")
        transforms = counted(self.experiment.oof.tta, "transform")
        done = f"{len(self.validation_rows):,} held-out lesions predicted again, mean of {transforms}"
        accelerator.print(wrapped(f"{self.title}: {done}"), flush=True)

    def _attempt(self, micro_batch: MicroBatch) -> _Outcome | None:
        """Train and write predictions. Returns None if memory ran out; the next attempt uses a smaller micro-batch."""
        size = micro_batch.agreed()
        config = self.train.model_copy(update={"micro_batch": size})
        # A new Accelerator for each training: DeepSpeed binds it to one engine.
        accelerator = parallel.start_training(config)
        with micro_batch.fits(size) as attempt:
            outcome = self._train(config, accelerator)
            if cpu_precision.is_measured(config, accelerator):
                accelerator = parallel.start_training(config)  # held-out lesions are predicted in fp32
            if len(self.validation_rows):
                self._predict(accelerator, size)
        if attempt.failed:
            return None
        accelerator.free_memory()
        return outcome

    def _new_network(self, accelerator: Accelerator) -> tuple[Network, dict[str, Any] | None]:
        """Return the initial network, on the device, and what fold.json records of `models.NAME.init`."""
        torch.manual_seed(self.experiment.seed_of(self.name) * 1_009 + self.fold)
        network, about = new_network(self.model, self.model_inputs), None
        if network.reads_mean_tokens and self.model_inputs.token_shape is not None:
            network.load_state_dict(on_main(partial(self._fit_inputs, network)), strict=False)
        if start := self.model_inputs.start:
            # What is cached is the same for all folds (`training_tower`), and all of a network is from one other.
            is_cached = self.model.tower.cached
            predicted = np.flatnonzero(self.assignment >= 0) if is_cached else self.validation_rows
            transfer = transfer_weights(network, self.model, start.choose(predicted))
            accelerator.print(wrapped(f"{self.title}: {transfer.describe()}"), flush=True)
            about = {**transfer.json(), "networks": [each.weights for each in start.networks]}
        add_trained_parts(network, self.model, self.index.task)
        return network.to(accelerator.device), about

    def _fit_inputs(self, network: Network) -> dict[str, torch.Tensor]:
        """Fit the buffers that the network computes once from the training lesions, and return all buffers."""
        index, rows = self.index, self.train_rows
        tables = (torch.from_numpy(each[rows]).float() for each in (index.concept_scores, index.metadata))
        network.fit_inputs(mean_tokens(self.model_inputs, rows), *tables)
        return dict(network.named_buffers())

    def _train(self, config: TrainConfig, accelerator: Accelerator) -> _Outcome:
        """Train or resume."""
        train_rows = np.concatenate([self.train_rows, self.model_inputs.extra_rows])
        data = TrainingData(self.model_inputs.training, train_rows, self.model_inputs.loaders, self.validation_rows)
        network, init = self._new_network(accelerator)
        why = ""
        if cpu_precision.is_measured(config, accelerator):
            folder = self.experiment.folder / self.name
            precision, why = on_main(partial(cpu_precision.choose, network, config.micro_batch, folder))
            config = config.model_copy(update={"precision": precision})
            accelerator = parallel.start_training(config)
        trainer = Trainer(
            name=self.title, network=network, config=config, data=data,
            folder=self.folder, seed=self.experiment.seed_of(self.name), accelerator=accelerator, epochs=self.epochs,
            display=self.display, why_precision=why,
        )  # fmt: skip
        return _Outcome(trainer.train(self.stop, self.on_start, self.on_validation), init)

    def _predict(self, accelerator: Accelerator, micro_batch: int) -> None:
        """Predict the validation rows, with all inputs and with each input treated as missing, and write both."""
        # A new network, since the trained one may be sharded or hold other weights than the selected ones.
        network = load_network(self.model, self.model_inputs, self.path)
        network = accelerator.prepare_model(network.to(accelerator.device), evaluation_mode=True)
        hidden = (None, *self.hidden_inputs)
        about = self.index, self.name, self.model.head, self.fold, read_info(self.path / "weights")["sha256"]
        with ExitStack() as stack:
            # predictions.parquet is complete after the other files, since it marks a fold as predicted.
            writers = {name: stack.enter_context(self._writer(name)) for name in hidden} if is_main() else {}
            for name, part in evaluate_parts(
                network, self.model_inputs.loaders, self.validation_rows, accelerator, micro_batch=micro_batch,
                hidden=hidden, transforms=self.experiment.oof.tta, after_batch=self.stop.check,
            ):  # fmt: skip
                writers[name](as_predictions(part, *about))

    def _writer(self, hidden: str | None) -> AbstractContextManager[Callable[[Predictions], None]]:
        """Return the writer of the file of predictions with all inputs, or with one treated as missing."""
        file, extra = ("predictions", {}) if hidden is None else (f"without_{hidden}", {"hidden": hidden})
        return predictions_writer(self.path / f"{file}.parquet", transforms=self.experiment.oof.tta, **extra)

    @property
    def hidden_inputs(self) -> tuple[str, ...]:
        """Inputs that are treated as missing in turn in further predictions."""
        return hidden_inputs(self.model, self.index.signature)

    def _write(self, outcome: _Outcome) -> None:
        """Write fold.json, which marks the training as finished."""
        write_info(
            self.path / "fold",
            identity=self.folder.result_hash,
            model=redact_tree(self.model.model_dump(mode="json")),
            task=self.index.task.to_mapping(),
            concepts=self.index.concepts,
            fold=self.fold,
            weights=read_info(self.path / "weights")["sha256"],
            tower=self.model_inputs.tower.name,
            photos={"canvas": self.index.canvas, "short_side": self.index.short_side},
            changes=outcome.changes,
            **({"extra": [each.json() for each in self.model_inputs.extra]} if self.model_inputs.extra else {}),
            **({"init": outcome.init} if outcome.init else {}),
            **({"extra_towers": list(self.model_inputs.extra_towers)} if self.model_inputs.extra_towers else {}),
            **self.extra_info,
        )
