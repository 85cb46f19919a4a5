"""One fold of one model, from packed photos to the predictions of lesions it never saw; and all of them."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from triderm_dist.config import DataConfig, Experiment, ModelConfig
from triderm_dist.data.folds import assign_folds
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed import collectives, parallel
from triderm_dist.distributed.collectives import on_main
from triderm_dist.distributed.out_of_memory import MicroBatch
from triderm_dist.distributed.stop import Stop
from triderm_dist.engine.checkpoint import load_weights, read_about, save_about
from triderm_dist.engine.evaluate import Evaluation, evaluate
from triderm_dist.engine.fold_folder import FoldFolder, alone, is_finished
from triderm_dist.engine.tokens import Views, open_views
from triderm_dist.engine.trainer import TrainingData, train
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.network import Network
from triderm_dist.predictions import NO_FOLD, Predictions, write_predictions
from triderm_dist.schema import VIEWS, CheckpointError, ConfigError, DataError


def folds_of(index: ShardIndex, data: DataConfig) -> np.ndarray:
    """The fold of each lesion, (N,) int64, -1 for lesions without a label."""
    return assign_folds(index.labels, index.groups, data.folds, data.fold_seed)


@collectives.in_touch()
def run_folds(
    experiment: Experiment,
    index: ShardIndex,
    models: Iterable[str],
    folds: Iterable[int],
    on_validation: Callable[[int, dict[str, float]], None] | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Train every fold of every model one after the other on all ranks, skipping what is done. Call on all ranks.

    Leaves OUTPUT/MODEL/fold-K/{weights.safetensors, fold.json, metrics.jsonl, predictions.parquet}, and
    without_VIEW.parquet: the same lesions predicted as if one photo had never been taken. `on_start` is called on rank
    0 when a fold's settings have passed all checks; before it nothing of an earlier run is touched. Raises Interrupted
    where it was asked to stop or lost another rank, InputError where another run trains the same fold.
    """
    folds = list(folds)
    assignment = folds_of(index, experiment.data)
    with Stop() as stop:
        for name in models:
            model = model_named(experiment, name)
            todo = [fold for fold in folds if not is_done(experiment, index, name, fold)]
            if not todo:
                continue
            train_config = model.train
            accelerator = parallel.start(
                train_config.precision, train_config.micro_batch, train_config.global_batch,
                train_config.optim.clip_norm, experiment.rank_timeout,
            )  # fmt: skip
            on_main(lambda: experiment.folder.mkdir(parents=True, exist_ok=True))
            views = open_views(
                model, index, experiment.token_folder, accelerator, experiment.data,
                seed=experiment.seed_of_tokens, train=True, between=stop.check,
            )  # fmt: skip
            for fold in todo:
                stop.check_now()  # what came while the fold before ended
                with alone(experiment.fold_folder(name, fold)):
                    while not _run_fold(
                        experiment, index, assignment, name, fold, views, stop, on_validation, on_start
                    ):
                        gc.collect()  # what the attempt that ran out of memory held
                        torch.cuda.empty_cache()


