"""Graceful stop on signals, agreed on by all ranks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from triderm_dist.cli import Interrupted
from triderm_dist.distributed.collectives import gloo_group, is_distributed
from triderm_dist.runtime.signals import SAME_SECONDS, SIGNALS, Stopped, handle_signals


class Stop:
    """Context manager: a signal to any rank raises Interrupted in the same `check` call of all ranks.

    Handles `signals.SIGNALS` and Ctrl-C. A single process without progress to save (the first step may compile for
    minutes) raises `Stopped` at once, and so does each rank for a Ctrl-C after the first request.

    `check` never waits for the device. It starts an all-reduce of one number on the CPU (gloo, for any backend of the
    gradients) and reads the result of the all-reduce that the previous check started, which has finished by then: a
    stop takes effect one check later.
    """

    def __init__(self) -> None:
        self._requested = torch.zeros(1)
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._received: float | None = None
        self._saves = self._unsaved = False
        self._signals: AbstractContextManager[None] = handle_signals(self._receive, (*SIGNALS, signal.SIGINT))

    def __enter__(self) -> Stop:
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signals.__exit__(kind, error, trace)
        if error is None:
            self._finish()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self._received is not None and number == signal.SIGINT and now - self._received > SAME_SECONDS
        self._received = self._received or now
        self._requested.fill_(1)
        if again or not (self._unsaved or is_distributed()):
            raise Stopped

    def check(self) -> None:
        """Raise Interrupted if a stop was requested. Call on all ranks equally often, where work can be resumed."""
        if not is_distributed():
            stopped = bool(self._requested)
        else:
            previous, flag = self._pending, self._requested.clone()
            self._pending = flag, dist.all_reduce(flag, group=gloo_group(), async_op=True)
            if previous:
                previous[1].wait()
            stopped = previous is not None and bool(previous[0])
        self._unsaved = self._saves
        if stopped:
            self._finish()
            raise Interrupted("stopped after saving; rerun the same command to resume")

    def check_now(self) -> None:
        """Check as `check`, but wait for the other ranks, so that every signal received so far is seen."""
        self.check()
        self.check()

    @contextmanager
    def save_on_stop(self, save: Callable[[], None]) -> Iterator[None]:
        """Call `save` on all ranks if a check in the block raises."""
        self._saves = True
        try:
            yield
        except Interrupted:
            save()
            raise
        finally:
            self._saves = self._unsaved = False

    def _finish(self) -> None:
        if self._pending:
            self._pending[1].wait()  # all ranks have started it
            self._pending = None
