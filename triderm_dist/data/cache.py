"""Shards behind a URL, through a cache on the node's own disk that its ranks share.

Training starts when the index is there; shards follow in the order of the plan. Every file is checked against size and
SHA-256 of the index on arrival and appears whole or not at all. Processes talk by file locks alone, which the system
drops when one dies: who reads a shard holds a shared lock on it, who removes it an exclusive one, and who fetches it
holds NAME.lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from triderm_dist.config import RemoteConfig
from triderm_dist.data.shards import INDEX, SAMPLES, ShardFile, ShardIndex, read_index
from triderm_dist.schema import ConfigError, DataError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
_FETCHED = re.compile(r"(?P<name>.+)\.(?P<bytes>\d+)\.fetch(?P<attempt>\.\d+)?")
"""A file on its way: reserved under this name, written under this name and the number of the attempt."""
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What trying again can't cure, by name: these classes live in packages that may not be installed.
_HOPELESS = {"NoCredentialsError", "PartialCredentialsError", "RepositoryNotFoundError", "GatedRepoError"}


def is_url(where: str | os.PathLike[str]) -> bool:
    """Whether shards lie behind a URL (or a `pipe:` command) and not in a folder."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(//|:)|pipe:", str(where)))


def open_index(where: str | os.PathLike[str], remote: RemoteConfig, verify: bool = False) -> ShardIndex:
    """The index of a packed set in a folder or behind a URL; `verify` hashes a folder's shards first.

    Behind a URL, index.json and samples.parquet are fetched now, and shards when they are read. Raises DataError as
    `read_index` does, or where a file can't be had within `remote.total_seconds`; ConfigError for a command that is
    not allowed.
    """
    if not is_url(where):
        return read_index(where, verify)
    store = Store(str(where), remote)
    path = _fetch_index(store, cache_root(remote))
    cache = Cache(cache_root(remote), path.parent, store)
    cache.hold(_samples_file(path, store)).close()
    index = read_index(path.parent, shards_here=False)
    return replace(index, remote=cache)


def index_file(where: str, remote: RemoteConfig) -> Path:
    """index.json of a packed set as a local file; fetched first where the set lies behind a URL."""
    return _fetch_index(Store(where, remote), cache_root(remote)) if is_url(where) else Path(where) / INDEX


def cache_root(remote: RemoteConfig) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(remote.cache or home / "triderm-dist" / "shards").expanduser()


def _fetch_index(store: Store, root: Path) -> Path:
    """index.json, in a folder that is named by its content: a set that changed is another set."""
    part = root / f"{INDEX}.{os.getpid()}-{threading.get_ident()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        store.fetch(ShardFile(INDEX, 0, -1, ""), part)
        folder = root / hashlib.sha256(part.read_bytes()).hexdigest()[:16]
        folder.mkdir(exist_ok=True)
        return part.replace(folder / INDEX)
    except OSError as error:
        raise _disk_error(root, error) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _samples_file(path: Path, store: Store) -> ShardFile:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))["samples"]
        return ShardFile(SAMPLES, int(entry["rows"]), int(entry["bytes"]), str(entry["sha256"]))
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{store.shown(INDEX)}: not an index of shards; give the address of a folder that shards.pack wrote"
        ) from None


# --- one file of a remote folder -------------------------------------------------------------------------------------


