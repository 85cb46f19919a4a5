"""Estimate the memory of a training step by running it on fake tensors, which have shapes but no data."""

from __future__ import annotations

import copy
import functools
import re
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from triderm_dist.config import ModelConfig, TowerConfig
from triderm_dist.distributed.blocks import checkpointed
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.network import Network
from triderm_dist.models.towers import TokenShape, locate_weights
from triderm_dist.monitoring.flops import example_inputs
from triderm_dist.optim import state_size
from triderm_dist.schema import InputError, Signature


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank.

    parameters: fp32, with the EMA copy if there is one.  optimizer: its states.  gradients: all of them.  base,
    per_lesion: the peak of a forward and backward pass over one micro-batch (activations, gradients so far,
    temporaries) is base + lesions x per_lesion, and at least `gradients`.  small: base and per_lesion of small
    micro-batches, where the peak is at another moment of the step; the larger line counts.
    """

    parameters: int
    optimizer: int
    gradients: int
    base: float
    per_lesion: float
    small: tuple[float, float] = (0.0, 0.0)

    def total(self, micro_batch: int) -> float:
        """Return the bytes at a micro-batch, without the device's context and the allocator's overhead."""
        peaks = [base + micro_batch * per_lesion for base, per_lesion in self._lines()]
        return self.parameters + self.optimizer + max(self.gradients, *peaks)

    def largest(self, memory: float) -> int:
        """Return the largest micro-batch that fits into `memory` bytes; 0 if none does."""
        if self.total(1) > memory:
            return 0
        left = memory - self.parameters - self.optimizer
        return int(min((left - base) // per_lesion for base, per_lesion in self._lines() if per_lesion > 0))

    def _lines(self) -> tuple[tuple[float, float], ...]:
        return (self.base, self.per_lesion), self.small


def estimate_memory(
    network: Network, half: bool, activation_checkpointing: bool, ema: bool = False, optimizer_state: float = 2
) -> MemoryEstimate:
    """Estimate the memory of training a network under DDP; ZeRO and FSDP2 take less.

    half: under autocast to bf16 or fp16.  ema: with an averaged copy of the weights.  optimizer_state: fp32 numbers
    that the optimizer keeps per trained parameter (`optim.state_size`). The peak is the largest of several linear
    functions of the micro-batch, one for each moment of a step. Two large micro-batches give the one of activations;
    with checkpointing, gradients outweigh these at first, which two small ones give. Counts eager execution; compiled
    blocks need less.
    """
    base, per_lesion = _line(network, (64, 128), half, activation_checkpointing)
    small = _line(network, (4, 8), half, activation_checkpointing) if activation_checkpointing else (0.0, 0.0)
    total = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return MemoryEstimate(
        parameters=4 * total * (1 + ema),
        optimizer=round(4 * optimizer_state * trained),
        gradients=4 * trained,
        base=base,
        per_lesion=per_lesion,
        small=small,
    )


def _line(network: Network, lesions: tuple[int, int], half: bool, checkpointing: bool) -> tuple[float, float]:
    """Return base and per_lesion of the line through the peaks of two micro-batches."""
    low, high = (_peak(network, number, half, checkpointing) for number in lesions)
    per_lesion = (high - low) / (lesions[1] - lesions[0])
    return low - lesions[0] * per_lesion, per_lesion


@functools.lru_cache
def estimate_model_memory(model: ModelConfig, signature: Signature, half: bool) -> tuple[MemoryEstimate, str]:
    """Estimate the memory of a model of the settings; returns a note too where `network_without_weights` has one."""
    network, note = network_without_weights(model, signature)
    train = model.train
    estimate = estimate_memory(network, half, train.activation_checkpointing, train.averages, state_size(train.optim))
    return estimate, note


def network_without_weights(model: ModelConfig, signature: Signature) -> tuple[Network, str]:
    """Build a model of the settings with random weights, without downloading anything.

    A tower whose architecture is not on this machine is replaced by a ViT-B/16, or by a ViT-L/16 if its source
    contains "large"; the second value is then a note on the replacement, else "".
    """
    tower, note = local_tower(model.tower)
    built = build_towers(tower, signature.views)
    towers = TokenShape(built[0].num_tokens, built[0].width) if tower.frozen else built
    network = build_network(model, signature, towers)
    if tower.cached:
        network.skip_frozen()
    if tower.lora:
        network.add_lora(tower.lora)
    return network, note


def local_tower(tower: TowerConfig) -> tuple[TowerConfig, str]:
    """Return the settings of the tower that `network_without_weights` builds, and its note."""
    tower = tower.model_copy(update={"pretrained": False})
    if _is_local(tower.source):
        return tower, ""
    size = "large" if re.search(r"large|_ll_|vit-l", tower.source, re.IGNORECASE) else "base"
    tower = tower.model_copy(update={"source": f"timm:vit_{size}_patch16_224", "quick_gelu": None})
    return tower, f"assuming a ViT-{size[0].upper()}/16 as tower"


def _is_local(source: str) -> bool:
    try:
        return locate_weights(source, pretrained=False).is_local
    except InputError:
        return False


def _peak(network: Network, lesions: int, half: bool, activation_checkpointing: bool) -> int:
    with FakeTensorMode() as mode:
        tensors = [*network.parameters(), *network.buffers()]
        fake = copy.deepcopy(network, {id(tensor): mode.from_tensor(tensor) for tensor in tensors}).train()
        for block in fake.blocks() if activation_checkpointing else ():
            block.forward = checkpointed(block.forward)  # as `parallel.wrap` does
        inputs = example_inputs(fake, lesions)
        live = _LiveBytes([*fake.parameters(), *fake.buffers()])
        with live, torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = fake(*inputs)
            torch.stack([logits.float().sum() for logits in outputs.heads]).sum().backward()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Tracks the bytes of live storages that operations allocate, and their peak; without `existing` tensors."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {id(tensor.untyped_storage()) for tensor in existing}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        size = storage.nbytes()
        self._known.add(id(storage))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, id(storage), size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
