"""CUDA graphs: capture the kernels of a function and replay them on fixed memory; evaluation with a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from triderm_dist.distributed.library_errors import is_out_of_memory
from triderm_dist.engine.evaluate import forward
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import Batch, InputError, Outputs

WARM_UP_PER_SHAPE = 2
"""Eager runs with batches of each shape before the capture; they compile and select kernels."""

T = TypeVar("T")


class CaptureError(InputError):
    """Something cannot be captured as a CUDA graph."""


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures on a device, as graphs that share memory need."""
    return torch.cuda.Stream(device)


@lru_cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for kernels of a graph that run at the same time as those of `capture_stream`."""
    return torch.cuda.Stream(device)


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Run the block on `capture_stream`, ordered after earlier and before later work of the current stream."""
    capturing, current = capture_stream(device), torch.cuda.current_stream(device)
    capturing.wait_stream(current)
    try:
        with torch.cuda.stream(capturing):
            yield
    finally:
        current.wait_stream(capturing)


class Captured(Generic[T]):
    """The kernels of `compute` as one CUDA graph. Calling it replays the graph and returns the results of `compute`,
    tensors that the next call overwrites.

    memory_of: a graph that never runs at the same time, with which this one shares its memory pool.
    Raises CaptureError if `compute` synchronizes with the device or does anything else that a graph cannot capture;
    nothing of it has then run on the device.
    """

    def __init__(self, compute: Callable[[], T], device: torch.device, memory_of: Captured[Any] | None = None) -> None:
        gc.collect()  # so that nothing is freed during the capture
        self._graph, cause = torch.cuda.CUDAGraph(), None
        try:
            # thread_local: other threads, such as NCCL's, may call CUDA during the capture.
            with (
                on_capture_stream(device),
                torch.cuda.graph(
                    self._graph,
                    pool=memory_of._graph.pool() if memory_of else None,
                    stream=capture_stream(device),
                    capture_error_mode="thread_local",
                ),
            ):
                try:
                    self._results = compute()
                except RuntimeError as error:
                    cause = error  # the end of the capture raises a less specific one
                    raise
        except RuntimeError as error:
            cause = cause or error
            if is_out_of_memory(cause):
                raise cause from None
            raise CaptureError(
                f"train.graph: no CUDA graph can be made ({one_line(cause)}); set it to false"
            ) from cause

    def __call__(self) -> T:
        self._graph.replay()
        return self._results


class BatchBuffers:
    """Tensors on the device into which batches of equal shapes are copied.

    batches: consist of these tensors, without lesion ids and `draws`.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = [
            replace(batch, lesion_ids=[], draws=None, **{n: torch.empty_like(t) for n, t in tensors_of(batch).items()})
            for batch in batches
        ]

    @torch.no_grad()
    def fill(self, batches: Sequence[Batch]) -> None:
        for buffers, batch in zip(self.batches, batches, strict=True):
            for buffer, tensor in zip(tensors_of(buffers).values(), tensors_of(batch).values(), strict=True):
                buffer.copy_(tensor, non_blocking=True)


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch by name."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def shape_key(batch: Batch) -> tuple[Any, ...]:
    """Return names, shapes, strides and dtypes of a batch's tensors; equal for batches that can share buffers."""
    return tuple((name, tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in tensors_of(batch).items())


class GraphedForward:
    """Runs a network in evaluation with a CUDA graph; a replacement for `evaluate.forward`.

    Weights may change between calls, but only in place. The first batches of new shapes run eagerly; then the graph is
    captured again.
    """

    def __init__(self, memory_of: Callable[[], Captured[Any] | None] = lambda: None) -> None:
        """memory_of: returns the graph with which memory is shared, see `Captured`."""
        self._memory_of = memory_of
        self.reset()

    def reset(self) -> None:
        """Drop the graph and its memory."""
        self._shapes: object = None
        self._eager = 0
        self._buffers: BatchBuffers | None = None
        self._replay: Callable[[], Outputs] | None = None

    def __call__(self, network: nn.Module, batch: Batch) -> Outputs:
        shapes = (id(network), network.training, shape_key(batch))
        if shapes != self._shapes:
            self.reset()
            self._shapes = shapes
        if self._eager < WARM_UP_PER_SHAPE:
            self._eager += 1
            return forward(network, batch)
        if self._buffers is None:
            self._buffers = BatchBuffers([batch])
        self._buffers.fill([batch])
        if self._replay is None:
            (buffers,) = self._buffers.batches
            self._replay = self._capture(lambda: forward(network, buffers), batch.labels.device)
        outputs = self._replay()
        return Outputs(*(each if each is None else each.clone() for each in outputs))  # type: ignore[arg-type]

    def _capture(self, compute: Callable[[], Outputs], device: torch.device) -> Callable[[], Outputs]:
        return Captured(compute, device, self._memory_of())