def _run_fold(
    experiment: Experiment,
    index: ShardIndex,
    assignment: np.ndarray,
    name: str,
    fold: int,
    views: Views,
    stop: Stop,
    on_validation: Callable[[int, dict[str, float]], None] | None,
    on_start: Callable[[], None],
) -> bool:
    """Train and predict one fold; False where memory ran out and a smaller micro-batch is to be tried."""
    model, folder = experiment.models[name], experiment.fold_folder(name, fold)
    stamp = fold_stamp(experiment, index, name, fold)
    place = FoldFolder(folder, stamp, fold_identity(experiment, index, name, fold))
    if on_main(place.done):
        on_main(place.take)
        return True
    memory = MicroBatch(folder, stamp, model.train.micro_batch, model.train.global_batch)
    config = model.train.model_copy(update={"micro_batch": memory.agreed()})
    # A fresh one for each training: DeepSpeed binds an Accelerator to one engine.
    accelerator = parallel.start(config.precision, config.micro_batch, config.global_batch, config.optim.clip_norm)
    train_rows = np.flatnonzero((assignment >= 0) & (assignment != fold))
    validation_rows = np.flatnonzero(assignment == fold)
    data = TrainingData(
        index, views.source, train_rows, validation_rows, experiment.data.workers, experiment.data.prefetch
    )
    with memory.fits(config.micro_batch) as attempt:
        torch.manual_seed(experiment.seed * 1_009 + fold)
        changes = train(
            f"{name} fold {fold}", new_network(model, index.concepts, views).to(accelerator.device), model.head,
            config, data, accelerator, place, experiment.seed, stop, on_start, on_validation,
        )  # fmt: skip
        # A network of its own: that of the training may be sharded, or hold other than the selected weights.
        network = new_network(model, index.concepts, views, pretrained=False)
        load_weights(folder / "weights", network)
        network = accelerator.prepare_model(network.to(accelerator.device), evaluation_mode=True)
        judge = partial(
            evaluate, network, index, views.source, validation_rows, accelerator,
            micro_batch=config.micro_batch, workers=experiment.data.workers, prefetch=experiment.data.prefetch,
            between=stop.check,
        )  # fmt: skip
        evaluation = judge()
        # How much a lesion with one photo loses can only be told of lesions that have both.
        hidden = {view: judge(hide=view) for view in VIEWS} if set(VIEWS) <= set(model.use) else {}
    if attempt.failed:
        return False

    def write() -> None:
        digest = read_about(folder / "weights")["sha256"]
        about = (index, name, model.head, fold, digest)
        for view, seen in hidden.items():
            write_predictions(folder / f"without_{view}.parquet", as_predictions(seen, *about), hidden=view)
        write_predictions(folder / "predictions.parquet", as_predictions(evaluation, *about))
        save_about(
            folder / "fold",
            identity=stamp,
            model=model.model_dump(mode="json"),
            concepts=index.concepts,
            fold=fold,
            weights=digest,
            changes=changes,
        )

    on_main(write)
    accelerator.free_memory()
    return True


@collectives.in_touch()
def predict_test(experiment: Experiment, index: ShardIndex, models: Iterable[str]) -> None:
    """Every fold's model predicts every lesion of `index`, averaged over the test-time transforms; call on all ranks.

    Leaves OUTPUT/MODEL/fold-K/test.parquet. Raises DataError where a fold is not trained, or where the test set has
    other concepts.
    """
    for name in models:
        model = model_named(experiment, name)
        views: Views | None = None
        for fold in range(experiment.data.folds):
            folder = experiment.fold_folder(name, fold)
            if not (folder / "fold.json").exists():
                raise DataError(f"{folder}: this fold is not trained; run launch.crossval first")
            about = read_about(folder / "fold")
            if tuple(about["concepts"]) != index.concepts:
                raise DataError(
                    f"{index.folder}: the test set's concepts are not those of training; pack it from matching metadata"
                )
            transforms = experiment.predict.transforms
            stamp = hashlib.sha256(f"{about['weights']} {index.fingerprint} {transforms}".encode()).hexdigest()
            if _test_stamp(folder) == stamp and (folder / "test.parquet").exists():
                continue
            accelerator = parallel.start(model.train.precision, 1, collectives.world(), 1.0, experiment.rank_timeout)
            if views is None:
                views = open_views(
                    model, index, experiment.token_folder, accelerator, experiment.data,
                    seed=experiment.seed_of_tokens, train=False, transforms=transforms,
                )  # fmt: skip
            network = new_network(model, index.concepts, views, pretrained=False)
            load_weights(folder / "weights", network)
            network = accelerator.prepare_model(network.to(accelerator.device), evaluation_mode=True)
            evaluation = evaluate(
                network, index, views.source, np.arange(len(index)), accelerator, micro_batch=experiment.predict.batch,
                transforms=transforms, workers=experiment.data.workers, prefetch=experiment.data.prefetch,
            )  # fmt: skip
            predictions = as_predictions(evaluation, index, name, model.head, NO_FOLD, about["weights"])
            on_main(partial(_write_test, folder, predictions, transforms, stamp))
            accelerator.print(
                f"{name} fold {fold}: {len(index)} test lesions predicted, mean of {transforms} transforms", flush=True
            )


