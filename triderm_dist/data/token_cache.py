"""Cache on local disk for the tokens of frozen towers, and for what the frozen blocks of towers that train return.

A cache belongs to one tower (or its frozen blocks) at one resolution and one packed set (`cache_key`). It holds several
versions of every photo: `plain`, the transforms of the dihedral group, and augmented ones. A version is written in
chunks of lesions, each atomically, so that an interrupted extraction resumes at the next chunk and ranks share the work
without communicating. A chunk is an .npy file followed by `_TRAILER` and the CRC-32 of everything before, which a
process compares when it first opens the chunk. A process keeps the `MAX_OPEN` most recently used chunks mapped, since
each needs a descriptor.
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
from triderm_dist.runtime.process import open_files_limit
from triderm_dist.schema import DataError, one_line

CHUNK = 256
"""Lesions per file."""
MAX_OPEN = 128
"""Chunks that a process keeps open; less where it may open few files."""
_TRAILER = b"CRC32"


class TokenCache:
    """Tokens (L, D) of each photo, memory-mapped. lesions: rows of the packed set.  dtype: float16 or float32.

    shape: (L, D), or that of what frozen blocks return for a photo.
    """

    def __init__(
        self, folder: Path, lesions: int, shape: tuple[int, ...], dtype: type[np.floating] = np.float16
    ) -> None:
        self.folder, self.lesions, self.shape, self.dtype = folder, lesions, shape, np.dtype(dtype)
        self._maps: dict[tuple[str, int], np.ndarray] = {}
        self._checked: set[tuple[str, int]] = set()
        self._max_open = min(MAX_OPEN, max(1, open_files_limit() // 4))

    def means(self) -> TokenCache:
        """Return the cache of the mean token of each photo, as one token in float32, in a folder of its own."""
        return TokenCache(
            self.folder.with_name(f"{self.folder.name}-mean"), self.lesions, (1, self.shape[-1]), np.float32
        )

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
        """Store the tokens (n, views, *shape) of a chunk."""
        content = io.BytesIO()
        np.save(content, tokens.astype(self.dtype, copy=False))
        with atomic_path(self._path(version, chunk), PATIENT_DATA) as temporary, temporary.open("wb") as file:
            file.write(content.getbuffer())
            file.write(_TRAILER + zlib.crc32(content.getbuffer()).to_bytes(4, "little"))

    def read(self, rows: np.ndarray, view: int, versions: Sequence[str], out: np.ndarray) -> None:
        """Fill `out` (n, *shape) with the tokens of one view of `rows` (n,), each row in its own version."""
        for i, (row, version) in enumerate(zip(rows, versions, strict=True)):
            out[i] = self._open(version, row // CHUNK)[row % CHUNK, view]

    def read_chunk(self, version: str, chunk: int) -> np.ndarray:
        """Return the tokens (n, views, *shape) of a chunk, mapped."""
        return self._open(version, chunk)

    def _open(self, version: str, chunk: int) -> np.ndarray:
        key = version, chunk
        tokens = self._maps.pop(key, None)
        if tokens is None:
            path = self._path(version, chunk)
            tokens = _open_checked(path, compare=key not in self._checked)
            expected = (len(self.rows(chunk)), *self.shape)
            found = (len(tokens), *tokens.shape[2:]) if tokens.ndim > 2 else ()
            if tokens.dtype != self.dtype or found != expected:
                raise DataError(f"{path}: holds other tokens; delete it, and the next run computes it again")
            self._checked.add(key)
        self._maps[key] = tokens  # the dict is in the order of the last use
        if len(self._maps) > self._max_open:
            del self._maps[next(iter(self._maps))]
        return tokens

    def _path(self, version: str, chunk: int) -> Path:
        return self.folder / version / f"{chunk:06d}.npy"


class JoinedCache:
    """Several caches of one token a photo, read side by side as one token in float32."""

    def __init__(self, caches: Sequence[TokenCache]) -> None:
        self.caches = tuple(caches)
        self.shape = (1, sum(cache.shape[1] for cache in caches))
        self.dtype = np.dtype(np.float32)

    def read(self, rows: np.ndarray, view: int, versions: Sequence[str], out: np.ndarray) -> None:
        """Fill `out` (n, 1, D) as `TokenCache.read` does."""
        start = 0
        for cache in self.caches:
            end = start + cache.shape[1]
            cache.read(rows, view, versions, out[:, :, start:end])
            start = end


def _open_checked(path: Path, compare: bool) -> np.ndarray:
    """Map a chunk into memory. Raises DataError for a damaged one; compare: also its content with its checksum.

    A chunk of version 0.1.0 ends with its last number, without a checksum: its numbers are checked to be finite.
    """
    try:
        if not compare:
            mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            return mapped
        content: Any = np.memmap(path, np.uint8, "r")
        tokens: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        end = tokens.offset + tokens.nbytes
        if end == len(content):
            intact = bool(np.isfinite(tokens).all())
        else:
            trailer = _TRAILER + zlib.crc32(content[:end]).to_bytes(4, "little")
            intact = content[end:].tobytes() == trailer
    except FileNotFoundError:
        raise
    except Exception as error:  # the header is parsed as Python, and may raise anything
        text = one_line(error, 160)
        raise DataError(f"{path}: not readable ({text}); delete it, and the next run computes it") from None
    if not intact:
        raise DataError(f"{path}: changed or damaged; delete it, and the next run computes it again")
    return tokens


def cache_key(**identity: object) -> str:
    """Return a short hash of everything that the tokens depend on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
