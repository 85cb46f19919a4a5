"""Copy batches to the device and results from it, and measure how long the device waited for data.

On a GPU copies run on a stream of their own, which does not wait for the kernels that are queued on the stream of the
network: so they overlap with the computation of the batches before.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

STAGES = 2
"""Batches of a source on the device, before augmentation: one that kernels read while the next one is copied."""


class Upload:
    """Copies host tensors of one source to the device, batch by batch.

    On a GPU into `STAGES` sets of tensors in turn, sized for the largest batch so far. So the memory is bounded, and a
    host that runs ahead of the device can queue as many copies.
    """

    def __init__(self) -> None:
        self._stages: deque[_Stage] = deque()

    @contextmanager
    def __call__(
        self, tensors: Sequence[torch.Tensor], device: torch.device
    ) -> Iterator[tuple[list[torch.Tensor], torch.cuda.Event | None]]:
        """Yield host tensors (B, ...) on the device, and the event after which the host tensors may change, if any.

        The tensors are valid for what is queued on the current stream inside the block: later batches overwrite them.
        On a CPU they are those given.
        """
        if device.type != "cuda":
            yield [tensor.to(device, non_blocking=True) for tensor in tensors], None
            return
        current, copies = torch.cuda.current_stream(device), _copy_stream(device)
        stage = self._next(tensors, device)
        on_device = [each[: len(tensor)] for each, tensor in zip(stage.tensors, tensors, strict=True)]
        copies.wait_event(stage.free)
        with torch.cuda.stream(copies):
            for target, tensor in zip(on_device, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
        copied = copies.record_event()
        current.wait_event(copied)
        try:
            yield on_device, copied
        finally:
            current.record_event(stage.free)

    def clear(self) -> None:
        """Free the memory on the device; it is taken again when needed."""
        self._stages.clear()

    def _next(self, tensors: Sequence[torch.Tensor], device: torch.device) -> _Stage:
        """Return the stage that was used least recently, with room for these tensors."""
        if self._stages and not self._stages[0].holds(tensors):
            self._stages.clear()
        if len(self._stages) < STAGES:
            # Kernels queued on the current stream may still read this memory under its last owner.
            free = torch.cuda.current_stream(device).record_event()
            stage = _Stage([torch.empty_like(tensor, device=device) for tensor in tensors], free)
        else:
            stage = self._stages.popleft()
        self._stages.append(stage)
        return stage


@dataclass
class _Stage:
    """Tensors on a GPU, and the end of the kernels that read them."""

    tensors: list[torch.Tensor]
    free: torch.cuda.Event

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether there is room for these tensors."""
        return len(tensors) == len(self.tensors) and all(
            (own.dtype, own.shape[1:]) == (tensor.dtype, tensor.shape[1:]) and len(own) >= len(tensor)
            for own, tensor in zip(self.tensors, tensors, strict=True)
        )


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class HostCopy:
    """Copies of tensors on the host, for which it does not wait before they are read."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        device = tensors[0].device
        if device.type == "cuda":
            self._tensors = [
                torch.empty_like(each, device="cpu", pin_memory=True).copy_(each, non_blocking=True) for each in tensors
            ]
            self._done: torch.cuda.Event | None = torch.cuda.current_stream(device).record_event()
        else:
            self._tensors, self._done = [each.cpu() for each in tensors], None

    def arrays(self) -> list[np.ndarray]:
        """Wait for the copies and return them as arrays."""
        if self._done:
            self._done.synchronize()
        return [each.numpy() for each in self._tensors]


def read_behind(copies: Iterable[HostCopy]) -> Iterator[list[np.ndarray]]:
    """Yield the arrays of each copy once the next one is asked for, so that the device computes what that one needs."""
    before = None
    for copy in copies:
        if before:
            yield before.arrays()
        before = copy
    if before:
        yield before.arrays()


class DataWait:
    """Measures the time in which a device idles because data is not ready.

    On a GPU from events on the current stream: the host may wait while the GPU still computes what was queued before,
    which costs nothing. Elsewhere it is the time of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds = device, 0.0
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._unused: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Measure what the block costs the device: inside of it the host gets data and queues no kernel."""
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        while self._waits and self._waits[0][1].query():
            self._add_oldest()
        if not self._unused:
            self._unused.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        begin, end = self._unused.pop()
        stream = torch.cuda.current_stream(self._device)
        begin.record(stream)
        yield
        end.record(stream)
        self._waits.append((begin, end))

    def take(self) -> float:
        """Return the seconds since the last call; waits until the GPU has come to the last block."""
        if self._waits:
            self._waits[-1][1].synchronize()
        while self._waits:
            self._add_oldest()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add_oldest(self) -> None:
        begin, end = pair = self._waits.popleft()
        self._seconds += begin.elapsed_time(end) / 1000
        self._unused.append(pair)
