"""One fold of one model, from packed photos to the predictions of lesions it never saw; and all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch

from triderm_dist.config import Experiment
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed import collectives, parallel
from triderm_dist.distributed.collectives import on_main
from triderm_dist.distributed.out_of_memory import MicroBatch
from triderm_dist.distributed.stop import Stop
from triderm_dist.engine.checkpoint import load_weights, read_about, save_about
from triderm_dist.engine.evaluate import evaluate
from triderm_dist.engine.fold import (
    as_predictions,
    assigned_folds,
    is_done,
    model_config,
    new_network,
    result_hash,
    resume_hash,
)
from triderm_dist.engine.fold_folder import FoldFolder, exclusive
from triderm_dist.engine.trainer import Trainer, TrainingData
from triderm_dist.engine.views import Views, open_views
from triderm_dist.predictions import write_predictions
from triderm_dist.schema import VIEWS


@collectives.interrupt_on_lost_rank()
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
    assignment = assigned_folds(index, experiment.data)
    with Stop() as stop:
        for name in models:
            model = model_config(experiment, name)
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
                with exclusive(experiment.fold_folder(name, fold)):
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
    stamp = result_hash(experiment, index, name, fold)
    place = FoldFolder(folder, stamp, resume_hash(experiment, index, name, fold))
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
        trainer = Trainer(
            name=f"{name} fold {fold}", network=new_network(model, index.concepts, views).to(accelerator.device),
            head=model.head, config=config, data=data, folder=place, seed=experiment.seed, accelerator=accelerator,
        )  # fmt: skip
        changes = trainer.train(stop, on_start, on_validation)
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