class Store:
    """The files of one remote folder. Raises ConfigError for a command where `remote.allow_commands` is off."""

    def __init__(self, url: str, remote: RemoteConfig) -> None:
        self.url, self.remote = url.rstrip("/"), remote
        if url.startswith("pipe:") and not remote.allow_commands:
            raise ConfigError(f"{url}: runs a command; set data.remote.allow_commands=true if it is yours")
        if url.startswith("pipe:") and "{}" not in url:
            raise ConfigError(f"{url}: write {{}} where the file name belongs, as in pipe:cat folder/{{}}")

    def address(self, name: str) -> str:
        """The URL of one file; a query, such as an access token, stays at the end."""
        address, question, query = self.url.partition("?")
        return f"{address.rstrip('/')}/{name}{question}{query}"

    def shown(self, name: str) -> str:
        """The address for messages: without query and password."""
        if self.url.startswith("pipe:"):
            return self.url.replace("{}", name)
        return re.sub(r"//[^/@]*@", "//", self.address(name).partition("?")[0])

    def fetch(self, file: ShardFile, path: Path, stop: threading.Event | None = None) -> None:
        """Fetch a file to `path`, which others must not look at yet, and check its size (unless -1) and SHA-256.

        A download that stalls, breaks or brings wrong bytes is tried again after a pause that doubles up to 15 s,
        with jitter. Raises DataError when `remote.total_seconds` are over, or at once for what trying again can't
        cure: no such file, no permission, a full disk.
        """
        stop = stop or threading.Event()
        deadline = time.monotonic() + self.remote.total_seconds
        attempt = 0
        while True:
            attempt += 1
            beside = path.with_name(f"{path.name}.{attempt}")
            try:
                self._download(file, beside, deadline, stop)
                _check(beside, file)
                beside.replace(path)
                return
            except _Stopped:
                raise
            except Exception as error:  # what networks raise is not one family
                if reason := self._hopeless(error, path):
                    raise DataError(f"{self.shown(file.url)}: {reason}") from None
                problem = _one_line(error)
            finally:
                beside.unlink(missing_ok=True)  # the thread of a stalled download may still hold it open
            pause = min(0.1 * 2**attempt, 15.0) * random.uniform(0.5, 1.5)
            if time.monotonic() + pause > deadline:
                raise DataError(
                    f"{self.shown(file.url)}: not fetched within {self.remote.total_seconds:g} s and {attempt} "
                    f"attempts, the last one: {problem}; see to the server, or raise data.remote.total_seconds"
                )
            log.warning("%s: attempt %d: %s; again in %.1f s", self.shown(file.url), attempt, problem, pause)
            if stop.wait(pause):
                raise _Stopped

    def _download(self, file: ShardFile, path: Path, deadline: float, stop: threading.Event) -> None:
        """One attempt, watched: no library gives a time limit for every kind of URL, so a thread that stalls is left
        behind."""
        self._import()
        progress = _Progress(file.bytes)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self._copy(file.url, path, progress)
            except BaseException as error:
                failure.append(error)
            finally:
                progress.done.set()

        threading.Thread(target=work, name=f"fetch {file.url}", daemon=True).start()
        seen, since = (-1, -1), time.monotonic()
        while not progress.done.wait(POLL_SECONDS):
            now = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                if seen != (state := (progress.bytes, path.stat().st_size)):
                    seen, since = state, now
            stalled = now - since > self.remote.stall_seconds
            if stalled or now > deadline or stop.is_set():
                progress.abandon()
                if stop.is_set():
                    raise _Stopped
                raise TimeoutError(f"no byte for {self.remote.stall_seconds:g} s" if stalled else "too slow")
        if failure:
            raise failure[0]

    def _copy(self, name: str, path: Path, progress: _Progress) -> None:
        if self.url.startswith("pipe:"):
            command = self.url.removeprefix("pipe:").replace("{}", name)
            with path.open("wb") as out:
                process = subprocess.Popen(command, shell=True, stdout=out, start_new_session=True)
                progress.on_abandon = lambda: os.killpg(process.pid, signal.SIGKILL)
                if status := process.wait():
                    raise OSError(f"the command ended with status {status}")
            return
        import fsspec

        files, place = fsspec.core.url_to_fs(self.address(name), **self._options)
        files.get_file(place, str(path), callback=progress.callback())

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        """What the file system of this URL is made with; importing it is not part of any download."""
        if not self.url.startswith(("http://", "https://")):
            return {}
        import aiohttp

        quiet = self.remote.stall_seconds
        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=quiet, sock_read=quiet)}}

    def _import(self) -> None:
        if not self.url.startswith("pipe:"):
            import fsspec

            fsspec.core.url_to_fs(self.url, **self._options)

    def _hopeless(self, error: Exception, path: Path) -> str | None:
        """Why trying again is no use, or None."""
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return str(_disk_error(path.parent, error))
        if isinstance(error, FileNotFoundError):
            return "no such file; check the address, or upload the whole folder again"
        status = getattr(error, "status", 0)
        if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _HOPELESS:
            return f"no permission ({_one_line(error)}); check the credentials"
        if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
            return f"refused by the server ({_one_line(error)})"
        if isinstance(error, ImportError) or (isinstance(error, ValueError) and "Protocol" in str(error)):
            return f"{_one_line(error)}; pip install 'triderm-dist[remote]' brings s3:// and gs://"
        return None


