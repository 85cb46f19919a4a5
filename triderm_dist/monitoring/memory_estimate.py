"""Estimate the memory of a training step by running it on fake tensors, which have shapes but no data."""

from __future__ import annotations

import bisect
import copy
import functools
import math
import re
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from triderm_dist.config import ModelConfig, TowerConfig, TrainConfig
from triderm_dist.data.upload import STAGES
from triderm_dist.distributed.blocks import prepare_blocks
from triderm_dist.distributed.parallel import Strategy
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.dropout import use_lesion_masks
from triderm_dist.models.network import Network
from triderm_dist.models.tower import TokenShape
from triderm_dist.models.towers import locate_weights
from triderm_dist.monitoring.flops import empty_on_cpu, example_inputs
from triderm_dist.optim import state_size
from triderm_dist.schema import InputError, Signature

WORKSPACES = 2 * 32 * 2**20
"""Bytes of the cuBLAS workspaces of the forward and the backward thread on a Hopper GPU; a quarter on other GPUs."""
_SIMULATED: weakref.WeakKeyDictionary[Network, dict[tuple, tuple[int, int]]] = weakref.WeakKeyDictionary()
"""Results of `_simulate` by network, which they must not keep alive on the GPU after the training."""


class MemoryEstimate:
    """Memory of a training on a GPU, in bytes of tensors per rank.

    For eager execution; compiled blocks need a little less. Without the device's context and the allocator's overhead.

    weights: parameters and buffers.  average: of the trained weights, 0 without one.  optimizer: its states.
    gradients: of all trained weights.  casts: 16-bit copies of frozen weights, which autocast keeps.
    photos: the network's input of one lesion.  decoded: the same from the loader, in uint8.
    """

    def __init__(
        self,
        network: Network,
        train: TrainConfig,
        half: bool,
        ranks: int = 1,
        strategy: Strategy = "single",
        canvas: tuple[int, int] | None = None,
    ) -> None:
        """network: not modified later.  half: under autocast to bf16 or fp16.  ranks, strategy: of the training; ZeRO
        is estimated as FSDP2.  canvas: width and height of the photos in the shards; None omits the loader's buffers
        on the GPU.
        """
        self._network, self._train, self._half = network, train, half
        self._results = _SIMULATED.setdefault(network, {})
        self._per_rank = max(1, train.global_batch // ranks)
        self._keeps_gradients = strategy != "single"
        parameters = list(network.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        shards = ranks if strategy in ("fsdp2", "deepspeed") else 1
        self._gathered, self._gathered_in_evaluation = _gathered(network) if shards > 1 else (0, 0)
        frozen = sum(_bytes(each) for each in parameters if not each.requires_grad)
        self.weights = frozen + 4 * trained // shards + sum(map(_bytes, network.buffers()))
        self.average = 4 * trained // shards if train.averages else 0
        self.optimizer = round(4 * state_size(train.optim) * trained / shards)
        self.gradients = 4 * trained // shards
        self.photos = sum(map(_bytes, example_inputs(network, 1)))
        self._canvas = canvas if canvas and network.holds_towers and network.towers else None
        self.decoded = 3 * math.prod(self._canvas) * len(network.signature.views) if self._canvas else 0

    @functools.cached_property
    def casts(self) -> int:
        return self._simulated(2, False, False, training=False)[1]

    @property
    def fixed(self) -> int:
        """Bytes independent of the micro-batch: weights, their average, the optimizer's states, workspaces."""
        return self.weights + self.average + self.optimizer + WORKSPACES

    def total(self, micro_batch: int) -> int:
        """Return the peak of a training with a micro-batch: of a step, or of the validation after it."""
        return max(self.step(micro_batch), self.evaluation(micro_batch))

    def step(self, micro_batch: int) -> int:
        """Return the peak of a step.

        All micro-batches of a step are on the device. With several of them, and under DDP, which allocates gradients as
        views of its buckets, all gradients exist at the same time as the activations. Excludes the buckets that DDP
        replaces after the first step, which NCCL keeps for up to 100 ms.
        """
        kept = self._keeps_gradients or micro_batch < self._per_rank
        photos = self.photos * max(micro_batch, self._per_rank)
        peak = self._peak(micro_batch, self._train.activation_checkpointing, kept)
        step = self._gathered + kept * self.gradients + peak
        return self.fixed + self._stages(micro_batch) + max(photos + step, self._loading(micro_batch, photos))

    def evaluation(self, micro_batch: int, transforms: int = 1) -> int:
        """Return the peak of an evaluation during a training, under a number of transforms of the photos."""
        photos = self.photos * micro_batch * min(transforms, 2)
        computed = photos + self._gathered_in_evaluation + self._peak(micro_batch, False, False, training=False)
        kept = self.gradients if self._keeps_gradients else 0
        return self.fixed + kept + self._stages(micro_batch) + max(computed, self._loading(micro_batch, photos))

    def _stages(self, micro_batch: int) -> int:
        """Return the bytes of the loader's buffers on the GPU."""
        return STAGES * micro_batch * self.decoded

    def _loading(self, micro_batch: int, before: int) -> int:
        """Return the peak of the augmentation of a micro-batch, one view at a time. before: bytes of the previous
        batch.

        A photo is converted to float32, and if the crop is much smaller also reduced, for which PyTorch copies it.
        """
        if not self._canvas:
            return 0
        width, height = self._canvas
        size = math.sqrt(self.photos / (12 * len(self._network.signature.views)))
        reduced = min(1.0, 1.5 * size / height)
        copies = 2 + 2 * reduced**2 if reduced < 1 else 1
        pixels = copies * width * height + (0 if reduced < 1 else 2.7 * size**2)  # the grid, the crops, a copy
        return before + self.casts + micro_batch * (self.photos + round(12 * pixels))

    def largest(self, memory: float, smallest: int = 1) -> int | None:
        """Return the largest micro-batch, a multiple of `smallest`, that splits the batch evenly and with which a
        training fits into `memory` bytes; None if there is none.
        """
        sizes = [n for n in range(smallest, self._per_rank + 1, smallest) if self._per_rank % n == 0]
        if not sizes:
            return None
        if self.total(sizes[-1]) <= memory:
            return sizes[-1]
        first_too_large = bisect.bisect(sizes[:-1], memory, key=self.total)
        return sizes[first_too_large - 1] if first_too_large else None

    def largest_of_one(self, memory: float) -> int:
        """Return the largest batch of a single micro-batch that fits into `memory` bytes; 0 if not even a few lesions
        fit.

        Interpolates: the peak is linear from 64 lesions on.
        """
        checkpointing, kept = self._train.activation_checkpointing, self._keeps_gradients
        low, high = (self._peak(n, checkpointing, kept) + n * self.photos + self._stages(n) for n in (64, 128))
        per_lesion = (high - low) / 64
        fixed = self.fixed + self._gathered + kept * self.gradients + low - 64 * per_lesion
        return max(0, int((memory - fixed) / per_lesion))

    def _simulated(self, lesions: int, checkpointing: bool, kept: bool, training: bool = True) -> tuple[int, int]:
        key = (lesions, self._half, checkpointing, kept, training)
        if key not in self._results:
            self._results[key] = _simulate(self._network, *key)
        return self._results[key]

    def _peak(self, lesions: int, checkpointing: bool, kept: bool, training: bool = True) -> int:
        return self._simulated(lesions, checkpointing, kept, training)[0]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gathered(network: Network) -> tuple[int, int]:
    """Return the bytes of unsharded trained weights per rank under FSDP2, (in a step, in evaluation).

    In a step two blocks with their gradients, in evaluation one block; in both cases all weights outside of blocks.
    """
    sizes = [_trained_bytes(block) for block in network.blocks()]
    largest, outside = max(sizes, default=0), _trained_bytes(network) - sum(sizes)
    return outside + 4 * largest, outside + largest


def _trained_bytes(module: nn.Module) -> int:
    return sum(_bytes(parameter) for parameter in module.parameters() if parameter.requires_grad)


@functools.lru_cache
def estimate_model_memory(
    model: ModelConfig,
    signature: Signature,
    half: bool,
    ranks: int = 1,
    strategy: Strategy = "single",
    canvas: tuple[int, int] | None = None,
) -> tuple[MemoryEstimate, str]:
    """Estimate the memory of a model from its settings; also returns the note of `network_without_weights`."""
    network, note = bare_network(model, signature)
    return MemoryEstimate(network, model.train, half, ranks, strategy, canvas), note


def bare_network(model: ModelConfig, signature: Signature) -> tuple[Network, str]:
    """Return a cached result of `network_without_weights`, on the meta device: tensors have shapes but no memory.

    For callers that do not modify the network.
    """
    return _bare_network(model.model_copy(update={"train": TrainConfig()}), signature)


@functools.lru_cache
def _bare_network(model: ModelConfig, signature: Signature) -> tuple[Network, str]:
    network, note = network_without_weights(model, signature)
    return network.to("meta"), note


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


def _simulate(
    network: Network, lesions: int, half: bool, checkpointing: bool, kept: bool = False, training: bool = True
) -> tuple[int, int]:
    """Return the peak bytes that a forward pass (in training with its backward pass) allocates, and the bytes
    afterwards.

    Without weights and photos. kept: gradients exist before, and those of the pass are added to them.
    """
    with FakeTensorMode():
        tensors = [*network.parameters(), *network.buffers()]
        fake = copy.deepcopy(network, {id(tensor): empty_on_cpu(tensor) for tensor in tensors}).train(training)
        use_lesion_masks(fake)
        prepare_blocks(fake, checkpointing, compile_blocks=False)
        inputs = example_inputs(fake, lesions)
        parameters = [*fake.parameters()]
        existing = [*parameters, *fake.buffers(), *inputs]
        for parameter in parameters if kept else ():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                existing.append(parameter.grad)
        with _LiveBytes(existing) as live, torch.set_grad_enabled(training):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                outputs = fake(*inputs)
            if training:
                torch.stack([logits.float().sum() for logits in outputs.heads]).sum().backward()
            del outputs
    return live.peak, live.now


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
