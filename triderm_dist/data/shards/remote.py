"""Fetch single files of a packed set behind a URL: retries, stall detection, checksum."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from triderm_dist.config import RemoteConfig
from triderm_dist.data.shards.format import INDEX, ShardFile
from triderm_dist.files import file_sha256
from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.redact import REDACTED, URLS, redact, register_secrets
from triderm_dist.schema import ConfigError, DataError

POLL_SECONDS = 0.05
HOST_ATTEMPTS = {socket.EAI_NONAME: 4, socket.EAI_AGAIN: 7}
"""Attempts until a host whose name has no address, or is not resolved for now, is refused: a few and twenty seconds."""

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)
_reached = set[str]()
"""Hosts from which this process has read a file."""
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
"""A name that is safe in a URL, a path and a command, of which a leading - would be an option."""
# Errors that a retry cannot fix, by name, since their packages may not be installed.
_PERMANENT = {"NoCredentialsError", "PartialCredentialsError", "RepositoryNotFoundError", "GatedRepoError"}
_UNKNOWN_HOST = "no such host; check the address, and this machine's network"
_INSTALL = "https://, s3:// and gs:// need pip install 'triderm-dist[remote]'"


class FetchStopped(Exception):
    """The caller no longer needs the file."""


class UnknownURL(Exception):
    """The URL is of no kind that is read."""


class Store:
    """The files of one remote folder. Raises ConfigError for a command unless `remote.allow_commands` is set."""

    def __init__(self, url: str, remote: RemoteConfig) -> None:
        self.url, self.remote = url.rstrip("/"), remote
        self._reached = False
        if REDACTED in url:
            raise ConfigError(
                f"{url}: saved settings hold no passwords and tokens; give the whole URL again, as the setting or in "
                f"the environment variable {URLS}"
            )
        register_secrets(url)
        if url.startswith("pipe:"):
            if not remote.allow_commands:
                raise ConfigError(f"{redact(url)}: runs a command; set data.remote.allow_commands=true if you trust it")
            self._words = _command(url)

    def shown(self, name: str) -> str:
        """Return the address for messages: without query and password."""
        if self.url.startswith("pipe:"):
            return redact(self.url.replace("{}", name))
        return re.sub(r"//[^/@]*@", "//", address_of(self.url, name).partition("?")[0])

    def fetch(self, file: ShardFile, path: Path, stop: threading.Event | None = None) -> None:
        """Fetch a file to `path`, which no other process reads yet, and check its size, unless that is -1, and its
        SHA-256, unless that is empty.

        A download that stalls, breaks or delivers wrong bytes is retried after a pause that doubles up to 15 s, with
        jitter. Raises DataError after `remote.total_seconds`, at once for an error that a retry cannot fix (no such
        file, no permission, a full disk), or after `HOST_ATTEMPTS` for a host whose name is not resolved and was never
        reached; FetchStopped once `stop` is set.
        """
        if not _FILE_NAME.fullmatch(file.url):
            raise DataError(f"{self.shown(INDEX)}: lists a file {file.url!r}; only letters, digits and ._- are allowed")
        stop = stop or threading.Event()
        deadline = time.monotonic() + self.remote.total_seconds
        attempt = 0
        while True:
            attempt += 1
            part = path.with_name(f"{path.name}.{attempt}")
            try:
                self._download(file, part, deadline, stop)
                _check(part, file)
                part.replace(path)
                self._reached = True
                return
            except FetchStopped:
                raise
            except Exception as error:  # network errors have no common base class
                if reason := self._permanent_reason(error, path):
                    raise DataError(f"{self.shown(file.url)}: {reason}") from None
                if not self._reached and _is_unknown_host(error, attempt):
                    raise DataError(f"{self.shown(file.url)}: {_UNKNOWN_HOST}") from None
                problem = one_line(error, 300, with_type=True)
            finally:
                part.unlink(missing_ok=True)  # the thread of a stalled download may still have it open
            pause = pause_before(attempt)
            if time.monotonic() + pause > deadline:
                raise DataError(
                    f"{self.shown(file.url)}: not fetched within {self.remote.total_seconds:g} s and {attempt} "
                    f"attempts, the last error: {problem}; check the server, or raise data.remote.total_seconds"
                )
            _log.warning("%s: attempt %d failed: %s; retrying in %.1f s", self.shown(file.url), attempt, problem, pause)
            if stop.wait(pause):
                raise FetchStopped

    def _download(self, file: ShardFile, path: Path, deadline: float, stop: threading.Event) -> None:
        """Make one attempt in a thread, and abandon the thread if it stalls: no library has a timeout for every kind of
        URL.
        """
        self._import_file_system()
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
        last_state, last_change = (-1, -1), time.monotonic()
        while not progress.done.wait(POLL_SECONDS):
            now = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                if last_state != (state := (progress.bytes, path.stat().st_size)):
                    last_state, last_change = state, now
            stalled = now - last_change > self.remote.stall_seconds
            if stalled or now > deadline or stop.is_set():
                progress.abandon()
                if stop.is_set():
                    raise FetchStopped
                raise TimeoutError(f"no byte for {self.remote.stall_seconds:g} s" if stalled else "too slow")
        if failure:
            raise failure[0]

    def _copy(self, name: str, path: Path, progress: _Progress) -> None:
        if self.url.startswith("pipe:"):
            command = [word.replace("{}", name) for word in self._words]
            with path.open("wb") as out:
                process = subprocess.Popen(command, stdout=out, start_new_session=True)
                progress.on_abandon = lambda: os.killpg(process.pid, signal.SIGKILL)
                if progress.abandoned:  # before the command had started
                    progress.abandon()
                if status := process.wait():
                    raise OSError(f"the command ended with status {status}")
            return
        file_system, location = _open_file_system(address_of(self.url, name), self._options)
        file_system.get_file(location, str(path), callback=progress.callback())

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        return _file_system_options(self.url, self.remote.stall_seconds)

    def _import_file_system(self) -> None:
        """Import what the URL needs, so that the time it takes does not count as a stall."""
        if not self.url.startswith("pipe:"):
            _open_file_system(self.url, self._options)

    def _permanent_reason(self, error: Exception, path: Path) -> str | None:
        """Return the message for an error that a retry cannot fix, else None."""
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return str(disk_error(path.parent, error))
        if self.url.startswith("pipe:") and isinstance(error, OSError) and error.filename == self._words[0]:
            return f"{error.filename}: {error.strerror}; give a program of the PATH, or its whole path"
        text = one_line(error, 300, with_type=True)
        match _kind_of(error):
            case "missing":
                return "no such file; check the address, or upload the whole folder again"
            case "refused":
                return f"no permission ({text}); check the credentials"
            case "invalid":
                return f"refused by the server ({text})"
            case "unknown":
                return f"{text}; {_INSTALL}"
        return None


def _kind_of(error: Exception) -> Literal["missing", "refused", "invalid", "unknown"] | None:
    """Return the kind of an error that a retry cannot fix: no such file, no permission, a request that the server does
    not take, or a URL for which a package is missing; else None.
    """
    cause = error.__cause__
    if isinstance(cause, Exception) and (
        isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    ):
        error = cause  # fsspec takes any error of an HTTP server for a missing file when it asks for a size
    status = getattr(error, "status", 0)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "missing"
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _PERMANENT:
        return "refused"
    if isinstance(error, NotImplementedError) or status == 501:  # a file system or server that is not written to
        return "invalid"
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return "invalid"
    if isinstance(error, ImportError | UnknownURL):
        return "unknown"
    return None


def _open_file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the file system of a URL and the location in it. Raises UnknownURL where fsspec makes none of such URLs,
    as of `dir://`, which it does not say by one kind of error.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **options)
    except (AttributeError, IsADirectoryError, TypeError, ValueError) as error:
        raise UnknownURL(f"no file system is made of such a URL ({one_line(error, 200)})") from None


def _is_unknown_host(error: BaseException | None, attempt: int) -> bool:
    """Return whether the error, or one behind it, is of a host's name, and this is the last of its `HOST_ATTEMPTS`."""
    while error:
        if isinstance(error, OSError) and error.errno in HOST_ATTEMPTS:
            return attempt >= HOST_ATTEMPTS[error.errno]
        error = error.__cause__ or error.__context__
    return False


