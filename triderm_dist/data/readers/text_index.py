"""Store millions of texts in little memory, and find them by their hashes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa

_BLOCK = 1 << 13
"""Texts in a block."""


class Texts(Sequence[str]):
    """A list of texts in blocks of 8,192; each block stores the common prefix and suffix of its texts once.

    A text takes the bytes between them, and 4 more in blocks whose texts differ in length. File names that are not
    valid UTF-8 are kept (`os.fsencode`).
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[bytes, pa.Array, bytes]] = []
        self._last: list[bytes] = []

    def append(self, text: str) -> None:
        self._last.append(os.fsencode(text))
        if len(self._last) == _BLOCK:
            prefix = _common_prefix(self._last)
            own = [text[len(prefix) :] for text in self._last]
            suffix = _common_prefix([text[::-1] for text in own])[::-1]
            own = [text[: len(text) - len(suffix)] for text in own]
            lengths = {len(text) for text in own}
            width = lengths.pop() if len(lengths) == 1 else -1  # of different lengths
            self._blocks.append((prefix, pa.array(own, pa.binary(width)), suffix))
            self._last = []

    def __len__(self) -> int:
        return len(self._blocks) * _BLOCK + len(self._last)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[each] for each in range(len(self))[at]]
        block, place = divmod(range(len(self))[at], _BLOCK)
        if block == len(self._blocks):
            return os.fsdecode(self._last[place])
        prefix, own, suffix = self._blocks[block]
        return os.fsdecode(prefix + own[place].as_py() + suffix)

    def __iter__(self) -> Iterator[str]:
        for prefix, own, suffix in self._blocks:
            yield from (os.fsdecode(prefix + text + suffix) for text in own.to_pylist())
        yield from map(os.fsdecode, self._last)


def _common_prefix(texts: Sequence[bytes]) -> bytes:
    """Return the longest prefix of all."""
    return os.path.commonprefix((min(texts), max(texts))) or b""  # noqa: RUF071, of bytes


class HashIndex:
    """Finds texts among N by their hashes, in 12 bytes per text. Hashes may collide: callers compare the texts.

    hashes: (N,) int64, of `hash`.
    """

    def __init__(self, hashes: array[int]) -> None:
        found = np.frombuffer(hashes, np.int64) if hashes else np.empty(0, np.int64)
        order = np.argsort(found, kind="stable")
        self._hashes = found[order]
        self._order = order.astype(np.int32) if len(order) < 1 << 31 else order

    @classmethod
    def of(cls, texts: Iterable[str]) -> HashIndex:
        return cls(array("q", map(hash, texts)))

    def positions(self, text: str) -> list[int]:
        """Return the positions of the texts with the hash of this one, ascending."""
        first, last = (int(np.searchsorted(self._hashes, hash(text), side)) for side in ("left", "right"))
        return self._order[first:last].tolist()

    def only(self, texts: Sequence[str]) -> np.ndarray:
        """Return the position (N,) of the only text with the hash of each, -1 for none or several."""
        wanted = np.fromiter(map(hash, texts), np.int64, len(texts))
        first = np.searchsorted(self._hashes, wanted)
        last = np.searchsorted(self._hashes, wanted, "right")
        return (
            np.where(last - first == 1, self._order[np.minimum(first, len(self._order) - 1)], -1)
            if len(self._order)
            else np.full(len(texts), -1)
        )
