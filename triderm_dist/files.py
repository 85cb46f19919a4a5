"""Atomic writes, checksums, and locks between processes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # of Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder: renamed to `path` when the block ends, removed if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with naming_file(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Add the file name `path` to an OSError that has none, as one of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write PyTorch tensors as safetensors, not atomically. Raises OSError, also for an error of safetensors' own."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with naming_file(path):
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=1) + "\n"


def size_text(size: int) -> str:
    """Return a number of bytes as people read it, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive_lock(lock: Path, refusal: Exception) -> Iterator[int]:
    """Lock the file `lock`, creating it if missing; raise `refusal` where another process holds the lock.

    Yields its descriptor; child processes that inherit it hold the lock too, until the last of them ends.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            lock_file(file, wait=False)
        except BlockingIOError:
            raise refusal from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                raise
        yield file.fileno()


def lock_file(file: IO[Any], *, shared: bool = False, wait: bool = True) -> None:
    """Lock an open file, exclusively or shared with other readers, until it is closed or unlocked.

    wait: until no other process holds a lock that excludes this one; otherwise raises BlockingIOError where one does.
    Does nothing where Python has no `fcntl`: there, two programs in one folder do not notice each other.
    """
    if fcntl is not None:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def unlock_file(file: IO[Any]) -> None:
    """Release a lock of `lock_file`."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_UN)
