"""Predict a test set with the networks of all folds, or with refitted ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from triderm_dist.config import Experiment, Networks
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed import collectives, parallel
from triderm_dist.distributed.collectives import is_main, on_main
from triderm_dist.distributed.out_of_memory import with_smaller_batches
from triderm_dist.engine.evaluate import evaluate_parts
from triderm_dist.engine.fold import (
    as_predictions,
    load_network,
    model_config,
    network_folders,
    trained_fold,
)
from triderm_dist.engine.model_inputs import ModelInputs, Notes, open_inputs
from triderm_dist.engine.model_tower import recorded_tower
from triderm_dist.engine.network_files import read_info, write_info
from triderm_dist.models.tower_record import TowerRecord
from triderm_dist.predictions import NO_FOLD, TEST, predictions_writer
from triderm_dist.runtime.terminal import counted, wrapped
from triderm_dist.schema import CheckpointError


@collectives.interrupt_on_lost_rank()
def predict_test(
    experiment: Experiment, index: ShardIndex, models: Iterable[str], networks: Networks = "folds"
) -> None:
    """Predict every lesion of `index` with each of the networks, averaged over the test-time transforms.

    Call on all ranks. Writes test.parquet into the folder of each network, MODEL/fold-K or refit/MODEL, unless it is up
    to date. Raises DataError if a network is not trained, or if the test set is of another task or has other concepts.
    """
    models = list(models)
    folders = {name: network_folders(experiment, name, networks) for name in models}
    batch = experiment.predict.batch
    note = Notes()
    for name in models:
        model = model_config(experiment, name)
        opened: dict[TowerRecord | None, ModelInputs] = {}
        for folder in folders[name]:
            trained, index = trained_fold(folder, index)
            transforms = experiment.predict.transforms
            inputs = hashlib.sha256(f"{trained.weights} {index.fingerprint} {transforms}".encode()).hexdigest()
            if _inputs_hash(folder) == inputs and (folder / "test.parquet").exists():
                continue
            accelerator = parallel.start_inference(model.train.precision, experiment.rank_timeout)
            record = trained.tower
            if record not in opened:
                opened[record] = open_inputs(
                    experiment, model, index, accelerator, recorded_tower(experiment, model, record),
                    transforms=transforms, note=note,
                )  # fmt: skip
            model_inputs = opened[record]
            network = load_network(model, model_inputs, folder)
            network = accelerator.prepare_model(network.to(accelerator.device), evaluation_mode=True)
            about = index, name, model.head, NO_FOLD, trained.weights, trained.refit_of
            write = partial(
                _predict, folder / "test.parquet", network, model_inputs.loaders, accelerator, transforms, about
            )
            # A process killed before test.json is written must not leave that of the earlier predictions.
            on_main(partial((folder / "test.json").unlink, missing_ok=True))
            _, batch = with_smaller_batches(write, batch, "predict.batch")
            on_main(partial(write_info, folder / "test", stamp=inputs))
            title = f"{name} {'refit' if networks == 'refit' else folder.name.replace('-', ' ')}"
            done = f"{len(index):,} test lesions predicted, mean of {counted(transforms, 'transform')}"
            accelerator.print(wrapped(f"{title}: {done}"), flush=True)


def _predict(
    path: Path,
    network: nn.Module,
    loaders: LoaderFactory[ShardIndex],
    accelerator: Accelerator,
    transforms: int,
    about: tuple[Any, ...],
    batch: int,
) -> None:
    """Predict all lesions and write the file on rank 0. about: further arguments of `as_predictions`."""
    rows = np.arange(len(loaders.index))
    writer = predictions_writer(path, split=TEST, transforms=transforms) if is_main() else nullcontext(lambda _: None)
    with writer as write:
        for _, part in evaluate_parts(network, loaders, rows, accelerator, micro_batch=batch, transforms=transforms):
            write(as_predictions(part, *about))


def _inputs_hash(folder: Path) -> str | None:
    """Return the hash of the weights, test set and transforms of test.parquet; None without it."""
    try:
        return read_info(folder / "test").get("stamp")
    except CheckpointError:
        return None
