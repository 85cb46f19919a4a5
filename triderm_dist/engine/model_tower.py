"""The tower of a model: as its settings say, for training; as a run has recorded it, for prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from triderm_dist.config import Experiment, ModelConfig
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed.collectives import is_main
from triderm_dist.engine.extra_towers import ExtraTower, join_towers
from triderm_dist.engine.init_overlap import WarmStart
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.engine.warm_start import transfer_tower, transfer_weights
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.network import SHARED
from triderm_dist.models.tower import Tower, tower_hash
from triderm_dist.models.tower_record import FOLDER, TowerRecord, find_tower, load_tower
from triderm_dist.schema import UNLABELED, InputError


@dataclass(frozen=True)
class ModelTower:
    """The tower of a model, as far as the inputs of the model depend on it (`engine.model_inputs`).

    record: of the tower that the network is built on.  frozen: the tower with its weights; None for one that trains.
    for_training: read augmented photos too, and the cached output of frozen blocks.
    frozen_blocks: {key in the network: (tower, its views)} of towers whose frozen blocks are cached; {} if none are.
    extra: what fold.json records of the extra towers that `frozen` is joined with.
    """

    record: TowerRecord
    frozen: Tower | None
    for_training: bool
    frozen_blocks: Mapping[str, tuple[Tower, tuple[str, ...]]] = field(default_factory=dict)
    extra: Sequence[dict[str, Any]] = ()


def training_tower(
    experiment: Experiment,
    model: ModelConfig,
    index: ShardIndex,
    start: WarmStart | None = None,
    extra: Sequence[ExtraTower] = (),
) -> ModelTower:
    """Open the tower for the trainings of a model.

    start: networks that may provide the weights of a frozen tower and of frozen blocks.  extra: towers to join it with.
    """
    labeled = np.flatnonzero(index.labels != UNLABELED)
    network = start.choose(labeled) if start and model.tower.cached else None
    record, frozen = open_tower(experiment, model, pretrained=True, start=network)
    if frozen is None:
        blocks = _frozen_blocks(experiment, model, index, network) if model.tower.cached else {}
        return ModelTower(record, None, True, blocks)
    if not extra:
        return ModelTower(record, frozen, True)
    record, joined, described = join_towers(model, record, frozen, extra, labeled)
    return ModelTower(record, joined, True, extra=described)


def recorded_tower(experiment: Experiment, model: ModelConfig, recorded: TowerRecord | None) -> ModelTower:
    """Open the tower for the predictions of a model. recorded: see `open_tower`."""
    return ModelTower(*open_tower(experiment, model, recorded), for_training=False)


def open_tower(
    experiment: Experiment,
    model: ModelConfig,
    recorded: TowerRecord | None = None,
    pretrained: bool = False,
    start: TrainedNetwork | None = None,
) -> tuple[TowerRecord, Tower | None]:
    """Return the record of a model's tower, and the tower with its weights if it is frozen, else None.

    recorded: the run's record of the tower, which needs no pretrained file. None builds the tower of the settings; if
    its source is missing, the tower that the run recorded for these settings is used.
    pretrained: load the weights of a tower that trains too, to check that they exist.
    start: the network whose weights a frozen tower gets.
    Raises as `build_towers`, `load_tower` and `transfer_tower`.
    """
    frozen = model.tower.frozen
    if recorded:
        return recorded, load_tower(experiment.folder / FOLDER, recorded) if frozen else None
    torch.manual_seed(experiment.seed_of_tokens)  # a frozen tower with random weights is the same in every process
    weights = {} if pretrained or frozen else {"pretrained": False}
    try:
        tower = build_towers(model.tower.model_copy(update=weights))[0]
    except InputError as error:
        kept = find_tower(experiment.folder / FOLDER, model.tower, frozen)
        if kept is None:
            raise
        if is_main():
            print(f"note: {error}; the encoder of {experiment.folder / FOLDER} is used", flush=True)
        return open_tower(experiment, model, kept)
    if not frozen:
        return TowerRecord.of(tower, model.tower), None
    if start:
        transfer_tower(tower, start)
    return TowerRecord.of(tower, model.tower, tower_hash(tower)), tower


def _frozen_blocks(
    experiment: Experiment, model: ModelConfig, index: ShardIndex, start: TrainedNetwork | None
) -> dict[str, tuple[Tower, tuple[str, ...]]]:
    """Return {key in the network: (tower, its views)} of the towers whose frozen blocks are cached.

    start: the network that provides the weights; None for pretrained ones.
    """
    torch.manual_seed(experiment.seed_of_tokens)  # random weights are the same in every process
    network = build_network(model, index.signature, build_towers(model.tower, index.signature.views))
    if start:
        transfer_weights(network, model, start)
    network.skip_frozen()
    towers: dict[str, Tower] = dict(network.towers.items())  # type: ignore[arg-type]
    return {key: (tower, network.used_views if key == SHARED else (key,)) for key, tower in towers.items()}
