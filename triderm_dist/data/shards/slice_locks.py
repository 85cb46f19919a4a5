"""Locks of a .part folder, which processes fill slice by slice and one of them completes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from triderm_dist.files import exclusive_lock, lock_part


@contextmanager
def lock_slice(part: Path, number: int, of: int, refusal: str) -> Iterator[None]:
    """Hold one slice, 1 to `of`. Raises Busy with the text `refusal` where a process holds it, or all;
    InputError as `lock_part` does.
    """
    with ExitStack() as stack:
        with lock_part(part, refusal):  # `lock_all` holds it, and waits for the slice's own
            stack.enter_context(exclusive_lock(part / f"slice-{number}-of-{of}.lock", refusal))
        yield


@contextmanager
def lock_all(part: Path, refusal: str) -> Iterator[None]:
    """Hold the folder with all its slices. Raises Busy with the text `refusal` where a process holds any;
    InputError as `lock_part` does.
    """
    with lock_part(part, refusal), ExitStack() as stack:
        for lock in sorted(part.glob("slice-*.lock")):
            stack.enter_context(exclusive_lock(lock, refusal))
        yield
