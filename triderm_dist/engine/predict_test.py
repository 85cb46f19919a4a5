"""Predict a test set with every fold's model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from triderm_dist.config import Experiment
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed import collectives, parallel
from triderm_dist.distributed.collectives import on_main
from triderm_dist.engine.checkpoint import load_weights, read_about, save_about
from triderm_dist.engine.evaluate import evaluate
from triderm_dist.engine.fold import as_predictions, model_config, new_network
from triderm_dist.engine.views import Views, open_views
from triderm_dist.predictions import NO_FOLD, Predictions, write_predictions
from triderm_dist.schema import CheckpointError, DataError


@collectives.interrupt_on_lost_rank()
def predict_test(experiment: Experiment, index: ShardIndex, models: Iterable[str]) -> None:
    """Every fold's model predicts every lesion of `index`, averaged over the test-time transforms; call on all ranks.

    Leaves OUTPUT/MODEL/fold-K/test.parquet. Raises DataError where a fold is not trained, or where the test set has
    other concepts.
    """
    for name in models:
        model = model_config(experiment, name)
        views: Views | None = None
        for fold in range(experiment.data.folds):
            folder = experiment.fold_folder(name, fold)
            if not (folder / "fold.json").exists():
                raise DataError(f"{folder}: this fold is not trained; run triderm crossval first")
            about = read_about(folder / "fold")
            if tuple(about["concepts"]) != index.concepts:
                raise DataError(
                    f"{index.folder}: the test set's concepts are not those of training; pack it from matching metadata"
                )
            transforms = experiment.predict.transforms
            stamp = hashlib.sha256(f"{about['weights']} {index.fingerprint} {transforms}".encode()).hexdigest()
            if _test_stamp(folder) == stamp and (folder / "test.parquet").exists():
                continue
            accelerator = parallel.start(
                model.train.precision, 1, collectives.world_size(), 1.0, experiment.rank_timeout
            )
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


def _test_stamp(folder: Path) -> str | None:
    try:
        return read_about(folder / "test").get("stamp")
    except CheckpointError:
        return None
