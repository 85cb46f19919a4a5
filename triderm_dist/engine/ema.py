"""Averages of the trained weights: exponential over steps, or uniform over the last epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from triderm_dist.config import TrainConfig
from triderm_dist.distributed.full_state import Tensors, host_tensors, local_shard
from triderm_dist.distributed.parallel import reshard_after_write, unwrap
from triderm_dist.optim import local_part

_EPOCH = "averaged.epoch"
"""Key of the epoch in `EpochAverage.state`, next to the parameters' names."""


class WeightAverage:
    """An average of each trained parameter over the training, in fp32 (in 16 bits its increments would round to 0).

    Each rank averages its shards. Buffers, such as batch norm statistics, are those of the live network.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        self._wrapped = wrapped
        self._live = {name: p for name, p in unwrap(wrapped).named_parameters() if p.requires_grad}
        self._mean = {name: p.detach().float().clone() for name, p in self._live.items()}

    def after_step(self, step: int) -> None:
        """Update the average after optimizer step `step`, counted from 1."""

    def after_epoch(self, epoch: int) -> None:
        """Update the average after epoch `epoch`, counted from 1; a second call for the same epoch does nothing."""

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the network the averaged weights in the block; the live weights are restored bit for bit afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> Tensors:
        """Return the full averages by parameter name, on rank 0 only; call on all ranks."""
        return host_tensors(self._mean.items())

    @torch.no_grad()
    def load(self, saved: Tensors) -> None:
        """Load what `state` returned, on any number of ranks."""
        for name, mean in self._mean.items():
            mean.copy_(local_shard(saved[name], mean))

    @torch.no_grad()
    def _swap(self) -> None:
        reshard_after_write(self._wrapped)
        for name, parameter in self._live.items():
            live, mean = local_part(parameter.detach()), local_part(self._mean[name])
            weights = live.clone()
            live.copy_(mean)
            mean.copy_(weights)

    @torch.no_grad()
    def _move(self, weight: float) -> None:
        """Update the average: average += weight * (live - average)."""
        means = [local_part(mean) for mean in self._mean.values()]
        torch._foreach_lerp_(means, [local_part(p.detach()) for p in self._live.values()], weight)


class Ema(WeightAverage):
    """Exponential moving average.

    After step t it moves by 1 - d towards the weights, d = min(decay, (1 + t) / (10 + t)), so that the random
    initialization loses its weight early.
    """

    def __init__(self, wrapped: nn.Module, decay: float) -> None:
        super().__init__(wrapped)
        self.decay = decay

    def after_step(self, step: int) -> None:
        self._move(1 - min(self.decay, (1 + step) / (10 + step)))


class EpochAverage(WeightAverage):
    """Mean of the weights at the ends of all epochs after `start` (stochastic weight averaging, Izmailov et al. 2018);
    until then the weights at the end of the last epoch.
    """

    def __init__(self, wrapped: nn.Module, start: int) -> None:
        super().__init__(wrapped)
        self.start, self._epoch = start, 0

    def after_epoch(self, epoch: int) -> None:
        if epoch > self._epoch:  # a training that stopped during validation has averaged this epoch already
            self._move(1 / max(1, epoch - self.start))
            self._epoch = epoch

    def state(self) -> Tensors:
        return {**super().state(), _EPOCH: torch.tensor(self._epoch)}

    def load(self, saved: Tensors) -> None:
        super().load(saved)
        self._epoch = int(saved[_EPOCH])


def build_average(wrapped: nn.Module, config: TrainConfig) -> WeightAverage | None:
    """Return the average of the settings; None without one."""
    if config.swa_epochs:
        return EpochAverage(wrapped, config.epochs - config.swa_epochs)
    return Ema(wrapped, config.ema_decay) if config.ema_decay else None
