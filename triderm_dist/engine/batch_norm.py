"""Running statistics of batch norms over a global batch that is split over ranks and micro-batches."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from triderm_dist.distributed.collectives import all_reduce_sum


class RunningStatistics:
    """Updates the running means and variances of trained batch norms once per step, by the mean over all micro-batches
    of all ranks, so that they are the same on every rank and do not depend on the split.

    By default each rank would follow its own micro-batches, and a first pass without gradients and activation
    checkpointing would update them again. A batch is still normalized by the statistics of its own micro-batch.
    """

    def __init__(self, network: nn.Module) -> None:
        self._live: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        for module in network.modules():
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
                assert module.running_mean is not None and module.running_var is not None
                assert module.num_batches_tracked is not None
                self._live += [module.running_mean, module.running_var]
                self._counts.append(module.num_batches_tracked)
        self._before = [buffer.clone() for buffer in [*self._live, *self._counts]]
        self._sums = [torch.zeros_like(buffer, dtype=torch.float32) for buffer in self._live]

    @torch.no_grad()
    def rewind(self) -> None:
        """Restore the statistics from before the step; call before the forward pass of a micro-batch."""
        if self._live:
            torch._foreach_copy_([*self._live, *self._counts], self._before)

    @torch.no_grad()
    def add(self) -> None:
        """Accumulate; call after the forward pass of a micro-batch, before anything is recomputed."""
        if self._live:
            torch._foreach_add_(self._sums, self._live)

    @torch.no_grad()
    def finish(self, accelerator: Accelerator, micro_batches: int) -> None:
        """Update; call after the last backward pass, on all ranks. micro_batches: their number on this rank."""
        if not self._live:
            return
        self.rewind()
        means = all_reduce_sum(torch.cat(self._sums)) / (micro_batches * accelerator.num_processes)
        torch._foreach_copy_(self._live, list(means.split([len(buffer) for buffer in self._live])))
        torch._foreach_add_(self._counts, 1)
