"""Files that stay open between reads, as many as the process may have."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_Key = TypeVar("_Key", bound=Hashable)
_File = TypeVar("_File")


class OpenFiles(Generic[_Key, _File]):
    """Files by key, opened at their first use; at most `most` stay open, those opened last.

    Each is closed when its last reader drops it. Fewer stay open where the process or the system turns out to have no
    more file descriptors.
    """

    def __init__(self, most: int) -> None:
        self._most, self._files, self._lock = most, dict[_Key, _File](), threading.Lock()

    def get(self, key: _Key, open_file: Callable[[_Key], _File]) -> _File:
        """Return the open file of a key, after `open_file` has opened it where needed. Raises what that raises.

        Threads open files at the same time, since on a network disk each open waits for the server.
        """
        return self._files.get(key) or self._open(key, open_file)

    def clear(self) -> None:
        """Let all files go."""
        self._files.clear()

    def _open(self, key: _Key, open_file: Callable[[_Key], _File]) -> _File:
        try:
            file = open_file(key)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            with self._lock:
                self._most = max(1, len(self._files) // 2)
                self._close_oldest(self._most)
            file = open_file(key)
        with self._lock:
            if key not in self._files:
                self._close_oldest(self._most - 1)
            return self._files.setdefault(key, file)  # another thread's, where that was faster

    def _close_oldest(self, most: int) -> None:
        while len(self._files) > most:
            del self._files[next(iter(self._files))]
