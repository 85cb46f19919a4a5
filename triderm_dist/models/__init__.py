"""Image encoders (towers) and networks, built from the settings of a model.

`NETWORKS` is the table of networks; docs/extending.md has a recipe for another one. PyTorch is imported only when
something is built.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from triderm_dist.config import build
from triderm_dist.schema import VIEWS, ConfigError
from triderm_dist.schema.plugins import check_known, check_subclass

if TYPE_CHECKING:
    from triderm_dist.config import ModelConfig, TowerConfig
    from triderm_dist.models.network import Network
    from triderm_dist.models.tower import TokenShape, Tower
    from triderm_dist.schema import Signature
    from triderm_dist.settings import Section

NETWORKS: dict[str, str | type[Network]] = {
    "trimodal": "triderm_dist.models.trimodal:TriModal",
    "dual_cnn": "triderm_dist.models.dual_cnn:DualCnn",
    "mlp": "triderm_dist.models.mlp:Mlp",
}
"""Networks by `models.NAME.kind`: the class, or MODULE:CLASS to import it when it is first used."""


def check_network(config: ModelConfig) -> None:
    """Raise ConfigError for an unknown network or wrong settings of a plugin's; does not import PyTorch."""
    check_known("models.NAME.kind", config.kind, NETWORKS, "a network")
    if not isinstance(entry := NETWORKS[config.kind], str):
        from triderm_dist.models.network import Network

        check_subclass("models.NAME.kind", config.kind, entry, Network, "NETWORKS")
    if config.settings or not isinstance(entry, str):
        network_settings(config)


def network_class(kind: str) -> type[Network]:
    """Look up a network in `NETWORKS`."""
    entry = NETWORKS[kind]
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        network: type[Network] = getattr(import_module(module), name)
        return network
    return entry


def network_settings(config: ModelConfig) -> Section:
    """Build the network's own settings from `config.settings`. Raises ConfigError for wrong ones."""
    try:
        return build(network_class(config.kind).Settings, config.settings)
    except ConfigError as error:
        raise ConfigError(f"models.NAME.settings of kind {config.kind!r}: {error}") from None


def build_towers(config: TowerConfig, views: Sequence[str] = VIEWS, tower: Tower | None = None) -> list[Tower]:
    """Build one tower for all `views` (`shared`) or one per view in this order, leading blocks frozen.

    tower: used instead of that of `config.source`.

    A shared tower freezes the smallest number of blocks of its views. Raises as `build_tower` and
    `Tower.set_drop_path` do.
    """
    from triderm_dist.models.towers import build_tower

    tower = tower or build_tower(config.source, config.pretrained, config.image_size, config.quick_gelu)
    if config.drop_path is not None:
        tower.set_drop_path(config.drop_path)
    to_freeze = dict(zip(VIEWS, (config.freeze_clinical, config.freeze_dermoscopic), strict=True))
    frozen_blocks = [len(tower.blocks) if config.frozen else to_freeze[view] for view in views]
    if config.shared:
        frozen_blocks = [min(frozen_blocks)]
    towers = [tower, *(copy.deepcopy(tower) for _ in frozen_blocks[1:])]
    for tower, num_blocks in zip(towers, frozen_blocks, strict=True):
        tower.freeze(num_blocks)
    return towers


def build_network(config: ModelConfig, signature: Signature, towers: Sequence[Tower] | TokenShape) -> Network:
    """Build the network of `config.kind` for a task, on towers (pixels in) or on tokens of a given shape.

    towers: as `build_towers` returns them for `signature.views`. Raises ConfigError as `check_network`, and if the task
    has none of the inputs in `config.use`.
    """
    check_network(config)
    network = network_class(config.kind)(config, signature, towers)
    stages = network.fusion_stages()
    if not isinstance(stages, list) or not all(hasattr(stage, "named_modules") for stage in stages):
        raise ConfigError(
            f"models.NAME.kind: fusion_stages of the network {config.kind!r} returned a {type(stages).__name__}, not a "
            "list of modules; return [] for none"
        )
    return network
