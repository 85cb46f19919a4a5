"""log.txt of a run: a copy of what the programs of rank 0 printed."""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from triderm_dist.runtime.redact import redact
from triderm_dist.runtime.streams import WrappedStream

LOG_FILE = "log.txt"
LOG_FOLDER = "TRIDERM_LOG_FOLDER"
"""Environment variable with the run that a program is a stage of, where its settings do not name it."""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colors and cursor movements of a terminal."""


class RunLog:
    """While open, append every line that this process prints to FOLDER/log.txt, after a header with `title`.

    Nothing is written before the folder exists; where it cannot be written to, the program runs without a log. Lines
    of several processes do not mix: each is appended by one write. Colors, secrets and what a progress bar
    overwrote are removed.

    deferred: write nothing before the end, and nothing at all after `discard`.
    """

    def __init__(self, folder: Path, title: str, deferred: bool = False) -> None:
        self._path, self._deferred = folder / LOG_FILE, deferred
        self._waiting = [f"\n=== {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC  {title}\n"]
        self._partial: dict[str, str] = {}
        self._handle: int | None = None
        self._lock = threading.RLock()  # a signal handler may print while a line is written

    def __enter__(self) -> RunLog:
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Copied(stream, self) for stream in self._streams)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout, sys.stderr = self._streams
        if error is not None and not isinstance(error, SystemExit):
            self.add("error", "".join(traceback.format_exception(error)))
        for stream, text in list(self._partial.items()):
            if text:
                self.add(stream, "\n")
        if self._deferred and len(self._waiting) > 1:
            self._deferred = False
            self._write()
        if self._handle is not None:
            os.close(self._handle)

    def add(self, stream: str, text: str) -> None:
        """Append the lines that a text printed to a stream completes."""
        with self._lock:
            *lines, partial = (self._partial.get(stream, "") + text).split("\n")
            # A progress bar overwrites one line for hours: only its last state is kept.
            partial = _CONTROL.sub("", partial)
            text = partial.rstrip("\r")
            self._partial[stream] = text.rpartition("\r")[2] + partial[len(text) :]
            shown = [_CONTROL.sub("", line).rstrip("\r").rpartition("\r")[2].rstrip() for line in lines]
            self._waiting += [f"{line}\n" for line in shown]
            if shown:
                self._write()

    def discard(self) -> None:
        """Forget the lines that are deferred."""
        if self._deferred:
            self._waiting.clear()

    def _write(self) -> None:
        if self._deferred:
            return
        try:
            if self._handle is None:
                if not self._path.parent.is_dir():
                    return
                self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.write(self._handle, redact("".join(self._waiting)).encode("utf-8", "replace"))
        except OSError:  # read-only, a full disk
            pass
        self._waiting.clear()


class _Copied(WrappedStream):
    """A text stream whose text is also added to a log."""

    def __init__(self, stream: TextIO, log: RunLog) -> None:
        super().__init__(stream)
        self._log = log

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        self._log.add(getattr(self._stream, "name", ""), text)
        return written
