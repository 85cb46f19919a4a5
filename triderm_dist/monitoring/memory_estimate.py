"""How much memory a training step takes, found without taking it: a step over fake tensors, which have shapes only."""

from __future__ import annotations

import copy
import functools
import re
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from triderm_dist.config import ModelConfig
from triderm_dist.distributed.parallel import checkpointed
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.network import Network
from triderm_dist.models.towers import TokenShape
from triderm_dist.monitoring.flops import example_inputs
from triderm_dist.optim import state_size
from triderm_dist.schema import CONCEPTS


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank: parameters (fp32) with the averaged copy if there is one, optimizer states, gradients, and the
    peak of a forward and backward over one micro-batch (activations, gradients so far, temporaries), which is
    base + lesions x a_lesion, but no less than all gradients.
    """

    parameters: int
    optimizer: int
    gradients: int
    base: float
    a_lesion: float

    def total(self, micro_batch: int) -> float:
        """Bytes at a micro-batch, without what the device's context and allocator take."""
        return self.parameters + self.optimizer + max(self.gradients, self.base + micro_batch * self.a_lesion)

    def largest(self, memory: float) -> int:
        """The largest micro-batch within `memory` bytes; 0 if there is none."""
        if self.total(1) > memory:
            return 0
        return int((memory - self.parameters - self.optimizer - self.base) // self.a_lesion)


def estimate_memory(
    network: Network, half: bool, activation_checkpointing: bool, average: bool = False, optimizer_state: float = 2
) -> MemoryEstimate:
    """The footprint of a bare network as DDP trains it; ZeRO and FSDP2 take less. half: under autocast to bf16 or fp16.
    optimizer_state: fp32 numbers that the optimizer keeps for each trained parameter (`optim.state_size`).

    Two peaks are counted and a line is drawn through them, at sizes where activations outweigh gradients. Eager
    execution is counted: compiled blocks need less.
    """
    few, many = 64, 128
    low, high = (_peak(network, lesions, half, activation_checkpointing) for lesions in (few, many))
    a_lesion = (high - low) / (many - few)
    held = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return MemoryEstimate(
        parameters=4 * held * (1 + average),
        optimizer=round(4 * optimizer_state * trained),
        gradients=4 * trained,
        base=low - few * a_lesion,
        a_lesion=a_lesion,
    )


@functools.lru_cache
def estimate_model_memory(model: ModelConfig, half: bool) -> tuple[MemoryEstimate, str]:
    """The footprint of a model of the settings, and a word on a tower that another one stands in for (`stand_in`)."""
    network, said = stand_in(model)
    train = model.train
    estimate = estimate_memory(
        network, half, train.activation_checkpointing, train.ema_decay > 0, state_size(train.optim)
    )  # fmt: skip
    return estimate, said


def stand_in(model: ModelConfig) -> tuple[Network, str]:
    """A model of the settings with random weights, and a word on a tower that another one stands in for.

    Nothing is downloaded or loaded: a tower from the hub, or of a file that is not here, is taken to be a ViT-B/16, or
    a ViT-L/16 where its name says large.
    """
    tower, said = model.tower.model_copy(update={"pretrained": False}), ""
    if tower.source.startswith("hf-hub:") or not _at_hand(tower.source):
        size = "large" if re.search(r"large|_ll_|vit-l", tower.source, re.IGNORECASE) else "base"
        tower = tower.model_copy(update={"source": f"timm:vit_{size}_patch16_224", "quick_gelu": None})
        said = f"its tower taken to be a ViT-{size[0].upper()}/16"
    built = build_towers(tower)
    towers = TokenShape(built[0].num_tokens, built[0].width) if tower.frozen else built
    return build_network(model, CONCEPTS, towers), said


def _at_hand(source: str) -> bool:
    kind, _, rest = source.partition(":")
    return kind == "timm" or Path(rest if kind == "local-dir" else source).exists()


def _peak(network: Network, lesions: int, half: bool, activation_checkpointing: bool) -> int:
    with FakeTensorMode() as mode:
        tensors = [*network.parameters(), *network.buffers()]
        fake = copy.deepcopy(network, {id(tensor): mode.from_tensor(tensor) for tensor in tensors}).train()
        for block in fake.blocks() if activation_checkpointing else ():
            block.forward = checkpointed(block.forward)  # as `parallel.wrap` does
        inputs = example_inputs(fake, lesions)
        with _Live([*fake.parameters(), *fake.buffers()]) as live, torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = fake(*inputs)
            torch.stack([logits.float().sum() for logits in outputs[:3]]).sum().backward()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make, from their making to their end; `rest` were there before."""

    def __init__(self, rest: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {id(tensor.untyped_storage()) for tensor in rest}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        size = storage.nbytes()
        self._known.add(id(storage))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, id(storage), size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
