"""Open a packed set by folder or URL."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
from dataclasses import replace
from pathlib import Path

from triderm_dist.config import RemoteConfig
from triderm_dist.data.shards.cache import Cache
from triderm_dist.data.shards.format import INDEX, SAMPLES, ShardFile
from triderm_dist.data.shards.index import ShardIndex, index_fingerprint, read_index
from triderm_dist.data.shards.index_schema import check_content, read_index_json
from triderm_dist.data.shards.remote import Store, disk_error
from triderm_dist.files import cache_folder, copy_file, file_sha256
from triderm_dist.runtime.redact import restore_urls
from triderm_dist.schema import DataError

_FOLDER = 0o750
"""Mode of the folders of the cache, less the umask: they hold photos of patients."""
COLUMNS = "columns"
"""Folder of the cache with the columns of large sets (see `columns`)."""
TARS = "tars.url"
"""File beside an index whose tars are elsewhere, with the URL of their folder."""


def is_url(where: str | os.PathLike[str]) -> bool:
    """Return whether this is a URL (or a `pipe:` command), not a folder."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(//|:)|pipe:", str(where)))


def open_index(where: str | os.PathLike[str], remote: RemoteConfig, verify: bool = False) -> ShardIndex:
    """Open the index of a packed set in a folder or behind a URL. verify: hash the shards of a folder first.

    Behind a URL, index.json and samples.parquet are fetched now, and shards when they are read, as are the shards of a
    folder whose tars are behind a URL (`TARS`). Raises DataError as `read_index` does, or if a file cannot be
    fetched within `remote.total_seconds`; ConfigError for a command that is not allowed.
    """
    if is_url(where):
        store = Store(str(where), remote)
    elif (tars := Path(where) / TARS).is_file():
        store = _IndexedStore(restore_urls(tars.read_text(encoding="utf-8").strip()), remote, Path(where))
    else:
        return read_index(where, verify, _shards_of_this_rank(), cache_folder() / COLUMNS)
    path = _fetch_index(store, cache_root(remote))
    cache = Cache(cache_root(remote), path.parent, store)
    cache.open(_samples_file(path, store)).close()
    index = read_index(path.parent, tars=slice(0), shared=cache.root / COLUMNS)
    return replace(index, remote=cache)


class _IndexedStore(Store):
    """The tars behind a URL, and their index in a local folder."""

    def __init__(self, url: str, remote: RemoteConfig, folder: Path) -> None:
        super().__init__(url, remote)
        self._folder = folder

    def fetch(self, file: ShardFile, path: Path, stop: threading.Event | None = None) -> None:
        if file.url not in (INDEX, SAMPLES):
            return super().fetch(file, path, stop)
        try:
            copy_file(self._folder / file.url, path)
        except FileNotFoundError:
            raise DataError(f"{self._folder / file.url}: missing; index the tars again") from None

    def shown(self, name: str) -> str:
        return str(self._folder / name) if name in (INDEX, SAMPLES) else super().shown(name)


def has_tars(where: str | os.PathLike[str]) -> bool:
    """Return whether this is a folder with an index and its tars."""
    return not is_url(where) and (Path(where) / INDEX).is_file() and not (Path(where) / TARS).is_file()


def index_file(where: str, remote: RemoteConfig) -> Path:
    """Return the local path of a packed set's index.json, after fetching it if the set is behind a URL."""
    return _fetch_index(Store(where, remote), cache_root(remote)) if is_url(where) else Path(where) / INDEX


def _shards_of_this_rank() -> slice:
    """Return which shards this process looks for: every one if it is alone, else every N-th of N ranks."""
    rank, ranks = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return slice(int(rank), None, int(ranks)) if rank.isdecimal() and ranks.isdecimal() else slice(None)


def is_packed(where: str) -> bool:
    """Return whether this is a URL, or a folder with an index."""
    return is_url(where) or (Path(where) / INDEX).is_file()


def set_fingerprint(where: str, remote: RemoteConfig) -> str:
    """Return the `ShardIndex.fingerprint` of a packed set without opening it. Raises DataError if there is none."""
    path = index_file(where, remote)
    if not path.is_file():
        raise DataError(f"{path}: no such file; create it by triderm pack")
    return index_fingerprint(path, read_index_json(path))


def cache_root(remote: RemoteConfig) -> Path:
    """Return the folder that caches remote shards on this node: of a folder that everybody may write to, such as /tmp,
    a folder of this user in it. Raises DataError if that is of another user, who could change what is trained on.
    """
    root = Path(remote.cache or cache_folder() / "shards")
    if hasattr(os, "getuid") and root.is_dir() and root.stat().st_mode & stat.S_IWOTH:
        root = root / f"triderm-{os.getuid()}"
        with contextlib.suppress(OSError):
            root.mkdir(mode=0o700)
        if root.is_symlink() or (root.is_dir() and root.stat().st_uid != os.getuid()):
            raise DataError(
                f"{root}: belongs to another user; set data.remote.cache to a folder that only you may write to"
            )
    return root


def _fetch_index(store: Store, root: Path) -> Path:
    """Fetch index.json into a folder named by its hash, so that a set that changed is cached as another set."""
    part = root / f"{INDEX}.{os.urandom(8).hex()}"  # process ids are alike in containers
    try:
        root.mkdir(parents=True, exist_ok=True, mode=_FOLDER)
        store.fetch(ShardFile(INDEX, 0, -1, ""), part)
        folder = root / file_sha256(part)[:16]
        folder.mkdir(exist_ok=True, mode=_FOLDER)
        return part.replace(folder / INDEX)
    except OSError as error:
        raise disk_error(root, error) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _samples_file(path: Path, store: Store) -> ShardFile:
    """Return samples.parquet as an index.json describes it. Raises DataError if that is not an index."""
    try:
        return check_content(read_index_json(path), path).samples.file
    except DataError as error:
        why = str(error).removeprefix(f"{path}: ").partition(";")[0]
        raise DataError(
            f"{store.shown(INDEX)}: not an index of shards ({why}); give the address of a folder of triderm pack"
        ) from None
