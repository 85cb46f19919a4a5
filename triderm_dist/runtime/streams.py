"""Put something in front of the standard output and error streams."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class WrappedStream:
    """A text stream that passes on all that it gets; subclasses change `write`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def wrapped_output(wrap: Callable[[TextIO], Any]) -> Iterator[None]:
    """Context in which sys.stdout and sys.stderr are what `wrap` returns for each."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(wrap, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
