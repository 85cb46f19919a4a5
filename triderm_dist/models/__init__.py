"""Networks: `build_towers` for the image encoders of a setting, `build_network` for the whole."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triderm_dist.config import ModelConfig, TowerConfig
    from triderm_dist.models.network import Network
    from triderm_dist.models.towers import TokenShape, Tower


def build_towers(config: TowerConfig) -> list[Tower]:
    """One tower for both views (`shared`), or one a view in the order of `VIEWS`, with their leading blocks frozen.

    A shared tower keeps the smaller of the two frozen prefixes. Raises what `build_tower` raises.
    """
    from triderm_dist.models.towers import build_tower

    tower = build_tower(config.source, config.pretrained, config.image_size, config.quick_gelu)
    prefixes = [len(tower.blocks)] * 2 if config.frozen else [config.freeze_clinical, config.freeze_dermoscopic]
    if config.shared:
        towers, prefixes = [tower], [min(prefixes)]
    else:
        towers = [tower, copy.deepcopy(tower)]
    for tower, prefix in zip(towers, prefixes, strict=True):
        tower.freeze(prefix)
    return towers


def build_network(config: ModelConfig, concepts: Sequence[str], towers: Sequence[Tower] | TokenShape) -> Network:
    """The network of `config.kind` over K named concepts, on towers (pixels in) or on tokens of a given shape."""
    from triderm_dist.models.dual_cnn import DualCnn
    from triderm_dist.models.trimodal import TriModal

    return {"trimodal": TriModal, "dual_cnn": DualCnn}[config.kind](config, concepts, towers)