def _file_system_options(url: str, stall_seconds: float) -> dict[str, Any]:
    """Return the options of fsspec for the file system of a URL."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=stall_seconds, sock_read=stall_seconds)}}


def address_of(url: str, name: str) -> str:
    """Return the URL of a file in the folder of a URL, whose query stays at the end."""
    folder, question, query = url.partition("?")
    return f"{folder.rstrip('/')}/{name}{question}{query}"


def read_url(url: str, remote: RemoteConfig | None = None) -> bytes:
    """Return the content of a single file behind a URL, such as a photo. Raises as `retried`."""
    return retried(url, lambda files, location: files.cat_file(location), remote)


def retried(url: str, work: Callable[[Any, str], _Result], remote: RemoteConfig | None = None) -> _Result:
    """Return `work(file system, location)` of a URL, after retries of errors that may pass, as in `Store.fetch`.

    Raises FileNotFoundError; PermissionError; OSError for a request that the server refuses; DataError after
    `remote.total_seconds`, after `HOST_ATTEMPTS` for a host whose name is not resolved and was never
    reached, or for a URL that no package reads.
    """
    remote = remote or RemoteConfig()
    deadline, attempt, host = time.monotonic() + remote.total_seconds, 0, urlsplit(url).netloc
    while True:
        attempt += 1
        try:
            result = work(*_open_file_system(url, _file_system_options(url, remote.stall_seconds)))
            _reached.add(host)
            return result
        except Exception as error:  # network errors have no common base class
            shown, text = redact(url), one_line(error, 300, with_type=True)
            match _kind_of(error):
                case "missing":
                    raise FileNotFoundError(errno.ENOENT, "no such file", shown) from None
                case "refused":
                    raise PermissionError(errno.EACCES, "no permission", shown) from None
                case "invalid":
                    raise OSError(errno.EIO, f"refused ({text})", shown) from None
                case "unknown":
                    raise DataError(f"{shown}: {text}; {_INSTALL}") from None
            if host not in _reached and _is_unknown_host(error, attempt):
                raise DataError(f"{shown}: {_UNKNOWN_HOST}") from None
            pause = pause_before(attempt)
            if time.monotonic() + pause > deadline:
                raise DataError(
                    f"{shown}: no success within {remote.total_seconds:g} s and {attempt} attempts, the last error: "
                    f"{text}; check the server and rerun the same command"
                ) from None
            _log.warning("%s: attempt %d failed: %s; retrying in %.1f s", shown, attempt, text, pause)
            time.sleep(pause)


def pause_before(attempt: int) -> float:
    """Return the seconds to wait after so many failed attempts: they double up to 15, with jitter."""
    return float(min(0.1 * 2**attempt, 15.0) * random.uniform(0.5, 1.5))


def _command(url: str) -> list[str]:
    """Return the words of `pipe:COMMAND`, which no shell reads. Raises ConfigError where it was written for one."""
    try:
        words = shlex.split(url.removeprefix("pipe:"))
    except ValueError as error:
        raise ConfigError(f"{redact(url)}: not a command ({one_line(error)})") from None
    if not any("{}" in word for word in words):
        raise ConfigError(f"{redact(url)}: write {{}} where the file name belongs, as in pipe:cat folder/{{}}")
    if "{}" in words[0]:
        raise ConfigError(f"{redact(url)}: the file name can't be the program; write {{}} in an argument")
    if mark := _shell_mark(url):
        raise ConfigError(
            f"{redact(url)}: no shell reads the command, and {mark} is for one; quote it, or for pipes and variables "
            "write pipe:sh -c 'COMMAND {}'"
        )
    return words


def _shell_mark(text: str) -> str | None:
    """Return the first character that only a shell understands, and that is not quoted."""
    quote, letters = "", iter(text)
    for letter in letters:
        if letter == "\\" and quote != "'":
            next(letters, None)
        elif quote:
            if quote == '"' and letter in "$`":
                return letter
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "|&;<>$`*#":
            return letter
    return None


def disk_error(folder: Path, error: OSError) -> DataError:
    """Return the DataError for an OSError of the cache's disk."""
    if error.errno in _DISK_FULL:
        return DataError(
            f"{folder}: the disk is full ({error.strerror}); free some space, or set data.remote.cache to another disk"
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return DataError(f"{error.filename or folder}: {error.strerror}; raise ulimit -n")
    return DataError(f"{folder}: {error.strerror or error}; set data.remote.cache to a writable folder")


class _Progress:
    """Bytes of one attempt, and the means to end it from another thread."""

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
    """Compare a fetched file with the index and flush it to disk. Raises OSError where it differs."""
    if file.bytes < 0:
        return
    size = path.stat().st_size
    if size != file.bytes:
        raise OSError(f"got {size} bytes, {INDEX} lists {file.bytes}")
    if file.sha256 and file_sha256(path) != file.sha256:
        raise OSError(f"the SHA-256 of the bytes differs from that of {INDEX}")
    with path.open("rb+") as opened:
        os.fsync(opened.fileno())
