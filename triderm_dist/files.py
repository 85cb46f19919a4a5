"""Atomic writes, checksums, and locks between processes.

Files with data of patients are written with the mode `PATIENT_DATA`, all others with that of new files; the umask
restricts both.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # of Windows
    fcntl = None  # type: ignore[assignment]

from triderm_dist.schema import Busy, ConfigError, InputError

LOCK_SECONDS = "TRIDERM_LOCK_SECONDS"
"""Environment variable: seconds to wait for another process that works on the same files."""


PATIENT_DATA = 0o640
"""Mode of files that hold photos, ids, diagnoses or predictions of single lesions, less the umask."""
NEW_FILE = 0o666
"""Mode of all other files, less the umask."""
_PART = re.compile(r"\.(\d+|[\w-]+-\d+-[0-9a-f]{8})\.part$")
"""Suffix of a temporary name; earlier versions had only the process id."""
_CLEANED: set[Path] = set()
"""Folders from which this process has removed the temporary files of killed writers."""
PART_LOCK = "lock"
"""File in a folder for unfinished work."""
_UNLOCKED_SECONDS = 24 * 3600
"""Where a file system has no locks, a temporary file of this age is taken for that of a writer that was killed."""


@contextmanager
def atomic_path(path: Path, mode: int = NEW_FILE) -> Iterator[Path]:
    """Yield a temporary file in the same folder: renamed to `path` when the block ends, removed if it raises.

    Its name holds host, process and a random part, so that writers of one file in several containers have a file each.
    It is created empty with `mode` less the umask, which the renamed file has whatever the block does, and locked, so
    that `dead_parts` knows that its writer lives. An OSError names `path`. The first file that a process writes into a
    folder removes the temporary files there whose writers were killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _CLEANED:
        _CLEANED.add(path.parent)
        remove_dead_parts(path.parent)
    with naming_file(path):
        file, temporary = _open_temporary(path, mode)
    with naming_file(path, temporary):
        try:
            created = os.fstat(file.fileno()).st_mode & 0o777
            if fcntl is None:
                file.close()  # Windows does not rename an open file
            yield temporary
            if temporary.stat().st_mode & 0o777 != created:  # safetensors writes with 600
                temporary.chmod(created)
            temporary.replace(path)
        finally:
            file.close()
            temporary.unlink(missing_ok=True)


def _open_temporary(path: Path, mode: int) -> tuple[IO[bytes], Path]:
    """Create and lock the temporary file of `atomic_path`."""
    host = re.sub(r"[^\w-]", "-", platform.node(), flags=re.ASCII)[:40]
    while True:
        temporary = path.with_name(f"{path.name[:120]}.{host}-{os.getpid()}-{os.urandom(4).hex()}.part")
        with naming_file(path, temporary):
            file = open(temporary, "xb", opener=_opener(mode))  # noqa: SIM115 - closed by the caller
        with suppress(OSError):  # a file system without locks
            lock_file(file)
        if os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()  # another process took it for that of a killed writer before it was locked


def open_new(path: Path, mode: int = NEW_FILE) -> IO[bytes]:
    """Open a file for writing bytes, empty; if it is new, it has `mode` less the umask."""
    return open(path, "wb", opener=_opener(mode))


def _opener(mode: int) -> Callable[[str, int], int]:
    return lambda path, flags: os.open(path, flags, mode)


def dead_parts(*folders: Path) -> list[Path]:
    """Return the temporary files of `atomic_path` in these folders whose writers were killed, sorted."""
    found = (path for folder in folders for path in folder.glob("*.part") if _PART.search(path.name))
    return sorted(path for path in found if path.is_file() and not _is_being_written(path))


def remove_dead_parts(*folders: Path) -> None:
    """Remove `dead_parts`, as far as this user may."""
    for path in dead_parts(*folders):
        with suppress(OSError), path.open("rb") as file:
            with suppress(OSError):  # a file system without locks
                try:
                    lock_file(file, wait=False)
                except BlockingIOError:
                    continue  # its writer has locked it meanwhile
            path.unlink()


