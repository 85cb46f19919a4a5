"""Write a tar whose bytes depend on its members only."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

from triderm_dist.files import PATIENT_DATA, naming_file, open_new


class TarWriter:
    """Writes a tar whose bytes depend on its members only, and hashes it."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open_new(path, PATIENT_DATA)
        self._digest = hashlib.sha256()
        self._position = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its data."""
        info = tarfile.TarInfo(name)  # owner, time and mode are constants
        info.size = len(data)
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8"))
        offset = self._position
        self._write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> tuple[int, str]:
        """Close the file and return its (bytes, SHA-256)."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._position % tarfile.RECORDSIZE))
        with naming_file(self._path):
            self._file.close()
        return self._position, self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        with naming_file(self._path):
            self._file.write(data)
        self._digest.update(data)
        self._position += len(data)
