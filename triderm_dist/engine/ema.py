"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from triderm_dist.distributed.full_state import Tensors, full_tensor, local_shard
from triderm_dist.distributed.parallel import reshard_after_write, unwrap


class Ema:
    """Exponential moving average of each trained parameter, in fp32 (in 16 bits its increments would round to 0).

    Each rank averages its shards. Buffers, such as batch norm statistics, are those of the live network. After step t
    the average moves by 1 - d towards the weights, d = min(decay, (1 + t) / (10 + t)), so that the random
    initialization loses its weight early.
    """

    def __init__(self, wrapped: nn.Module, decay: float) -> None:
        self.decay, self._wrapped = decay, wrapped
        self._live = {name: p for name, p in unwrap(wrapped).named_parameters() if p.requires_grad}
        self._mean = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after optimizer step `step`, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        means = [_local(mean) for mean in self._mean.values()]
        torch._foreach_lerp_(means, [_local(p.detach()) for p in self._live.values()], weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Context in which the network has the averaged weights; its own are restored bit for bit afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> Tensors:
        """Return the full averages by parameter name; call on all ranks."""
        return {name: full_tensor(mean).clone() for name, mean in self._mean.items()}

    @torch.no_grad()
    def load(self, saved: Tensors) -> None:
        """Load what `state` returned, on any number of ranks."""
        for name, mean in self._mean.items():
            mean.copy_(local_shard(saved[name], mean))

    @torch.no_grad()
    def _swap(self) -> None:
        reshard_after_write(self._wrapped)
        for name, parameter in self._live.items():
            live, mean = _local(parameter.detach()), _local(self._mean[name])
            weights = live.clone()
            live.copy_(mean)
            mean.copy_(weights)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
