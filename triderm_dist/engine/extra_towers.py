"""Frozen towers of other runs that a model uses in addition to its tower (`models.NAME.extra_towers`).

Their networks must not have been trained on any lesion that the run predicts (`engine.init_overlap`), in any fold,
since the tokens of a photo are computed once for all folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator

from triderm_dist.config import Experiment, ExtraTowerConfig, ModelConfig
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.engine.init_overlap import WarmStart, open_networks
from triderm_dist.engine.network_files import read_weights
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.engine.warm_start import fitting_tower, tower_weights
from triderm_dist.models import network_class
from triderm_dist.models.joined_tower import JoinedTower, Part, build_logits, describe_logits
from triderm_dist.models.network import SHARED
from triderm_dist.models.tower import Tower, tower_hash
from triderm_dist.models.tower_record import TowerRecord
from triderm_dist.schema import CheckpointError, ConfigError


@dataclass(frozen=True)
class ExtraTower:
    """An extra tower of a model. setting: its key.  start: the networks that may provide it."""

    setting: str
    config: ExtraTowerConfig
    start: WarmStart


def open_extra_towers(
    experiment: Experiment,
    name: str,
    index: ShardIndex,
    accelerator: Accelerator,
    after_file: Callable[[], None] = lambda: None,
) -> list[ExtraTower]:
    """Find the networks that `models.NAME.extra_towers` names, as `open_networks` does. Call on all ranks.

    Raises ConfigError if a run is not found, or if the model's network does not read mean tokens.
    """
    model, result = experiment.models[name], []
    if model.extra_towers and not network_class(model.kind).reads_mean_tokens:
        raise ConfigError(
            f"models.{name}.extra_towers: a network of kind {model.kind} reads all tokens of one tower; use kind mlp"
        )
    for number, each in enumerate(model.extra_towers):
        setting = f"extra_towers.{number}"
        start = open_networks(experiment, name, each.init, setting, index, accelerator, after_file)
        result.append(ExtraTower(f"models.{name}.{setting}", each, start))
    return result


def join_towers(
    model: ModelConfig, record: TowerRecord, tower: Tower, extra: Sequence[ExtraTower], rows: np.ndarray
) -> tuple[TowerRecord, JoinedTower, list[dict[str, Any]]]:
    """Join a model's tower with its extra ones: return the record, the tower, and what fold.json records of each extra.

    record: the record of `tower`.  rows: labeled lesions (n,) of the training set.
    Raises DataError if a network of an extra tower was trained on any of them, ConfigError if a tower takes photos of
    another size or normalization than the model's.
    """
    parts, described = [Part(tower, record.json())], []
    for each in extra:
        network = each.start.choose(rows)
        parts.append(_part(each, network, record))
        described.append(
            {
                "run": str(network.run), "network": network.name, "sha256": network.weights,
                "networks": [one.weights for one in each.start.networks], "logits": each.config.logits,
            }
        )  # fmt: skip
    report = "; ".join([tower.report, *(f"joined with {each.tower.report}" for each in parts[1:])])
    joined = JoinedTower(parts, report)
    return TowerRecord.of(joined, model.tower, tower_hash(joined)), joined, described


def _part(extra: ExtraTower, network: TrainedNetwork, main: TowerRecord) -> Part:
    """Load the tower of a trained network, and its auxiliary heads if the setting asks for them.

    main: the record of the model's own tower.
    """
    record = network.tower
    if record is None or record.is_joined:
        what = "records no tower" if record is None else "has extra towers itself"
        raise ConfigError(f"{extra.setting}: {network.folder} {what}; name another network")
    its, own = ((each.image_size, each.mean, each.std) for each in (record, main))
    if its != own:
        raise ConfigError(
            f"{extra.setting}: the tower of {network.folder} takes photos with image_size {its[0]}, mean {its[1]} and "
            f"std {its[2]}, that of the model {own[0]}, {own[1]} and {own[2]}; they must take the same ones"
        )
    weights, tower = read_weights(network.folder / "weights"), record.build()
    towers = tower_weights(network, weights)
    key = fitting_tower(tower, SHARED, towers)
    if key is None:
        raise CheckpointError(f"{network.folder}: holds no weights of its tower; train it again")
    tower.load_state_dict(towers[key])
    tower.report = f"the tower of {network.folder}"
    tower.freeze(len(tower.blocks))
    tower.eval()
    logits = described = None
    if extra.config.logits:
        described = describe_logits(network.config, network.task.to_mapping(), network.info["concepts"])
        try:
            logits = build_logits(described, tower.width)
        except ConfigError as error:
            raise ConfigError(f"{extra.setting}: {network.folder}: {error}; set logits to false") from None
        logits.load(weights)
    config = network.config.tower.model_copy(update={"frame": main.frame})
    return Part(tower, TowerRecord.of(tower, config, tower_hash(tower)).json(), logits, described)
