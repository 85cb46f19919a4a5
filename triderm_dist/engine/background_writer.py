"""Write files on a thread while the training continues."""

from __future__ import annotations

import threading
from collections.abc import Callable

WRITER = "writer"
"""The name of the thread."""


class BackgroundWriter:
    """Runs one piece of work at a time on a thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Start a piece of work, once the one before is done. Raises as `wait` does."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # A second Ctrl-C ends the process without it: a file is written whole or not at all.
        self._thread = threading.Thread(target=run, name=WRITER, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the work is done. Raises what it raised."""
        thread, self._thread = self._thread, None
        if thread:
            thread.join()
        error, self._error = self._error, None
        if error:
            raise error
