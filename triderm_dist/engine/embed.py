"""Embeddings of an untouched pretrained tower: the mean of its tokens of each photo, both views beside each other."""

from __future__ import annotations

import numpy as np

from triderm_dist.config import Experiment
from triderm_dist.data.loader import TokenSource
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed import collectives, parallel
from triderm_dist.engine.fold import model_config
from triderm_dist.engine.views import PLAIN, open_views
from triderm_dist.schema import VIEWS


def embeddings(experiment: Experiment, index: ShardIndex, name: str) -> np.ndarray:
    """(N, 2 D) float32 of the tower that model NAME starts from, by way of the token cache; call on all ranks."""
    model = model_config(experiment, name)
    frozen = model.model_copy(update={"tower": model.tower.model_copy(update={"frozen": True})})
    accelerator = parallel.start(model.train.precision, 1, collectives.world_size(), 1.0, experiment.rank_timeout)
    views = open_views(
        frozen,
        index,
        experiment.token_folder,
        accelerator,
        experiment.data,
        seed=experiment.seed_of_tokens,
        train=False,
    )
    assert isinstance(views.source, TokenSource)
    cache = views.source.cache
    result = np.empty((len(index), len(VIEWS), cache.shape[1]), np.float32)
    for chunk in cache.chunks:
        rows = cache.rows(chunk)
        tokens = np.empty((len(rows), *cache.shape), np.float16)
        for view in range(len(VIEWS)):
            cache.read(rows, view, [PLAIN] * len(rows), tokens)
            result[rows, view] = tokens.mean(axis=1, dtype=np.float32)
    return result.reshape(len(index), -1)
