"""Distribute the lesions of a set among its shards, in a fixed pseudo-random order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import overload

import numpy as np

from triderm_dist.data.readers.lesion_table import LesionTable
from triderm_dist.schema import Lesion


class ShardLesions(Sequence[list[Lesion]]):
    """The lesions of each shard, created on access. Lesions are in the order of the SHA-256 of their ids."""

    def __init__(self, table: LesionTable, shard_samples: int) -> None:
        self._table, self._samples = table, shard_samples
        hashes = (hashlib.sha256(name.encode()).digest() for name in table.ids)
        # The first 4 bytes of each hash, then the row: they are sorted where they are, unlike by argsort.
        keys = np.fromiter((int.from_bytes(digest[:4]) << 32 for digest in hashes), np.uint64, len(table))
        keys |= np.arange(len(keys), dtype=np.uint32)
        keys.sort()
        self._order = keys.astype(np.uint32)
        keys >>= np.uint64(32)
        for first, last in _runs(keys):  # of hashes that begin alike
            names = {row: table.ids[row].encode() for row in self._order[first:last].tolist()}
            self._order[first:last] = sorted(names, key=lambda row: hashlib.sha256(names[row]).digest())

    def __len__(self) -> int:
        return -(-len(self._table) // self._samples)

    def size(self, number: int) -> int:
        """Return the number of lesions of a shard."""
        return min(self._samples, len(self._table) - number * self._samples)

    @overload
    def __getitem__(self, number: int) -> list[Lesion]: ...
    @overload
    def __getitem__(self, number: slice) -> list[list[Lesion]]: ...
    def __getitem__(self, number: int | slice) -> list[Lesion] | list[list[Lesion]]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        start = range(len(self))[number] * self._samples
        return self._table.lesions(self._order[start : start + self._samples])


def _runs(keys: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, behind the last) of each run of equal keys, of sorted ones (N,)."""
    equal = np.flatnonzero(keys[1:] == keys[:-1]).tolist()
    runs: list[tuple[int, int]] = []
    for at in equal:
        if runs and runs[-1][1] == at + 1:
            runs[-1] = (runs[-1][0], at + 2)
        else:
            runs.append((at, at + 2))
    return runs
