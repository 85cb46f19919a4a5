"""LoRA (Hu et al. 2021): train a product of two small matrices, added to each frozen weight of a tower's blocks.

A weight W (out, in) becomes W + alpha / rank * B A, with A (rank, in) drawn as PyTorch draws that of a linear layer and
B (out, rank) of zeros, so that training begins at the pretrained tower. It replaces the weight wherever the layer uses
it (`torch.nn.utils.parametrize`), so that attention which reads a weight directly, as that of open_clip and BEiT, has
it too. `merge_lora` gives the weights of the plain architecture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from triderm_dist.schema import ConfigError

if TYPE_CHECKING:
    from triderm_dist.config import LoraConfig
    from triderm_dist.models.tower import Tower

_PARAMETRIZED, _ORIGINAL = "parametrizations.", ".original"


class LowRank(nn.Module):
    """Add alpha / rank * B A to a weight (out, in)."""

    scale: Tensor

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.register_buffer("scale", torch.tensor(alpha / rank))

    def forward(self, weight: Tensor) -> Tensor:
        return _sum(weight, self.a, self.b, self.scale)


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return weight + scale * (b @ a)


def add_lora(tower: Tower, config: LoraConfig) -> None:
    """Freeze all weights of a tower, and add trained products to the matrices of its blocks that are not frozen.

    Raises ConfigError where these blocks have no matrix among `config.targets`, or all are of a lower rank.
    """
    matrices = [
        (module, name)
        for block in tower.trained_blocks
        for path, module in block.named_modules()
        for name in ("weight", "in_proj_weight")
        if _target(path, module, name) in config.targets
    ]
    if not matrices:
        raise ConfigError(
            f"tower.lora: {tower.architecture} has no {' or '.join(config.targets)} layer in a block that is not frozen"
        )
    largest = max(min(getattr(module, name).shape) for module, name in matrices)
    if config.rank > largest:
        raise ConfigError(
            f"tower.lora.rank: {config.rank} is above the full rank of every matrix; write at most {largest}"
        )
    tower.requires_grad_(False)
    for module, name in matrices:
        weight = getattr(module, name)
        parametrize.register_parametrization(module, name, LowRank(weight, config.rank, config.alpha))


def _target(path: str, module: nn.Module, name: str) -> str | None:
    """Return as what `LoraConfig.targets` names a matrix of a block: attention or mlp; None for what is no matrix."""
    kinds = {"weight": nn.Linear, "in_proj_weight": nn.MultiheadAttention}
    if not isinstance(module, kinds[name]) or getattr(module, name) is None:
        return None
    return "attention" if name == "in_proj_weight" or "attn" in path else "mlp"


def merge_lora(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the plain architecture: each product is added to its weight, as in training."""
    result = {}
    for name, tensor in weights.items():
        before, found, path = name.rpartition(_PARAMETRIZED)
        if not found:
            result[name] = tensor
        elif path.endswith(_ORIGINAL):
            at = f"{name.removesuffix(_ORIGINAL)}.0"
            parts = (weights[f"{at}.{part}"].to(tensor.device) for part in ("a", "b", "scale"))
            result[before + path.removesuffix(_ORIGINAL)] = _sum(tensor, *parts)
    return result
