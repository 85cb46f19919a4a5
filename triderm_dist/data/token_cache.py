"""Cache on local disk for the tokens of frozen towers.

A cache belongs to one tower at one resolution and one packed set (`cache_key`). It holds several versions of every
photo: `plain`, the transforms of the dihedral group, and augmented ones. A version is written in chunks of lesions,
each atomically, so that an interrupted extraction resumes at the next chunk and ranks share the work without
communicating. A chunk is an .npy file followed by `_TRAILER` and the CRC-32 of everything before, which a process
compares when it first opens the chunk.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.files import PATIENT_DATA, atomic_path
from triderm_dist.schema import DataError, one_line

CHUNK = 256
"""Lesions per file."""
_TRAILER = b"CRC32"


class TokenCache:
    """Float16 tokens (L, D) of each photo, memory-mapped. lesions: rows of the packed set."""

    def __init__(self, folder: Path, lesions: int, shape: tuple[int, int]) -> None:
        self.folder, self.lesions, self.shape = folder, lesions, shape
        self._maps: dict[tuple[str, int], np.ndarray] = {}

    @property
    def chunks(self) -> range:
        return range(-(-self.lesions // CHUNK))

    def rows(self, chunk: int) -> np.ndarray:
        """Return the index rows of a chunk, (n,) int64, n <= CHUNK."""
        return np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, self.lesions))

    def has(self, version: str, chunk: int) -> bool:
        return self._path(version, chunk).exists()

    def missing(self, versions: Sequence[str]) -> list[tuple[str, int]]:
        """List the (version, chunk) pairs that are not on disk yet."""
        return [(version, chunk) for version in versions for chunk in self.chunks if not self.has(version, chunk)]

    def write(self, version: str, chunk: int, tokens: np.ndarray) -> None:
        """Store the tokens (n, views, L, D) of a chunk as float16."""
        content = io.BytesIO()
        np.save(content, tokens.astype(np.float16, copy=False))
        with atomic_path(self._path(version, chunk), PATIENT_DATA) as temporary, temporary.open("wb") as file:
            file.write(content.getbuffer())
            file.write(_TRAILER + zlib.crc32(content.getbuffer()).to_bytes(4, "little"))

    def read(self, rows: np.ndarray, view: int, versions: Sequence[str], out: np.ndarray) -> None:
        """Fill `out` (n, L, D) with the tokens of one view of `rows` (n,), each row in its own version."""
        for i, (row, version) in enumerate(zip(rows, versions, strict=True)):
            out[i] = self._open(version, row // CHUNK)[row % CHUNK, view]

    def _open(self, version: str, chunk: int) -> np.ndarray:
        tokens = self._maps.get((version, chunk))
        if tokens is None:
            tokens = _open_checked(self._path(version, chunk))
            self._maps[version, chunk] = tokens
        return tokens

    def _path(self, version: str, chunk: int) -> Path:
        return self.folder / version / f"{chunk:06d}.npy"


def _open_checked(path: Path) -> np.ndarray:
    """Map a chunk into memory. Raises DataError for a damaged one.

    A chunk of version 0.1.0 has no checksum: only its numbers are checked to be finite.
    """
    try:
        content: Any = np.memmap(path, np.uint8, "r")
        end = len(content) - len(_TRAILER) - 4
        has_checksum = end > 0 and content[end : end + len(_TRAILER)].tobytes() == _TRAILER
        intact = not has_checksum or zlib.crc32(content[:end]) == int.from_bytes(content[-4:].tobytes(), "little")
        tokens: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        intact = intact and (has_checksum or bool(np.isfinite(tokens).all()))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable ({one_line(error)}); delete it, and the next run computes it") from None
    if not intact:
        raise DataError(f"{path}: changed or damaged; delete it, and the next run computes it again")
    return tokens


def cache_key(**identity: object) -> str:
    """Return a short hash of everything that the tokens depend on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
