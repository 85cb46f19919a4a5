"""Start of a rank, and the plan of an epoch."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.scale_rows import Row, packed_set

WORLD, RANK, GLOBAL_BATCH = 1024, 5, 8192


def open_set(n: int, folder: Path) -> Any:
    """Open the set with the caches of a node in `folder`, as a rank does; return its settings and its index."""
    from triderm_dist.config import Experiment
    from triderm_dist.data.shards.open import open_index

    os.environ.update(XDG_CACHE_HOME=str(folder / "cache"), RANK=str(RANK), WORLD_SIZE=str(WORLD))
    path = packed_set(n, folder)
    experiment = Experiment.model_validate({"data": {"shards": str(path)}})
    return experiment, open_index(path, experiment.data.remote)


def prepare_set(n: int, folder: Path) -> None:
    packed_set(n, folder)


def prepare_node(n: int, folder: Path) -> None:
    first_start(n, folder)


def first_start(n: int, folder: Path) -> None:
    """Do what the first process of a node does for all: write the columns that they map, and assign the folds."""
    from triderm_dist.engine.fold import assigned_folds

    experiment, index = open_set(n, folder)
    assigned_folds(index, experiment.data)


def start_rank(n: int, folder: Path) -> None:
    """Do what `triderm train` does with the set up to the first micro-batch of a rank, its photos left out."""
    import numpy as np

    from triderm_dist.data.loader import LoaderFactory
    from triderm_dist.data.plan import EpochPlan
    from triderm_dist.doctor.preflight import check_training, lesions_of
    from triderm_dist.engine.epochs import Epochs, TrainingData
    from triderm_dist.engine.fold import assigned_folds

    experiment, index = open_set(n, folder)
    check_training(experiment, lesions_of(index))
    index.notes(), index.flow()
    folds = assigned_folds(index, experiment.data)
    train, validation = np.flatnonzero((folds >= 0) & (folds != 0)), np.flatnonzero(folds == 0)
    loaders: Any = LoaderFactory(index, None)  # type: ignore[arg-type]
    model = experiment.models[next(iter(experiment.models))]
    config = model.train.model_copy(update={"global_batch": GLOBAL_BATCH})
    epochs = Epochs(config, TrainingData(loaders, train, loaders, validation), seed=0)
    plan: EpochPlan = epochs._plan(0)
    batch = next(iter(plan.batches(RANK, WORLD, GLOBAL_BATCH)))
    index.inputs(batch.rows), index.offsets[batch.rows], index.shard[batch.rows]


def plan_epoch(n: int, folder: Path) -> dict[str, float]:
    """Order an epoch and take one rank's part of it."""
    import numpy as np

    from triderm_dist.data.plan import EpochPlan, Samples, Sampling

    _, index = open_set(n, folder)
    samples = Samples.of(index, np.arange(n))
    began = time.process_time()
    for _ in EpochPlan(samples, Sampling("balanced"), 0, 0).batches(RANK, WORLD, GLOBAL_BATCH):
        pass
    return {"cpu_s": time.process_time() - began}


ROWS = (
    Row("first start", first_start, prepare_set),
    Row("start of a rank", start_rank, prepare_node),
    Row("plan", plan_epoch, prepare_node),
)
