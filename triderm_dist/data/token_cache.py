"""Cache on local disk for the tokens of frozen towers.

A cache belongs to one tower at one resolution and one packed set (`cache_key`). It holds several versions of every
photo: `plain`, the transforms of the dihedral group, and augmented ones. A version is written in chunks of lesions,
each atomically, so that an interrupted extraction resumes at the next chunk and ranks share the work without
communicating.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from triderm_dist.files import atomic_path

CHUNK = 256
"""Lesions per file."""


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
        with atomic_path(self._path(version, chunk)) as temporary, temporary.open("wb") as file:
            np.save(file, tokens.astype(np.float16, copy=False))

    def read(self, rows: np.ndarray, view: int, versions: Sequence[str], out: np.ndarray) -> None:
        """Fill `out` (n, L, D) with the tokens of one view of `rows` (n,), each row in its own version."""
        for i, (row, version) in enumerate(zip(rows, versions, strict=True)):
            out[i] = self._open(version, row // CHUNK)[row % CHUNK, view]

    def _open(self, version: str, chunk: int) -> np.ndarray:
        tokens = self._maps.get((version, chunk))
        if tokens is None:
            tokens = np.load(self._path(version, chunk), mmap_mode="r", allow_pickle=False)
            self._maps[version, chunk] = tokens
        return tokens

    def _path(self, version: str, chunk: int) -> Path:
        return self.folder / version / f"{chunk:06d}.npy"


def cache_key(**identity: object) -> str:
    """Return a short hash of everything that the tokens depend on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
