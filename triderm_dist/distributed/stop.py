"""What keeps a run from losing work: stopping at a step boundary when asked to, and never stepping on what is not
finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from triderm_dist.cli import Interrupted, handle_signals
from triderm_dist.distributed.collectives import _gloo_group, is_distributed


class Stop:
    """While it is open, SIGTERM and SIGUSR1 to any rank raise Interrupted in `check` of all ranks, at the same call.

    The device is never asked. Every check launches an all-reduce of one number between the hosts (gloo, whatever the
    gradients travel by) and reads the one that the check before had launched, which is done by then: a stop is agreed
    on one check late, and nobody waits.
    """

    def __init__(self) -> None:
        self._asked = torch.zeros(1)
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._signals: AbstractContextManager[None] = handle_signals(self._receive)

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
        self._asked.fill_(1)

    def check(self) -> None:
        """Call on all ranks the same number of times, where work can be taken up again."""
        if not is_distributed():
            agreed = bool(self._asked)
        else:
            before, flag = self._pending, self._asked.clone()
            self._pending = flag, dist.all_reduce(flag, group=_gloo_group(), async_op=True)
            if before:
                before[1].wait()
            agreed = before is not None and bool(before[0])
        if agreed:
            self._finish()
            raise Interrupted("stopped where everything is saved; the same command goes on")

    def check_now(self) -> None:
        """`check` that waits for the other ranks and so sees every signal until here."""
        self.check()
        self.check()

    @contextmanager
    def saves(self, save: Callable[[], None]) -> Iterator[None]:
        """Where a check inside the block stops, `save` is called on all ranks."""
        try:
            yield
        except Interrupted:
            save()
            raise

    def _finish(self) -> None:
        if self._pending:
            self._pending[1].wait()  # all ranks have launched it
            self._pending = None
