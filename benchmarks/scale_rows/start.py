"""Start of a rank, and the plan of an epoch."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.scale_rows import Row, packed_set

FOLDS, EPOCHS, WORLD, GLOBAL_BATCH = 5, 60, 1024, 8192


def prepare(n: int, folder: Path) -> None:
    packed_set(n, folder)


def start_rank(n: int, folder: Path) -> None:
    """Open the set, assign folds, count the steps of all epochs, and read the first batch's columns."""
    import numpy as np

    from triderm_dist.data.folds import assign_folds
    from triderm_dist.data.plan import EpochPlan, Samples, Sampling
    from triderm_dist.data.shards.index import read_index

    index = read_index(packed_set(n, folder))
    folds = assign_folds(index.labels, index.fold_groups, FOLDS, 0)
    samples = Samples.of(index, np.flatnonzero(folds > 0))
    sampling = Sampling("balanced")
    sum(EpochPlan(samples, sampling, 0, epoch).num_batches(GLOBAL_BATCH) for epoch in range(EPOCHS))
    batch = next(iter(EpochPlan(samples, sampling, 0, 0).batches(WORLD - 1, WORLD, GLOBAL_BATCH)))
    index.inputs(batch.rows)
    index.offsets[batch.rows]


def plan_epoch(n: int, folder: Path) -> dict[str, float]:
    """Order an epoch and take one rank's part of it."""
    import numpy as np

    from triderm_dist.data.plan import EpochPlan, Samples, Sampling
    from triderm_dist.data.shards.index import read_index

    index = read_index(packed_set(n, folder))
    samples = Samples.of(index, np.arange(n))
    began = time.process_time()
    for _ in EpochPlan(samples, Sampling("balanced"), 0, 0).batches(5, WORLD, GLOBAL_BATCH):
        pass
    return {"cpu_s": time.process_time() - began}


ROWS = (Row("start of a rank", start_rank, prepare), Row("plan", plan_epoch, prepare))