class _Stopped(Exception):
    """Nobody waits for this download any more."""


class _Progress:
    """Bytes of one attempt, and how to end it from another thread."""

    def __init__(self, expected: int) -> None:
        self.expected, self.bytes, self.done = expected, 0, threading.Event()
        self.abandoned = False
        self.on_abandon: Callable[[], None] = lambda: None

    def abandon(self) -> None:
        self.abandoned = True
        with contextlib.suppress(ProcessLookupError):
            self.on_abandon()

    def callback(self) -> Any:
        from fsspec.callbacks import Callback

        progress = self

        class Watched(Callback):
            def relative_update(self, inc: int = 1) -> None:
                progress.bytes += inc
                if progress.abandoned:
                    raise TimeoutError("abandoned")
                if 0 <= progress.expected < progress.bytes:
                    raise OSError(f"more than the {progress.expected} bytes of {INDEX}")

        return Watched()


def _check(path: Path, file: ShardFile) -> None:
    """Raises OSError where a fetched file is not the one that the index describes; makes it durable where it is."""
    if file.bytes < 0:
        return
    size = path.stat().st_size
    if size != file.bytes:
        raise OSError(f"{size} bytes came, {INDEX} says {file.bytes}")
    with path.open("rb+") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
            raise OSError(f"the bytes that came are not those of {INDEX} (SHA-256 differs)")
        os.fsync(opened.fileno())


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")


def _disk_error(folder: Path, error: OSError) -> DataError:
    if error.errno in _DISK_FULL:
        return DataError(
            f"{folder}: the disk is full ({error.strerror}); free some space, or set data.remote.cache to another disk"
        )
    return DataError(f"{folder}: {error.strerror or error}; set data.remote.cache to a folder that can be written")


# --- the cache of a node ---------------------------------------------------------------------------------------------


class Held:
    """An open file of the cache that nobody removes before `close`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def close(self) -> None:
        # A thread that is reading holds the file object, and with it the descriptor, until it is done.
        fcntl.flock(self.file, fcntl.LOCK_UN)


class Cache:
    """Files of one remote set in `folder`, within the byte limit that all sets under `root` share."""

    def __init__(self, root: Path, folder: Path, store: Store) -> None:
        self.root, self.folder, self.store = root, folder, store
        self.limit = int(store.remote.cache_gb * 1e9)

    def hold(self, file: ShardFile, stop: threading.Event | None = None) -> Held:
        """The file, fetched if it is not there; by another process, if that was first.

        Raises DataError as `Store.fetch`, where the cache has no room for it, or after twice `remote.total_seconds`
        of waiting for others.
        """
        stop = stop or threading.Event()
        path = self.folder / file.url
        deadline = time.monotonic() + 2 * self.store.remote.total_seconds
        try:
            while True:
                if held := _hold(path, file.bytes):
                    return held
                with _locked(_lock_of(path)) as mine:
                    if mine and not _is_whole(path, file.bytes):
                        self._bring(file, path, stop, deadline)
                        continue
                if stop.wait(POLL_SECONDS):
                    raise _Stopped
                if time.monotonic() > deadline:
                    raise DataError(
                        f"{path}: another process has been at it for {2 * self.store.remote.total_seconds:g} s; "
                        "end it, or remove the cache folder"
                    )
        except OSError as error:
            raise _disk_error(self.folder, error) from None

    def _bring(self, file: ShardFile, path: Path, stop: threading.Event, deadline: float) -> None:
        """Fetch a file into the cache; the caller holds its NAME.lock."""
        part = path.with_name(f"{path.name}.{file.bytes}.fetch")
        while not self._reserve(file, part):
            if stop.wait(4 * POLL_SECONDS):
                raise _Stopped
            if time.monotonic() > deadline:
                raise DataError(
                    f"{self.root}: {self.limit / 1e9:g} GB are full of shards that are being read; end other runs, or "
                    "raise data.remote.cache_gb"
                )
        try:
            self.store.fetch(file, part, stop)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, file: ShardFile, part: Path) -> bool:
        """Make room for a file and mark it as taken by an empty file; False if it must wait for others."""
        if file.bytes > self.limit:
            raise DataError(
                f"{self.store.shown(file.url)}: its {file.bytes / 1e9:.2f} GB do not fit into the cache of "
                f"{self.limit / 1e9:g} GB; raise data.remote.cache_gb"
            )
        with _locked(self.root / "cache.lock", wait=True):
            used, removable = self._inventory()
            for _, path, size in sorted(removable):
                if used + file.bytes <= self.limit and self._free() >= file.bytes:
                    break
                if _remove(path):
                    used -= size
            if self._free() < file.bytes:
                raise OSError(errno.ENOSPC, f"{file.bytes / 1e9:.2f} GB needed, {self._free() / 1e9:.2f} GB free")
            if used + file.bytes > self.limit:
                return False
            part.touch()
            return True

    def _free(self) -> int:
        return shutil.disk_usage(self.root).free

    def _inventory(self) -> tuple[int, list[tuple[float, Path, int]]]:
        """Bytes taken or reserved, and (last use, path, bytes) of the files that may go if nobody holds them."""
        used, removable = 0, []
        for path in self.root.glob("*/*"):
            if path.name in (INDEX, SAMPLES) or path.suffix == ".lock":
                continue
            with contextlib.suppress(FileNotFoundError):
                if fetched := _FETCHED.fullmatch(path.name):
                    with _locked(_lock_of(path.with_name(fetched["name"]))) as nobody_fetches:
                        if nobody_fetches:
                            path.unlink()  # left by a process that was killed
                        elif not fetched["attempt"]:
                            used += int(fetched["bytes"])
                else:
                    about = path.stat()
                    used += about.st_size
                    removable.append((about.st_mtime, path, about.st_size))
        return used, removable


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def _locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """An exclusive lock on a lock file; False where another one has it and we do not wait."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _hold(path: Path, size: int) -> Held | None:
    """The file under a shared lock; None if it is not there or about to be removed."""
    try:
        file = path.open("rb", buffering=0)
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError):
        return None
    about = os.fstat(file.fileno())
    if about.st_nlink == 0 or about.st_size != size:
        return None
    with contextlib.suppress(OSError):
        os.utime(file.fileno())  # the time of the last use
    return Held(file)


