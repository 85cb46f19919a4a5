"""Download the official files over HTTP: resumable by byte ranges, with checksums, and safe unpacking.

An incomplete file is NAME.part; NAME.part.json holds its length and entity tag on the server. It is renamed when it is
complete. An archive is unpacked to NAME.unpacking, which is renamed at the end. No member can leave that folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pydantic import BaseModel

from triderm_dist.checksums import DamagedFile, check_mapping, read_checked_json
from triderm_dist.cli import Interrupted
from triderm_dist.data.progress import Progress, no_progress
from triderm_dist.files import exclusive_lock, file_sha256, remove_dead_parts, write_json
from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.redact import redact
from triderm_dist.schema import DataError

BASE_URL = "https://isic-archive.s3.amazonaws.com/challenges/milk10k"
FILES: dict[str, tuple[str, ...]] = {
    "train": (
        "MILK10k_Training_Metadata.csv",
        "MILK10k_Training_GroundTruth.csv",
        "MILK10k_Training_Supplement.csv",
        "MILK10k_Training_Input.zip",
    ),
    "test": ("MILK10k_Test_Metadata.csv", "MILK10k_Test_Input.zip"),
}
"""The official files by part, small ones first."""

BLOCK = 1 << 20
MAX_RATIO = 200
"""Largest ratio of unpacked to packed size: photos hardly shrink in a zip, so more than this is a zip bomb."""


@dataclass(frozen=True)
class Remote:
    """A file on a server: length in bytes, entity tag and MD5, the latter two empty if the server sends none."""

    length: int
    tag: str
    md5: str


class _Retry(Exception):
    """A transient error, with its reason."""


class _Restart(_Retry):
    """A transient error after which the download starts from the first byte."""


# --- fetching --------------------------------------------------------------------------------------------------------


def fetch(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    attempts: int = 5,
    timeout: float = 30.0,
    pause: float = 1.0,
    progress: Progress = no_progress,
    verified: Callable[[Path, str], object] = lambda part, sha256: None,
) -> str:
    """Download `url` to `path`, resuming an incomplete download, and return its SHA-256.

    Checks the length that the server announced, and `sha256` if given, else the MD5 that S3 gives as entity tag of a
    file uploaded in one part. attempts: failed attempts in a row without a new byte before giving up. timeout: seconds
    without a byte that end an attempt. pause: seconds before the next attempt, doubled each time. verified: called with
    the complete file and its SHA-256 before it is renamed to `path`.

    Raises DataError for a URL that does not serve the file and for a wrong checksum, Interrupted if the server
    cannot be reached and the same call can resume later.
    """
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = _size(part)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remote = _attempt(url, part, timeout, progress)
            break
        except _Retry as error:
            failures = 0 if _size(part) > before else failures + 1
            if isinstance(error, _Restart):
                part.unlink(missing_ok=True)
            if failures >= attempts:
                kept = f"{_size(part)} bytes are kept, rerun the same command to resume"
                raise Interrupted(f"{url}: {error}, {attempts} attempts in a row; {kept}") from None
            time.sleep(pause * 2 ** max(failures - 1, 0))
        except OSError as error:
            advice = "free some space" if error.errno == errno.ENOSPC else "fix that"
            raise DataError(f"{part}: {error.strerror or error}; {advice} and rerun the same command") from None
    digests = _digests(part)
    expected, actual = (sha256, digests["sha256"]) if sha256 else (remote.md5, digests["md5"])
    if expected and expected != actual:
        part.unlink()
        _description_file(part).unlink(missing_ok=True)
        raise DataError(
            f"{url}: checksum {actual} is not the expected {expected}; the file was removed, rerun the command"
        )
    verified(part, digests["sha256"])
    part.replace(path)
    _description_file(part).unlink(missing_ok=True)
    return digests["sha256"]


def _attempt(url: str, part: Path, timeout: float, progress: Progress) -> Remote:
    """Request the missing bytes of a file. Raises _Retry if the transfer ended early."""
    have, known = _size(part), _read_description(part)
    if known is None:
        part.unlink(missing_ok=True)
        have = 0
    elif have >= known.length:
        if have == known.length:
            return known
        part.unlink()
        have = 0
    request = urllib.request.Request(url, headers={"User-Agent": "triderm-dist", "Accept-Encoding": "identity"})
    if have and known:
        request.add_header("Range", f"bytes={have}-")
        if known.tag:
            request.add_header("If-Range", known.tag)  # the server sends all of a file that changed
    with _opened(request, timeout) as response:
        start, remote = _announced(response, url)
        if start != have or (known and start and remote != known):
            if start:
                raise _Restart("the file changed on the server")
            have = 0
        write_json(_description_file(part), asdict(remote))
        with part.open("r+b" if have else "wb") as file:
            file.seek(have)
            for block in _blocks(response):
                if have + len(block) > remote.length:
                    raise _Restart("the server sent more bytes than it announced")
                file.write(block)
                have += len(block)
                progress(have, remote.length)
    if have < remote.length:
        raise _Retry(f"the connection ended after {have} of {remote.length} bytes")
    return remote


@contextlib.contextmanager
def _opened(request: urllib.request.Request, timeout: float) -> Iterator[http.client.HTTPResponse]:
    url = request.full_url
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            yield response
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise _Restart("the server no longer has these bytes") from None
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Retry(f"the server answered {error.code} {error.reason}") from None
        raise DataError(f"{url}: the server answered {error.code} {error.reason}; check base_url=") from None
    except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise _Retry(_reason(error)) from None
    except urllib.error.URLError as error:
        raise _Retry(_reason(error.reason)) from None
    except ValueError as error:
        raise DataError(f"{url}: not a valid URL ({error}); check base_url=") from None


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or one_line(error)


def _announced(response: http.client.HTTPResponse, url: str) -> tuple[int, Remote]:
    """Return (offset of the first byte sent, the complete file) from the headers of a response."""
    tag = response.headers.get("ETag", "")
    # The tag of another server, or of a file encrypted with a managed key, is not the MD5 of the content.
    from_s3 = "x-amz-request-id" in response.headers and "kms" not in response.headers.get(
        "x-amz-server-side-encryption", ""
    )
    md5 = tag.strip('"') if from_s3 and re.fullmatch(r'"[0-9a-f]{32}"', tag) else ""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if match:
            return int(match[1]), Remote(int(match[2]), tag, md5)
        raise DataError(f"{url}: the server sends a range without Content-Range; use another base_url=")
    length = response.headers.get("Content-Length", "")
    if not length.isdecimal():
        raise DataError(f"{url}: the server sends no Content-Length; use another base_url=")
    return 0, Remote(int(length), tag, md5)


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while block := response.read1(BLOCK):
        yield block


def _description_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_description(part: Path) -> Remote | None:
    """Return the server's description of an incomplete file; None if there is none."""
    try:
        return Remote(**json.loads(_description_file(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digests(path: Path) -> dict[str, str]:
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            for digest in digests.values():
                digest.update(block)
    return {name: digest.hexdigest() for name, digest in digests.items()}


# --- unpacking -------------------------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path, max_bytes: int, progress: Progress = no_progress) -> None:
    """Unpack a zip to `folder`, which appears when it is complete; checks the checksum of every member.

    If all members are in one folder of the same name, its content becomes that of `folder`.
    Raises DataError before writing a byte for a member that would leave the folder, is not a regular file, is listed
    twice, is encrypted, or grows more than `MAX_RATIO` times, and for more than `max_bytes` in total; later for a
    member that is damaged or larger than listed.
    """
    unpacking = folder.with_name(folder.name + ".unpacking")
    if unpacking.exists():
        shutil.rmtree(unpacking)  # left by a run that was killed
    try:
        with zipfile.ZipFile(archive) as file:
            members = _checked(archive, file, max_bytes)
            total, done = sum(info.file_size for info in members.values()), 0
            free = shutil.disk_usage(folder.parent).free
            if total > free:
                raise DataError(f"{folder.parent}: {free} bytes are free, {archive.name} needs {total}; free some")
            unpacking.mkdir(parents=True)
            for name, info in members.items():
                target = unpacking / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with file.open(info) as source, target.open("xb") as output:
                    _copy(source, output, info.file_size, f"{archive}, {name}")
                done += info.file_size
                progress(done, total)
        inner = unpacking / folder.name
        nested = inner.is_dir() and len(list(unpacking.iterdir())) == 1
        (inner if nested else unpacking).rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{archive}: not a valid zip ({one_line(error)}); delete it and rerun the command") from None
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}; fix that and rerun the command") from None
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def _checked(archive: Path, file: zipfile.ZipFile, max_bytes: int) -> Mapping[str, zipfile.ZipInfo]:
    """Check the members of an archive; return those that are files by their path inside the folder."""
    members: dict[str, zipfile.ZipInfo] = {}
    folded: set[str] = set()
    for info in file.infolist():
        where = f"{archive}, member {info.filename!r}"
        name = PurePosixPath(info.filename)
        mode = info.external_attr >> 16
        if name.is_absolute() or ".." in name.parts or re.search(r"[\\:\0]", info.filename) or not name.parts:
            raise DataError(f"{where}: would leave the folder; this is not the official archive")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(f"{where}: a link or a special file; this is not the official archive")
        if info.is_dir():
            continue
        if info.flag_bits & 1:
            raise DataError(f"{where}: encrypted; this is not the official archive")
        if str(name).casefold() in folded:
            raise DataError(f"{where}: listed twice; this is not the official archive")
        if info.file_size > MAX_RATIO * max(info.compress_size, 1024):
            raise DataError(f"{where}: {info.compress_size} bytes become {info.file_size}; refused as a zip bomb")
        folded.add(str(name).casefold())
        members[str(name)] = info
    if (total := sum(info.file_size for info in members.values())) > max_bytes:
        raise DataError(
            f"{archive}: {total} bytes unpacked, more than max_gb allows; raise max_gb if you trust the archive"
        )
    return members


def _copy(source: IO[bytes], output: IO[bytes], size: int, where: str) -> None:
    left = size
    while block := source.read(BLOCK):
        left -= len(block)
        if left < 0:
            raise DataError(f"{where}: larger than the {size} bytes in the archive's listing; refused as a zip bomb")
        output.write(block)
    if left:
        raise DataError(f"{where}: holds {size - left} of {size} bytes; delete the archive and rerun the command")


# --- download -------------------------------------------------------------------------------------------------------


def download(
    folder: Path,
    names: Sequence[str],
    *,
    base_url: str = BASE_URL,
    checksums: Mapping[str, str] | None = None,
    max_bytes: int = 20 * 10**9,
    keep_zip: bool = False,
    log: Callable[[str], object] = lambda text: None,
    progress: Callable[[str], contextlib.AbstractContextManager[Progress]] | None = None,
    **options: Any,
) -> None:
    """Fetch each of the files into `folder` and unpack the zips; files of an earlier download are kept.

    FOLDER/downloads.json lists length and SHA-256 of the downloaded files, each before it appears, so that a download
    that was killed is known for what it is. checksums: {name: expected SHA-256}. options: for `fetch`. Raises as
    `fetch` and `unpack` do, and Busy while another process downloads into the folder.
    """
    if not base_url.startswith(("https://", "http://")):
        raise DataError(f"base_url {base_url!r}: not an http or https URL")
    record = folder / "downloads.json"
    shown = progress or (lambda title: contextlib.nullcontext(no_progress))
    with _locked(folder):
        remove_dead_parts(folder)
        done = _read_record(record)
        for name in names:
            path, url = folder / name, f"{base_url.rstrip('/')}/{name}"
            target = path.with_suffix("") if path.suffix == ".zip" else path
            expected = (checksums or {}).get(name)

            def add(file: Path, sha256: str, name: str = name, url: str = url) -> None:
                done[name] = {"bytes": file.stat().st_size, "sha256": sha256, "url": redact(url)}
                write_json(record, done)

            if target.exists() and name in done:
                if expected and done[name]["sha256"] != expected:
                    raise DataError(
                        f"{target}: downloaded before with another checksum; delete it and rerun the command"
                    )
                log(f"{name}: downloaded before")
            elif target.exists():
                raise DataError(
                    f"{target}: exists, but was not downloaded by this program; choose another output folder"
                )
            else:
                if path.exists():
                    add(path, _checked_sha256(path, expected))
                else:
                    with shown(name) as shown_bytes:
                        fetch(url, path, sha256=expected, progress=shown_bytes, verified=add, **options)
                if path.suffix == ".zip":
                    with shown(f"unpacking {name}") as shown_bytes:
                        unpack(path, target, max_bytes, shown_bytes)
                log(f"{name}: {done[name]['bytes'] / 1e6:.1f} MB, sha256 {done[name]['sha256']}")
            _description_file(path.with_name(f"{name}.part")).unlink(missing_ok=True)  # of a run that was killed
            if path.suffix == ".zip" and not keep_zip:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other downloads by a file that is removed in the end. Raises Busy."""
    lock = folder / ".lock"
    with exclusive_lock(lock, f"{folder}: another download into this folder is running; wait for it or end it"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _checked_sha256(path: Path, expected: str | None) -> str:
    """Return the SHA-256 of an archive that a run which was killed, or the user, has downloaded."""
    sha256 = file_sha256(path)
    if expected and sha256 != expected:
        raise DataError(f"{path}: checksum {sha256} is not the expected {expected}; delete it and rerun the command")
    return sha256


class _Downloaded(BaseModel):
    bytes: int
    sha256: str


def _read_record(path: Path) -> dict[str, Any]:
    try:
        done = read_checked_json(path)
        for entry in done.values():
            check_mapping(entry, _Downloaded)
        return done
    except FileNotFoundError:
        return {}
    except DamagedFile as error:
        raise DataError(f"{path}: {error}; delete it and the files beside it, and rerun the same command") from None


def read_checksums(path: Path) -> dict[str, str]:
    """Read {file name: SHA-256} from a file written by `sha256sum`. Raises DataError for any other line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable ({getattr(error, 'strerror', None) or error})") from None
    sums = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *]?(.+)", line.strip())
        if not match:
            raise DataError(f"{path}, line {number}: not `SHA256  NAME` as sha256sum writes it")
        sums[os.path.basename(match[2])] = match[1].lower()
    return sums
