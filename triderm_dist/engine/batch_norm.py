"""Running statistics of batch norms over a global batch that is split over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triderm_dist.distributed.collectives import all_reduce_sum

_STATISTICS = ("running_mean", "running_var")
_COUNT = "num_batches_tracked"


class RunningStatistics:
    """Updates the running means and variances of trained batch norms once per step, with the mean over the
    micro-batches of all ranks. They are equal on every rank and independent of the split.

    PyTorch's default is one update per forward pass of each rank, including passes without gradients and the
    recomputation of activation checkpointing. The normalization itself still uses the statistics of each micro-batch.

    During a step the batch norms' buffers are views of one tensor, so that a GPU accumulates all of them in one kernel,
    and the counts of batches are detached, which would need one kernel each.
    """

    def __init__(self, network: nn.Module) -> None:
        """network: in training mode."""
        self._norms = [
            module
            for module in network.modules()
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
        ]
        self._live: list[Tensor] = []
        self._counted: list[tuple[Tensor, Tensor]] = []  # of norms that average over all batches so far
        live = self._of(_STATISTICS)
        sizes = [len(buffer) for buffer in live]
        self._all = torch.cat(live) if live else torch.zeros(0)
        # `detach` gives each part its own version counter: compiled blocks save their part for the backward pass, while
        # other parts change in place.
        self._parts = [part.data for part in self._all.split(sizes)]
        self._sums = torch.zeros_like(self._all, dtype=torch.float32)
        self._sums_parts = self._sums.split(sizes)

    @contextmanager
    def of_step(self, accelerator: Accelerator, micro_batches: int) -> Iterator[None]:
        """Context manager around all passes of a step; updates the statistics at its end. Call on all ranks.

        micro_batches: their number on this rank.
        """
        if not self._norms:
            yield
            return
        self._live, counts = self._of(_STATISTICS), self._of((_COUNT,))
        self._sums.zero_()
        before, parts = [dict(norm._buffers) for norm in self._norms], iter(self._parts)
        self._counted = [
            (count.clone(), count) for norm, count in zip(self._norms, counts, strict=True) if norm.momentum is None
        ]
        counted = iter(self._counted)
        for norm in self._norms:
            norm._buffers.update({name: next(parts) for name in _STATISTICS})
            norm._buffers[_COUNT] = next(counted)[0] if norm.momentum is None else None
        try:
            yield
        finally:
            for norm, buffers in zip(self._norms, before, strict=True):
                norm._buffers.update(buffers)
        self._update(accelerator, micro_batches, counts)

    @torch.no_grad()
    def rewind(self) -> None:
        """Restore the statistics from before the step; call before the forward pass of a micro-batch."""
        if self._norms:
            torch._foreach_copy_(list(self._parts), self._live)
            for own, count in self._counted:
                own.copy_(count)

    @torch.no_grad()
    def add(self) -> None:
        """Accumulate; call after the forward pass of a micro-batch, before anything is recomputed."""
        if self._norms:
            self._sums.add_(self._all)

    def _of(self, names: tuple[str, ...]) -> list[Tensor]:
        return [norm._buffers[name] for norm in self._norms for name in names]  # type: ignore[misc]

    @torch.no_grad()
    def _update(self, accelerator: Accelerator, micro_batches: int, counts: list[Tensor]) -> None:
        self._sums.copy_(all_reduce_sum(self._sums) / (micro_batches * accelerator.num_processes))
        torch._foreach_copy_(self._live, list(self._sums_parts))
        torch._foreach_add_(counts, 1)