def _remove(path: Path) -> bool:
    """Remove a file that nobody holds."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (FileNotFoundError, BlockingIOError):
        return False
    return True


# --- reading ---------------------------------------------------------------------------------------------------------


class FolderShards:
    """Shards of a local folder, opened when they are first read; the last `OPEN` stay open."""

    OPEN = 256

    def __init__(self, index: ShardIndex) -> None:
        self._index, self._files, self._lock = index, dict[int, IO[bytes]](), threading.Lock()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard. Raises DataError where it has vanished or become shorter."""
        try:
            with self._lock:
                file = self._files.pop(shard, None) or self._index.path(shard).open("rb", buffering=0)
                self._files[shard] = file  # the last one used is the last one of the dict
                if len(self._files) > self.OPEN:
                    del self._files[next(iter(self._files))]  # closed when its last reader drops it
            return _pread(file, offset, size)
        except OSError as error:
            raise DataError(
                f"{self._index.path(shard)}: {error.strerror or error}, while it was being read; bring it back and run "
                "the same command again, which goes on at the last checkpoint"
            ) from None

    @contextlib.contextmanager
    def follow(self, order: np.ndarray, batch: int) -> Iterator[Callable[[int], None]]:
        """See `RemoteShards.follow`; all that is needed is here."""
        yield lambda batches: None

    def close(self) -> None:
        self._files.clear()


class RemoteShards:
    """Shards of a remote set. Inside `follow` they are fetched ahead in the order in which they will be read."""

    def __init__(self, index: ShardIndex) -> None:
        assert index.remote
        self._cache, self._shards = index.remote, index.shards
        self._pass: _Pass | None = None

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard, which is fetched first if need be. Raises DataError where it can't be had."""
        ahead = self._pass
        if ahead and ahead.wants(shard):
            return _pread(ahead.file(shard), offset, size)
        held = self._cache.hold(self._shards[shard])
        try:
            return _pread(held.file, offset, size)
        finally:
            held.close()

    @contextlib.contextmanager
    def follow(self, order: np.ndarray, batch: int) -> Iterator[Callable[[int], None]]:
        """Fetch ahead for reads that follow `order` (n,), the shard of each sample of all ranks, `batch` samples a
        step.

        Yields a function to call with the number of steps whose reads are done. Raises ConfigError where the shards
        that one step needs do not fit into the cache together.
        """
        self.close()
        self._pass = current = _Pass(self._cache, self._shards, order, batch)
        try:
            yield current.done
        finally:
            current.close()
            if self._pass is current:
                self._pass = None

    def close(self) -> None:
        if self._pass:
            self._pass.close()