def _write_test(folder: Path, predictions: Predictions, transforms: int, stamp: str) -> None:
    write_predictions(folder / "test.parquet", predictions, split="test", transforms=transforms)
    save_about(folder / "test", stamp=stamp)


def new_network(model: ModelConfig, concepts: tuple[str, ...], views: Views, pretrained: bool = True) -> Network:
    """A network on the views' tokens, or with towers of its own; pretrained False where weights are loaded
    afterwards.
    """
    if views.tokens is not None:
        return build_network(model, concepts, views.tokens)
    tower = model.tower if pretrained else model.tower.model_copy(update={"pretrained": False})
    return build_network(model, concepts, build_towers(tower))


def as_predictions(
    evaluation: Evaluation, index: ShardIndex, name: str, head: str, fold: int, model_hash: str
) -> Predictions:
    """The table of what one model said about `evaluation.rows`."""
    rows = evaluation.rows
    return Predictions(
        lesion_ids=index.lesion_ids[rows],
        groups=index.groups[rows],
        labels=index.labels[rows],
        fold=fold,  # type: ignore[arg-type]
        model=name,  # type: ignore[arg-type]
        model_hash=model_hash,  # type: ignore[arg-type]
        head=head,  # type: ignore[arg-type]
        logits=evaluation.logits,
        aux_clinical=evaluation.aux_clinical,
        aux_dermoscopic=evaluation.aux_dermoscopic,
        features=evaluation.features,
        concepts=index.concept_scores[rows],
        metadata=index.metadata[rows],
        concept_names=index.concepts,
    )


def model_named(experiment: Experiment, name: str) -> ModelConfig:
    """Raises ConfigError for a name that is not under `models`."""
    if name not in experiment.models:
        raise ConfigError(f"model={name}: the settings have the models {', '.join(experiment.models)}")
    return experiment.models[name]


def is_done(experiment: Experiment, index: ShardIndex, name: str, fold: int) -> bool:
    """Whether this fold has been trained and predicted with these settings and these data."""
    return is_finished(experiment.fold_folder(name, fold), fold_stamp(experiment, index, name, fold))


COSMETIC = ("log_every", "save_every", "keep_last", "trackers", "profile", "peak_tflops")
EXECUTION = ("micro_batch", "precision", "activation_checkpointing", "compile")


def fold_stamp(experiment: Experiment, index: ShardIndex, name: str, fold: int, *, leave: Iterable[str] = ()) -> str:
    """A hash of all that the fold's result depends on, but for the keys of `train` to `leave` out."""
    model = experiment.models[name].model_dump(mode="json")
    for key in (*COSMETIC, *leave):
        section, _, key = key.rpartition(".")
        (model["train"][section] if section else model["train"]).pop(key)
    content = [model, experiment.seed, experiment.data.folds, experiment.data.fold_seed, fold, index.fingerprint]
    if experiment.token_seed is not None:
        content.append(experiment.token_seed)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fold_identity(experiment: Experiment, index: ShardIndex, name: str, fold: int) -> str:
    """A hash of all that a training must share with a checkpoint to go on from it: not how a step is executed, so that
    it may go on on another card, and not the learning rate, so that one that diverged may go on with a lower one.
    """
    return fold_stamp(experiment, index, name, fold, leave=(*EXECUTION, "optim.lr", "optim.min_lr"))


def _test_stamp(folder: Path) -> str | None:
    try:
        return read_about(folder / "test").get("stamp")
    except CheckpointError:
        return None
