"""The format of a shard set on disk: file names, schemas and value types. Opens no tar."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.schema import VIEWS, Task

FORMAT = "triderm-shards"
VERSION = 2
INDEX, SAMPLES = "index.json", "samples.parquet"
ROW_GROUP = 1 << 17
_CHUNK = 1 << 14
"""Strings that are made at a time."""
MAX_DIGITS = 64
"""Bytes of the longest string that is sorted as a number."""
UNLABELED_KEY = "unlabelled"
"""Key of lesions without a label in the counts of index.json; its spelling is part of the format."""
EXTENSIONS: dict[str, tuple[str, ...]] = {view: (f"{view}.jpg",) for view in VIEWS}
"""File extensions of each view's photo in a shard, after the lesion id and a dot."""

SHARD_NAME_RULE = "the name of a shard has 1 to 200 letters A-Z, digits, . _ - and ends with .tar"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,195}\.tar")


def is_shard_name(name: str) -> bool:
    """Return whether a shard may have this name: no path, no option of a command, nothing that a shell would read."""
    return _SHARD_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class ShardFile:
    """One file of a packed set: name in the folder, number of lesions, size and SHA-256 of its bytes."""

    url: str
    samples: int
    bytes: int
    sha256: str


class Text(Sequence[str]):
    """N strings in one block of memory. Indexed by a row it gives a str, by rows (n,) an array (n,) of str objects."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        column = column.cast(pa.large_string())
        self._column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # one is copied, too
        _, ends, text = self._column.buffers()
        self._ends = np.frombuffer(ends or bytes(8), np.int64)[self._column.offset :]
        self._text = memoryview(text or b"")

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, rows: int) -> str: ...
    @overload
    def __getitem__(self, rows: slice | np.ndarray) -> Any: ...
    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, int | np.integer):
            return self._column[int(rows)].as_py()
        if isinstance(rows, slice) or rows.dtype == bool:
            rows = np.arange(len(self))[rows]
        result = np.empty(len(rows), object)
        starts, ends = self._ends[rows].tolist(), self._ends[rows + 1].tolist()
        result[:] = [str(self._text[start:end], "utf-8") for start, end in zip(starts, ends, strict=True)]
        return result

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            yield from self._column.slice(start, _CHUNK).to_pylist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.tolist(), object).astype(dtype or object)

    def tolist(self) -> list[str]:
        return self._column.to_pylist()

    @property
    def column(self) -> pa.Array:
        """(N,) large_string."""
        return self._column

    def take(self, rows: np.ndarray) -> Text:
        """Return the strings of these rows (n,)."""
        return Text(pa.chunked_array([self._column.take(pa.array(rows))]))

    @property
    def codes(self) -> np.ndarray:
        """(N,) int32, equal where the strings are equal, from 0 in the order of first appearance."""
        return to_array(self._column.dictionary_encode().indices)

    @property
    def sorted_codes(self) -> np.ndarray:
        """(N,) int32, equal where the strings are equal, from 0 in the order of the strings."""
        if (numbers := self._numbers()) is not None:
            order = np.argsort(numbers)
            numbers = numbers[order]
            place = np.zeros(len(order), np.int32)
            np.cumsum(numbers[1:] != numbers[:-1], out=place[1:])
            result = np.empty(len(order), np.int32)
            result[order] = place
            return result
        encoded = self._column.dictionary_encode()
        order = to_array(pc.array_sort_indices(encoded.dictionary))  # of their UTF-8: that of Python's strings
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        return place[to_array(encoded.indices)]

    def _numbers(self) -> np.ndarray | None:
        """Return a number for each string, (N,) uint64, in the order of the strings; None where 64 bits are too few.

        A byte is a digit with as many values as there are at its place, so ids that differ in decimal digits only take
        3.3 bits for each. Numbers are sorted in a quarter of the time that strings take, and in less memory.
        """
        width = int(np.diff(self._ends[: len(self) + 1]).max(initial=0))
        if width > MAX_DIGITS or np.frombuffer(self._text, np.uint8).min(initial=255) == 0:  # pads shorter ones
            return None
        low, high = np.full(width, 255, np.uint8), np.zeros(width, np.uint8)
        for text in self._padded(width):
            np.minimum(low, text.min(axis=0), out=low)
            np.maximum(high, text.max(axis=0), out=high)
        values = (high.astype(int) - low + 1).tolist()
        if math.prod(values) > 2**64:
            return None
        result = np.zeros(len(self), np.uint64)
        start = 0
        for text in self._padded(width):
            numbers = result[start : start + len(text)]
            for place in np.flatnonzero(high > low).tolist():
                numbers *= np.uint64(values[place])
                numbers += text[:, place] - low[place]
            start += len(text)
        return result

    def _padded(self, width: int) -> Iterator[np.ndarray]:
        """Yield the UTF-8 of the strings in blocks of rows, (n, width) uint8, shorter ones with zeros at the end."""
        text = np.frombuffer(self._text, np.uint8)
        for start in range(0, len(self), ROW_GROUP):
            ends = self._ends[start : min(start + ROW_GROUP, len(self)) + 1]
            lengths, content = np.diff(ends), text[ends[0] : ends[-1]]
            if lengths.min() == width:
                yield content.reshape(len(lengths), width)
            else:
                block = np.zeros((len(lengths), width), np.uint8)
                block[np.arange(width) < lengths[:, None]] = content
                yield block

    def equals(self, other: Text) -> bool:
        """Return whether all strings are equal."""
        return bool(self._column.equals(other._column))


def to_array(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return a column (N,) of numbers, none missing. pyarrow's `to_numpy` imports pandas: 0.3 s and 55 MB."""
    if isinstance(column, pa.Array):
        return np.from_dlpack(column)
    chunks = [np.from_dlpack(chunk) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.empty(0, column.type.to_pandas_dtype())


def samples_schema(concepts: int, metadata_fields: int, fine: bool) -> pa.Schema:
    """Return the columns of samples.parquet for K concepts and M metadata fields; where there are none, no column.

    fine: whether the task has finer labels.
    """
    locations = [
        (f"{view}_{what}", kind) for view in VIEWS for what, kind in (("offset", pa.int64()), ("size", pa.int32()))
    ]
    return pa.schema(
        [
            ("lesion_id", pa.string()),
            ("group", pa.string()),
            ("label", pa.int16()),
            *([("fine", pa.int16())] if fine else []),
            ("shard", pa.int32()),
            *locations,
            # Parquet cannot hold lists of length 0.
            *(
                (name, pa.list_(pa.float32(), n))
                for name, n in (("concepts", concepts), ("metadata", metadata_fields))
                if n
            ),
        ]
    )


def rows_schema(task: Task, concepts: Sequence[str]) -> pa.Schema:
    """Return the columns that `write_index` takes: those of samples.parquet, and `photos`: `size_and_hash` per view."""
    photos = pa.field("photos", pa.list_(pa.uint64(), 3 * len(VIEWS)))
    return samples_schema(len(concepts), len(task.fields), bool(task.fine)).append(photos)
