"""Write the files of a set into a folder behind a URL, each whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from triderm_dist.data.shards.format import INDEX, SAMPLES
from triderm_dist.data.shards.open import is_url
from triderm_dist.data.shards.remote import address_of, retried
from triderm_dist.files import resolve_dots
from triderm_dist.runtime.redact import redact

_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "hf", "memory"}
"""Protocols of file systems where a file appears when its upload is complete; elsewhere it is renamed then."""


def local_name(output: str | os.PathLike[str]) -> Path:
    """Return an output folder, or for a URL a name in the working folder, from which names of related files derive."""
    if not is_url(output):
        return resolve_dots(Path(output))
    where = redact(os.fspath(output)).partition("://")[2].partition("?")[0]
    return Path(re.sub(r"[^A-Za-z0-9._]+", "-", where).strip("-.") or "output")


class RemoteFolder:
    """A folder behind a URL. Errors that may pass are retried; the others are those of `retried`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def put(self, path: Path, name: str) -> None:
        """Upload a local file under a name, and compare its size."""
        size = path.stat().st_size

        def work(files: Any, location: str) -> None:
            protocols = files.protocol if isinstance(files.protocol, tuple | list) else (files.protocol,)
            if _WHOLE.intersection(protocols):
                files.put_file(str(path), location)
            else:
                files.makedirs(location.rpartition("/")[0], exist_ok=True)
                temporary = f"{location}.{os.urandom(4).hex()}.part"
                try:
                    files.put_file(str(path), temporary)
                    files.mv(temporary, location)
                finally:
                    if files.exists(temporary):
                        files.rm_file(temporary)
            if (found := files.info(location)["size"]) != size:
                raise ConnectionError(f"{found} of {size} bytes have arrived")

        retried(address_of(self.url, name), work)

    def put_index(self, folder: Path) -> None:
        """Upload the index of a local folder, index.json last, which makes the set complete."""
        for name in (SAMPLES, INDEX):
            self.put(folder / name, name)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, None if there is none."""
        try:
            content: bytes = retried(address_of(self.url, name), lambda files, location: files.cat_file(location))
        except FileNotFoundError:
            return None
        return content

    def list(self) -> dict[str, dict[str, Any]]:
        """Return what the server says of the files of the folder, by name: a list of links has no `size`.

        Raises FileNotFoundError where there is no such folder, or the server lists none.
        """

        def work(files: Any, location: str) -> dict[str, dict[str, Any]]:
            files.invalidate_cache()
            parents = (location.rstrip("/"), location.partition("?")[0].rstrip("/"))  # of links with and without query
            entries = [entry for entry in files.ls(location, detail=True) if entry["type"] == "file"]
            named = ((*entry["name"].rpartition("/")[::2], entry) for entry in entries)
            return {name: entry for parent, name, entry in named if parent in parents and name}

        return retried(self.url, work)

    def info(self, name: str) -> dict[str, Any] | None:
        """Return what the server says of a file, such as its `size`, None if there is none."""
        try:
            return retried(address_of(self.url, name), lambda files, location: dict(files.info(location)))
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, None if there is none."""
        info = self.info(name)
        return None if info is None else int(info["size"])

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            retried(address_of(self.url, name), lambda files, location: files.rm(location, recursive=True))