class _Pass:
    """One pass over an order: what is held, what comes next.

    Shards are taken in the order of their first use, as long as all that are live fit into the cache: those whose last
    use is not yet more than two steps behind (ranks walk in step, but not on the same foot) and whose first use was
    reached. So no rank can take the room that another one needs to go on.
    """

    def __init__(self, cache: Cache, shards: tuple[ShardFile, ...], order: np.ndarray, batch: int) -> None:
        self._cache, self._shards, self._slack, self._batch = cache, shards, 2 * batch, batch
        self._last = np.full(len(shards), -1, np.int64)
        self._last[order] = np.arange(len(order))  # of equal indices the last assignment stays
        first = np.full(len(shards), len(order), np.int64)
        first[order[::-1]] = np.arange(len(order))[::-1]
        self._queue = np.argsort(first, kind="stable")[: int((self._last >= 0).sum())]
        self._check_room(first[self._queue])
        self._next, self._position, self._taken = 0, 0, dict[int, int]()
        self._held: dict[int, Held] = {}
        self._failure: BaseException | None = None
        self._stop, self._changed = threading.Event(), threading.Condition()
        _allow_open_files(len(self._queue))
        for number in range(cache.store.remote.downloads):
            threading.Thread(target=self._work, name=f"shards ahead {number}", daemon=True).start()

    def wants(self, shard: int) -> bool:
        """Whether a read that is still to come needs this shard."""
        return bool(self._last[shard] >= self._position)

    def file(self, shard: int) -> IO[bytes]:
        """The open file of a shard, when it is there."""
        with self._changed:
            while True:
                if self._failure:
                    raise self._failure
                if shard in self._held:
                    return self._held[shard].file
                if self._stop.is_set():
                    raise DataError(f"{self._shards[shard].url}: nobody waits for it any more")
                self._changed.wait()

    def done(self, steps: int) -> None:
        with self._changed:
            self._position = steps * self._batch
            for shard in [shard for shard in self._held if self._last[shard] < self._position]:
                self._held.pop(shard).close()
            for shard in [s for s in self._taken if self._last[s] < self._position - self._slack]:
                del self._taken[shard]
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._stop.set()
            while self._held:
                self._held.popitem()[1].close()
            self._changed.notify_all()

    def _work(self) -> None:
        while (shard := self._take()) is not None:
            try:
                held = self._cache.hold(self._shards[shard], self._stop)
            except _Stopped:
                return
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._stop.set()
                    self._changed.notify_all()
                return
            with self._changed:
                if self._stop.is_set() or self._last[shard] < self._position:
                    held.close()
                else:
                    self._held[shard] = held
                self._changed.notify_all()

    def _take(self) -> int | None:
        """The next shard that there is room for; None when nothing is left to do."""
        with self._changed:
            while not self._stop.is_set() and self._next < len(self._queue):
                shard = int(self._queue[self._next])
                if sum(self._taken.values()) + self._shards[shard].bytes <= self._cache.limit:
                    self._next += 1
                    self._taken[shard] = self._shards[shard].bytes
                    return shard
                self._changed.wait()
        return None

    def _check_room(self, first: np.ndarray) -> None:
        """first: of each shard in the queue."""
        size = np.array([shard.bytes for shard in self._shards], np.int64)[self._queue]
        begin, end = np.maximum(first - self._batch, 0), self._last[self._queue] + self._slack + 1
        change = np.argsort(np.concatenate([begin, end]), kind="stable")
        need = int(np.cumsum(np.concatenate([size, -size])[change]).max(initial=0))
        if need > self._cache.limit:
            raise ConfigError(
                f"data.remote.cache_gb={self._cache.limit / 1e9:g}: this order needs {need / 1e9:.3g} GB of shards at "
                "a time; raise it, or lower train.sampling.window (samples that are shuffled together)"
            )


def _pread(file: IO[bytes], offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise DataError(
            f"{file.name}: ends before byte {offset + size}, it was cut off; run shards.verify, then pack again"
        )
    return data


def _allow_open_files(number: int) -> None:
    """Every shard in use is an open file; systems allow 1,024 unless asked for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
