"""The tars of another program in a folder, or behind its URL, and the task.yaml beside them."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from triderm_dist.data.shards.format import INDEX, SHARD_NAME_RULE, is_shard_name
from triderm_dist.data.shards.open import is_url
from triderm_dist.data.shards.publish import RemoteFolder
from triderm_dist.data.shards.scan_tar import TarFile
from triderm_dist.data.threads import map_in_order
from triderm_dist.files import why_no_folder
from triderm_dist.runtime.messages import printable
from triderm_dist.runtime.redact import redact
from triderm_dist.schema import ConfigError, DataError, Task
from triderm_dist.tasks import TASK_FILE, load_task

LISTED_AT_ONCE = 16
"""Files of a server that gives a list of links of which the size is asked for at the same time."""

_OTHER_TAR = re.compile(r"\.tar\..+|\.(tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def folder_task(folder: str) -> Task | None:
    """Return the task of the task.yaml in a folder or behind its URL, None if there is none.

    Raises ConfigError for a bad one, DataError for a URL that cannot be read.
    """
    if not is_url(folder):
        own = Path(folder) / TASK_FILE
        return load_task(own) if own.is_file() else None
    try:
        content = RemoteFolder(folder).read(TASK_FILE)
    except OSError as error:
        raise _unreadable(error) from None
    if content is None:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / TASK_FILE
        path.write_bytes(content)
        try:
            return load_task(path)
        except ConfigError as error:
            raise ConfigError(str(error).replace(temporary, redact(folder).rstrip("/"))) from None


def list_tars(folder: str) -> tuple[list[TarFile], list[str]]:
    """Return the tars of a folder or behind its URL, sorted by name, and the names of tars that are not read:
    compressed, partly downloaded, or in folders of the folder. Raises DataError for a folder that is not indexed.
    """
    shown = redact(folder).rstrip("/")
    tars, others = _behind_url(folder) if is_url(folder) else _in_folder(Path(folder))
    for tar in tars:
        if not is_shard_name(tar.name):
            raise DataError(f"{printable(f'{shown}/{tar.name}')}: {SHARD_NAME_RULE}; rename it")
    if not tars:
        first = (
            f"; decompress {others[0]} to a plain tar first, since photos are read at random offsets" if others else ""
        )
        raise DataError(f"{shown}: no *.tar in this folder{first}")
    return sorted(tars, key=lambda tar: tar.name), sorted(others)


def _in_folder(path: Path) -> tuple[list[TarFile], list[str]]:
    """Return the tars of a folder, and the names of other tars."""
    if not path.is_dir():
        raise DataError(f"{path}: {why_no_folder(path)}; give the folder that holds the WebDataset tars")
    try:
        _refuse_packed(path, (path / INDEX).read_bytes() if (path / INDEX).is_file() else None)
    except OSError as error:
        raise DataError(f"{path / INDEX}: not readable ({error.strerror}); remove it") from None
    tars = []
    for each in path.iterdir():
        if _is_tar(each.name):
            if not each.is_file():
                raise DataError(f"{each}: not a file; move it away, or restore the file that it links to")
            status = each.stat()
            tars.append(TarFile(os.path.abspath(path), each.name, status.st_size, status.st_mtime_ns))
    others = [each.name for each in path.iterdir() if _is_other_tar(each.name)]
    return tars, [*others, *(str(each.relative_to(path)) for each in path.glob("*/*.tar"))]


def _behind_url(url: str) -> tuple[list[TarFile], list[str]]:
    """Return what `_in_folder` does of a folder behind a URL, whose folders are not looked into."""
    remote, shown = RemoteFolder(url), redact(url).rstrip("/")
    try:
        _refuse_packed(shown, remote.read(INDEX))
        found = remote.list()
        names = [name for name in found if _is_tar(name)]
        unknown = [name for name in names if found[name]["size"] is None]
        found.update((name, info or {}) for name, info in map_in_order(remote.info, unknown, LISTED_AT_ONCE))
    except FileNotFoundError:
        raise DataError(f"{shown}: no such folder, or its server lists no files; give the URL of a folder") from None
    except OSError as error:
        raise _unreadable(error) from None
    tars = []
    for name in names:
        if (size := found[name].get("size")) is None:
            raise DataError(f"{shown}/{name}: the server does not say how many bytes it has; copy the tars to a folder")
        said = hashlib.sha256(repr(sorted(found[name].items())).encode()).digest()
        tars.append(TarFile(url, name, size, int.from_bytes(said[:7])))
    return tars, [name for name in found if _is_other_tar(name)]


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not _is_hidden(name)


def _is_other_tar(name: str) -> bool:
    return bool(_OTHER_TAR.search(name)) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return name.startswith("._")  # macOS writes ._NAME beside each file on disks of other systems


def _refuse_packed(folder: str | Path, index: bytes | None) -> None:
    """Raise DataError where the content of an index.json, which may be damaged, was written by triderm pack."""
    if index and b'"packed_with"' in index:
        raise DataError(f"{folder}: written by triderm pack, which made its index; use the folder as it is")


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename}: {error.strerror}; check the address and the credentials")
