"""Set up the process of a program: standard streams, a home folder, the limit of open files."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from triderm_dist.runtime.streams import WrappedStream, wrapped_output

MAX_OPEN_FILES = 65_536
"""More than this are never needed at once; some systems have no limit, and fail at such a number."""
_GONE = (errno.EPIPE, errno.EIO, errno.ESHUTDOWN, errno.ECONNRESET)
"""Errors of writing to a closed pipe, terminal or socket."""


def prepare_process() -> None:
    """Open missing standard streams, provide a home folder, allow as many open files as the system does."""
    open_missing_streams()
    provide_home()
    raise_open_files_limit()


def open_missing_streams() -> None:
    """Open /dev/null in place of closed standard streams (`>&-`).

    Otherwise the next file that is opened takes the number of one, and what libraries print goes into that file. Where
    a library has taken the number already (libffi keeps a file open), only Python's stream is replaced.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115


class _DroppingStream(WrappedStream):
    """A text stream that drops its text once nobody reads it any more, so that the program continues."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Send what follows, and what is still buffered, to /dev/null. Raises other errors, with the stream's name."""
        is_gone = error.errno in _GONE
        with suppress(OSError, ValueError):  # the flush at the end of the program must not fail again
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if not is_gone:
            name = "standard error" if self._stream is sys.__stderr__ else "standard output"
            raise OSError(error.errno, error.strerror, name) from None


@contextmanager
def tolerate_closed_output() -> Iterator[None]:
    """Context in which a closed pipe or terminal does not end the program: what it prints is dropped from then on.

    A full disk behind a stream raises OSError with the name of the stream. Flushes both streams at the end.
    """
    with wrapped_output(_DroppingStream):
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()


def provide_home() -> None:
    """Set HOME to a temporary folder where it is missing, and USER where nobody has this user's number.

    A container may run under any number (OpenShift, `docker --user`), without an entry in passwd. Python and many
    libraries (Ray, Triton, matplotlib, the hub's cache) fail then.
    """
    if not hasattr(os, "getuid"):
        return
    import pwd

    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        entry = None
        if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
            os.environ["USER"] = f"uid-{os.getuid()}"
    home = os.environ.get("HOME") or (entry.pw_dir if entry else "")
    if home and _can_hold_files(Path(home)):
        return
    reason = f"HOME={home} can't hold files" if home else "HOME is not set, and passwd has no entry for this user"
    try:
        folder = _temporary_home()
    except OSError as error:
        sys.stderr.write(f"note: {reason}, nor can a temporary folder ({error.strerror}). Set HOME to one that can\n")
        return
    os.environ["HOME"] = str(folder)
    sys.stderr.write(f"note: {reason}; caches go to {folder}. Set HOME to keep them elsewhere\n")


def _temporary_home() -> Path:
    """Return a folder for temporary files of this user alone: the same one again, unless another user took its name."""
    folder = Path(tempfile.gettempdir(), f"home-of-uid-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir() or folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp(prefix=f"home-of-uid-{os.getuid()}-"))
    return folder


def _can_hold_files(home: Path) -> bool:
    """Return whether libraries find files in a home folder, or can create it. A read-only one may hold credentials."""
    if str(home) != "/" and home.is_dir():
        return True
    while not home.exists() and home != home.parent:
        home = home.parent
    return home.is_dir() and os.access(home, os.W_OK)


def raise_open_files_limit() -> None:
    """Allow this process as many open files as the system does: the usual soft limit is 1,024, and on macOS 256."""
    try:
        import resource
    except ImportError:  # of Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_files_limit() -> int:
    """Return the limit of open files of this process."""
    try:
        import resource
    except ImportError:
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft
