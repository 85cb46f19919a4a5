"""Report how far a program is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with what is done and with all there is to do, in units of the caller."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""