def _is_being_written(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            lock_file(file, shared=True, wait=False)
        return False
    except BlockingIOError:
        return True
    except OSError:
        with suppress(OSError):
            return time.time() - path.stat().st_mtime < _UNLOCKED_SECONDS
        return True  # removed meanwhile


@contextmanager
def naming_file(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Add the file name `path` to an OSError that has none, as one of a full disk, or that of its temporary file."""
    try:
        yield
    except OSError as error:
        if not error.filename or str(error.filename) == str(temporary):
            error.filename = str(path)
        if error.errno and error.strerror and "Detail:" in error.strerror:  # PyArrow's own words for the same
            error.strerror = os.strerror(error.errno)
        raise


def walk_folders(
    folder: Path, skip: Collection[str] = (), seen: set[tuple[int, int]] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder at or below `folder` with the names of its files, both in the order of names.

    Symbolic links are followed, but each folder comes once, however many links lead to it, by its own path if it is
    below `folder`.  skip: names of folders that are left out.  seen: (device, inode) of folders already walked.
    """
    seen = set() if seen is None else seen
    root = os.path.join(os.path.realpath(folder), "")
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in skip
            and not (
                os.path.islink(path := os.path.join(parent, name)) and f"{os.path.realpath(path)}/".startswith(root)
            )
        )
        yield parent, sorted(files)


def resolve_dots(path: Path) -> Path:
    """Return the path, absolute if it ends in `.` or `..`, so that names of related files can derive from its own."""
    return path if path.name.strip(".") else Path(os.path.abspath(path))


def follow_link(path: Path) -> Path:
    """Return the path that a symbolic link leads to, and any other path as it is: a folder is not renamed to a link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def why_no_folder(path: Path) -> str:
    """Say why a path that should be a folder is none."""
    return "is a file, not a folder" if path.exists() else "no such folder"


def check_no_file(setting: str, path: str | Path) -> None:
    """Raise ConfigError where a setting names the folder to write into, and there is a file."""
    if Path(path).exists() and not Path(path).is_dir():
        raise ConfigError(f"{setting}: {path}: is a file; name a folder")


def check_no_mount(output: Path) -> None:
    """Raise ConfigError for a folder to which none can be renamed, since another file system is mounted there."""
    if os.path.ismount(output):  # Path.is_mount of Python 3.11 takes the working folder, ".", for one
        raise ConfigError(
            f"output={output}: is a mount point, and an output appears at once, by renaming; name a folder in it"
        )


def why_no_file(path: Path) -> str:
    """Say why a path that should be a file is none."""
    return "is a folder, not a file" if path.is_dir() else "no such file"


def write_text(path: Path, text: str, mode: int = NEW_FILE) -> None:
    """Write a text file atomically."""
    with atomic_path(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


_TENSOR_DTYPES = {
    f"torch.{name}": code
    for name, code in (
        *(("bool", "BOOL"), ("uint8", "U8"), ("int8", "I8"), ("float8_e5m2", "F8_E5M2"), ("float8_e4m3fn", "F8_E4M3")),
        *(("int16", "I16"), ("uint16", "U16"), ("float16", "F16"), ("bfloat16", "BF16"), ("int32", "I32")),
        *(("uint32", "U32"), ("float32", "F32"), ("float64", "F64"), ("int64", "I64"), ("uint64", "U64")),
    )
}
"""Names of safetensors by PyTorch's, in the order in which the format sorts them."""


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> str:
    """Write PyTorch tensors as safetensors, not atomically, and return the file's SHA-256 in hexadecimal.

    The bytes are those of `safetensors.torch.save_file`, which holds the GIL and does not return the hash, so that the
    file would have to be read again. Raises ValueError for a dtype that the format lacks.
    """
    import torch

    order = list(_TENSOR_DTYPES)
    for name, tensor in tensors.items():
        if str(tensor.dtype) not in _TENSOR_DTYPES:
            raise ValueError(f"{path}: {name} is {tensor.dtype}, which safetensors cannot hold")
    names = sorted(tensors, key=lambda name: (-order.index(str(tensors[name].dtype)), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TENSOR_DTYPES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with naming_file(path), open_new(path) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for name in names:
            content = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Raise an error of safetensors while it writes `path` as the OSError that it is, with the file's name."""
    from safetensors import SafetensorError

    try:
        with naming_file(path):
            yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from None


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file. An OSError names the file that could not be read or written."""
    with source.open("rb") as file, naming_file(target), open_new(target) as copy:
        shutil.copyfileobj(file, copy, 2**20)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=1) + "\n"


def size_text(size: float, binary: bool = False) -> str:
    """Return a number of bytes as people read it, in powers of 1000; binary: of 1024, as memory is measured."""
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K" if binary else "k")):
        if size >= (factor := (1024 if binary else 1000) ** power):
            return f"{size / factor:.1f} {prefix}{'iB' if binary else 'B'}"
    return f"{size:.0f} B"


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; symbolic links are not followed.

    A file that another process removes meanwhile counts 0.
    """
    if path.is_dir() and not path.is_symlink():
        return sum(size_of(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_seconds() -> float:
    """Return the seconds that `exclusive_lock` waits for a process that is ending."""
    try:
        return float(os.environ.get(LOCK_SECONDS, "30"))
    except ValueError:
        raise InputError(f"{LOCK_SECONDS}={os.environ[LOCK_SECONDS]}: not a number of seconds") from None


@contextmanager
def exclusive_lock(lock: Path, refusal: str) -> Iterator[int]:
    """Lock the file `lock`, creating it if missing, and write into it which process holds it.

    Waits `lock_seconds` for another process that holds the lock, as one does that is saving after a signal; then raises
    Busy, whose text is `refusal` and the process in the file. Yields the descriptor of the file; child processes that
    inherit it hold the lock too, until the last of them ends.
    """
    with ExitStack() as stack:
        while True:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("a+", encoding="utf-8", errors="replace"))
            try:
                _wait_for_lock(file, refusal)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                    raise
            with suppress(FileNotFoundError):  # another process may have removed the folder before it released the lock
                if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    break
        with suppress(OSError):  # on a full disk the lock holds, but nobody is named
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}\n")
            file.flush()
        try:
            yield file.fileno()
        finally:
            with suppress(OSError):
                file.truncate(0)


@contextmanager
def lock_part(part: Path, refusal: str) -> Iterator[None]:
    """Hold OUTPUT.part, the folder for the work on an output, which is created if missing.

    Raises InputError for a folder of that name which no program made for that, since it is removed in the end; Busy as
    `exclusive_lock` does.
    """
    if _is_foreign(part):
        time.sleep(0.5)  # a process that has just ended may be removing it
        if _is_foreign(part):
            raise InputError(f"{part}: is the name for unfinished work, and something else is there; move or delete it")
    with exclusive_lock(part / PART_LOCK, refusal):
        yield


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder in OUTPUT.part, from which the block makes `output`; removes it in the end.

    Raises as `lock_part` does.
    """
    part = output.with_name(f"{output.name}.part")
    with lock_part(part, f"{part}: another process writes {output.name}; wait for it or end it"):
        try:
            shutil.rmtree(part / "new", ignore_errors=True)  # of a process that was killed
            (part / "new").mkdir()
            yield part / "new"
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _is_foreign(part: Path) -> bool:
    return part.exists() and not (part.is_dir() and ((part / PART_LOCK).exists() or not any(part.iterdir())))


def _wait_for_lock(file: IO[str], refusal: str) -> None:
    """Lock an open file. Raises Busy if another process still holds the lock after `lock_seconds`."""
    seconds, started, has_printed = lock_seconds(), time.monotonic(), False
    while True:
        try:
            return lock_file(file, wait=False)
        except BlockingIOError:
            holder = _holder(file)
            if time.monotonic() - started >= seconds:
                waited = f"; waited {seconds:g} s" if seconds else ""
                raise Busy(f"{refusal} ({holder}{waited})") from None
            if not has_printed:
                print(f"{file.name}: locked by {holder}; waiting at most {seconds:g} s", flush=True)
                has_printed = True
            time.sleep(min(0.2, seconds))


def _holder(file: IO[str]) -> str:
    """Return the process named in a lock file."""
    file.seek(0)
    words = file.read(200).split()
    if len(words) != 4 or not words[0].isdigit():
        return "another process"
    pid, host, *since = words
    ended = host == socket.gethostname() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists()
    who = f"a process that PID {pid} started, which has ended," if ended else f"PID {pid}"
    return f"{who} on {host}, since {' '.join(since)} UTC"


def lock_file(file: IO[Any], *, shared: bool = False, wait: bool = True) -> None:
    """Lock an open file, exclusively or shared with other readers, until it is closed or unlocked.

    wait: until no other process holds a lock that excludes this one; otherwise raises BlockingIOError where one does.
    Does nothing if Python has no `fcntl`: there, two programs in one folder do not notice each other.
    """
    if fcntl is not None:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def unlock_file(file: IO[Any]) -> None:
    """Release a lock of `lock_file`."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_UN)


def is_writable(folder: Path) -> bool:
    """Return whether files can be written into a folder, which may not exist yet, or into that of a file."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return os.access(existing, os.W_OK | os.X_OK)


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` replaced; that of an unknown user stays as it is, so that there is no such file."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Return the folder of this user's caches."""
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "triderm-dist"
