"""Embeddings of a pretrained tower without training: the mean token of each photo, the task's views concatenated."""

from __future__ import annotations

from functools import partial

import numpy as np

from triderm_dist.config import Experiment, ModelConfig
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.token_cache import TokenCache
from triderm_dist.data.token_source import TokenSource
from triderm_dist.distributed import parallel
from triderm_dist.distributed.collectives import interrupt_on_lost_rank, on_main
from triderm_dist.engine.fold import check_run_task, model_config
from triderm_dist.engine.model_inputs import open_inputs
from triderm_dist.engine.model_tower import recorded_tower
from triderm_dist.engine.token_extraction import PLAIN
from triderm_dist.models.tower_record import FOLDER, TowerRecord, find_tower, save_tower


def frozen_model(model: ModelConfig) -> ModelConfig:
    """Return the settings of a model whose own tower is frozen, and read alone: the one that embeddings are from."""
    return model.model_copy(update={"extra_towers": (), "tower": model.tower.model_copy(update={"frozen": True})})


@interrupt_on_lost_rank()
def embeddings(experiment: Experiment, index: ShardIndex, name: str) -> tuple[np.ndarray, TowerRecord]:
    """Return (N, views * D) float32 from the pretrained tower of model NAME, through the token cache, and the tower.

    Uses the tower in OUTPUT/towers with these settings if there is one; else builds it from its source and stores it
    there. Call on all ranks. Raises DataError if the run has folds of another task than that of `index`.
    """
    check_run_task(experiment, index)
    model = model_config(experiment, name)
    accelerator = parallel.start_inference(model.train.precision, experiment.rank_timeout)
    recorded = on_main(partial(find_tower, experiment.folder / FOLDER, model.tower, True))
    frozen = frozen_model(model)
    tower = recorded_tower(experiment, frozen, recorded)
    on_main(partial(save_tower, experiment.folder / FOLDER, tower.record, tower.frozen))
    source = open_inputs(experiment, frozen, index, accelerator, tower).loaders.source
    assert isinstance(source, TokenSource) and isinstance(source.cache, TokenCache)
    cache, num_views = source.cache, len(source.views)
    result = np.empty((len(index), num_views, cache.shape[1]), np.float32)
    for chunk in cache.chunks:
        for rows in cache.parts(chunk):
            for view in range(num_views):
                result[rows, view] = cache.numbers(rows, view, PLAIN).mean(axis=1, dtype=np.float32)
    return result.reshape(len(index), -1), tower.record
