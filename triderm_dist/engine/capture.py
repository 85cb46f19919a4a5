"""CUDA graphs: capture what a function launches, and replay it on fixed memory; and evaluation by them."""

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
from triderm_dist.schema import Batch, InputError, Outputs, one_line

WARM_UP_OF_FORM = 2
"""Eager runs with each form of batches before it is captured: they compile, and choose kernels."""

T = TypeVar("T")


class CaptureError(InputError):
    """Something cannot be captured as a CUDA graph."""


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures on a device, as graphs that share memory need."""
    return torch.cuda.Stream(device)


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Context whose work is queued on `capture_stream`, after that of the current stream, which then waits for it."""
    own, current = capture_stream(device), torch.cuda.current_stream(device)
    own.wait_stream(current)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        current.wait_stream(own)


class Captured(Generic[T]):
    """What `compute` launches, as one CUDA graph. Calling it launches the graph and returns the results of `compute`,
    tensors that the next call overwrites.

    beside: a graph that never runs at the same time, whose memory is shared. Raises CaptureError where something in
    `compute` waits for the device or does what a graph cannot hold; nothing of it has then run on the device.
    """

    def __init__(self, compute: Callable[[], T], device: torch.device, beside: Captured[Any] | None = None) -> None:
        gc.collect()  # so that nothing is freed in the middle of the capture
        self._graph, cause = torch.cuda.CUDAGraph(), None
        try:
            # thread_local: other threads, such as NCCL's, may go on calling CUDA.
            with (
                on_capture_stream(device),
                torch.cuda.graph(
                    self._graph,
                    pool=beside._graph.pool() if beside else None,
                    stream=capture_stream(device),
                    capture_error_mode="thread_local",
                ),
            ):
                try:
                    self._results = compute()
                except RuntimeError as error:
                    cause = error  # ending the capture raises another one
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
    """Tensors on the device to which batches of one form are copied.

    batches: made of them, without lesions and `draws`.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = [
            replace(batch, lesion_ids=[], draws=None, **{n: torch.empty_like(t) for n, t in tensors_of(batch).items()})
            for batch in batches
        ]

    @torch.no_grad()
    def fill(self, batches: Sequence[Batch]) -> None:
        for buffer, batch in zip(self.batches, batches, strict=True):
            for own, tensor in zip(tensors_of(buffer).values(), tensors_of(batch).values(), strict=True):
                own.copy_(tensor, non_blocking=True)


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch by name."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def form_of(batch: Batch) -> tuple[Any, ...]:
    """Return what must be equal for two batches to use the same buffers."""
    return tuple((name, tensor.shape, tensor.stride(), tensor.dtype) for name, tensor in tensors_of(batch).items())


class GraphedForward:
    """Runs a network in evaluation on batches of one form by a CUDA graph; use it in the place of `evaluate.forward`.

    Weights may change in between, but in place. A batch of another form is run eagerly at first, and then captured.
    """

    def __init__(self, beside: Callable[[], Captured[Any] | None] = lambda: None) -> None:
        """beside: returns a graph that shares memory, see `Captured`."""
        self._beside = beside
        self.reset()

    def reset(self) -> None:
        """Drop the graph and its memory."""
        self._form: object = None
        self._eager = 0
        self._buffers: BatchBuffers | None = None
        self._replay: Callable[[], Outputs] | None = None

    def __call__(self, network: nn.Module, batch: Batch) -> Outputs:
        form = (id(network), network.training, form_of(batch))
        if form != self._form:
            self.reset()
            self._form = form
        if self._eager < WARM_UP_OF_FORM:
            self._eager += 1
            return forward(network, batch)
        if self._buffers is None:
            self._buffers = BatchBuffers([batch])
        self._buffers.fill([batch])
        if self._replay is None:
            (own,) = self._buffers.batches
            self._replay = self._capture(lambda: forward(network, own), batch.labels.device)
        outputs = self._replay()
        return Outputs(*(each if each is None else each.clone() for each in outputs))  # type: ignore[arg-type]

    def _capture(self, compute: Callable[[], Outputs], device: torch.device) -> Callable[[], Outputs]:
        return Captured(compute, device, self._beside())
