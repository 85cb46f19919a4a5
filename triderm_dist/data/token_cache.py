"""Cache on disk for the tokens of frozen towers, and for what the frozen blocks of towers that train return.

A cache belongs to one tower (or its frozen blocks) at one resolution and one packed set (`cache_key`). It holds several
versions of every photo: `plain`, the transforms of the dihedral group, and augmented ones. A version is a folder of at
most `MAX_CHUNKS` files, each with the same number of lesions (`TokenCache.chunk_lesions`) and written atomically, so
that an interrupted extraction resumes at the next file and ranks share the work. All records have one size: a read
finds its bytes by arithmetic, takes those only, and compares them with their checksum. Files stay open, as many as the
process may have (`MAX_OPEN`).

    KEY/VERSION/NNNNNN.tokens      header of `HEADER` bytes (JSON), then for each lesion and view a record
                                   (`TokenCodec`) and its CRC-32, which begins with the number of the record
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from triderm_dist.data.open_files import OpenFiles
from triderm_dist.data.token_codec import TokenCodec, TokenDtype
from triderm_dist.files import PATIENT_DATA, atomic_path
from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.process import open_files_limit, raise_open_files_limit
from triderm_dist.schema import DataError

FORMAT, VERSION = "triderm-tokens", 1
CHUNK = 256
"""Lesions that are computed and written at a time, and the fewest of a file."""
MAX_CHUNKS = 512
"""Most files of a version: few enough for those of several versions to stay open, enough for many ranks to share."""
MAX_OPEN = 8192
"""Files that a cache keeps open; fewer where the process may have few (`ulimit -n`), of which it takes a quarter."""
HEADER = 512
"""Bytes before the first record."""
_CRC = 4


class TokenCache:
    """Numbers of each photo. lesions: rows of the packed set.  shape: (L, D), or that of what frozen blocks return."""

    def __init__(self, folder: Path, lesions: int, shape: tuple[int, ...], dtype: TokenDtype = "float16") -> None:
        self.folder, self.lesions, self.codec = folder, lesions, TokenCodec(dtype, tuple(shape))
        self.chunk_lesions = CHUNK * max(1, -(-lesions // (CHUNK * MAX_CHUNKS)))
        self._views: dict[tuple[str, int], int] = {}  # of files whose header was compared
        raise_open_files_limit()
        self._files = OpenFiles[tuple[str, int], _Chunk](max(1, min(MAX_OPEN, open_files_limit() // 4)))

    def means(self) -> TokenCache:
        """Return the cache, in another folder, of the mean token of each photo, as one token in float32."""
        return TokenCache(
            self.folder.with_name(f"{self.folder.name}-mean"), self.lesions, (1, self.shape[-1]), "float32"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codec.shape

    @property
    def record_size(self) -> int:
        """Bytes of a photo, as `read` returns them."""
        return self.codec.size

    @property
    def chunks(self) -> range:
        return range(-(-self.lesions // self.chunk_lesions))

    def rows(self, chunk: int) -> np.ndarray:
        """Return the index rows of a chunk, (n,) int64."""
        return np.arange(chunk * self.chunk_lesions, min((chunk + 1) * self.chunk_lesions, self.lesions))

    def parts(self, chunk: int) -> list[np.ndarray]:
        """Return the index rows of a chunk, `CHUNK` at a time."""
        rows = self.rows(chunk)
        return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]

    def missing(self, versions: Collection[str]) -> list[tuple[str, int]]:
        """List the (version, chunk) pairs that are not on disk yet. Reads one folder per version."""
        result = []
        for version in versions:
            names: Collection[str] = ()
            with suppress(FileNotFoundError):
                names = set(os.listdir(self.folder / version))
            result += [(version, chunk) for chunk in self.chunks if self._path(version, chunk).name not in names]
        return result

    def write(self, version: str, chunk: int, numbers: np.ndarray) -> None:
        """Store the numbers (n, views, *shape) of a chunk."""
        self.write_parts(version, chunk, [self.codec.encode(torch.from_numpy(numbers)).numpy()])

    def write_parts(self, version: str, chunk: int, parts: Iterable[np.ndarray]) -> None:
        """Store a chunk, whose records (n, views, record_size) uint8 come in parts of some lesions.

        Each part is written while the next one is computed.
        """
        parts, rows = iter(parts), self.rows(chunk)
        part = next(parts)
        views, first, end = part.shape[1], int(rows[0]) * part.shape[1], (int(rows[-1]) + 1) * part.shape[1]
        with (
            atomic_path(self._path(version, chunk), PATIENT_DATA) as temporary,
            temporary.open("wb") as file,
            ThreadPoolExecutor(1, thread_name_prefix="write tokens") as pool,
        ):
            file.write(self._header(chunk, views))
            writing: Future[int] | None = None
            while True:
                if writing:
                    writing.result()
                records = part.reshape(-1, self.record_size)
                writing = pool.submit(lambda data: file.write(data), _with_checksums(records, first))
                first += len(records)
                if (following := next(parts, None)) is None:
                    break
                part = following
            writing.result()
            assert first == end

    def read(self, rows: np.ndarray, view: int, versions: Sequence[str], out: np.ndarray) -> None:
        """Fill `out` (n, record_size) uint8 with the records of one view of `rows` (n,), each row in its own version.

        Raises DataError if one is missing or damaged.
        """
        checksum = bytearray(_CRC)
        for row, version, record in zip(rows.tolist(), versions, out, strict=True):
            number = row // self.chunk_lesions
            chunk = self._chunk(version, number)
            chunk.read(row * chunk.views + view, [record, checksum])
            if zlib.crc32(record, row * chunk.views + view).to_bytes(_CRC, "little") != checksum:
                raise chunk.damaged()

    def decode(self, records: torch.Tensor, copy: bool = False) -> torch.Tensor:
        """Return records (n, record_size) as numbers (n, *shape) float32, see `TokenCodec.decode`."""
        return self.codec.decode(records, copy)

    def numbers(self, rows: np.ndarray, view: int, version: str) -> np.ndarray:
        """Return the numbers (n, *shape) float32 of one view of `rows` (n,)."""
        records = np.empty((len(rows), self.record_size), np.uint8)
        self.read(rows, view, [version] * len(rows), records)
        return self.decode(torch.from_numpy(records)).numpy()

    def numbers_of_all_views(self, rows: np.ndarray, version: str) -> np.ndarray:
        """Return the numbers (n, views, *shape) float32 of `rows` (n,), all of one chunk."""
        number = int(rows[0]) // self.chunk_lesions
        chunk = self._chunk(version, number)
        return np.stack([self.numbers(rows, view, version) for view in range(chunk.views)], 1)

    def earlier(self, version: str, rows: np.ndarray) -> np.ndarray | None:
        """Return the numbers (n, views, *shape) of a part (`parts`) that an earlier version of this package stored, in
        a file of its own; None if it did not, or if they are damaged.
        """
        try:
            content = self._earlier_path(version, rows).read_bytes()
            file = io.BytesIO(content)
            numbers: np.ndarray = np.load(file, allow_pickle=False)
        except Exception:  # the header is parsed as Python, and may raise anything
            return None
        end = file.tell()
        if end == len(content):  # the first ones had no checksum
            intact = bool(np.isfinite(numbers).all())
        else:
            intact = content[end:] == b"CRC32" + zlib.crc32(content[:end]).to_bytes(4, "little")
        shape = (len(numbers), *numbers.shape[2:]) if numbers.ndim > 1 else ()
        expected = str(numbers.dtype) == self.codec.dtype and shape == (len(rows), *self.shape)
        return numbers if intact and expected else None

    def remove_earlier(self, version: str, chunk: int) -> None:
        """Remove the files of `earlier` whose numbers are in this chunk."""
        for rows in self.parts(chunk):
            self._earlier_path(version, rows).unlink(missing_ok=True)

    def _earlier_path(self, version: str, rows: np.ndarray) -> Path:
        return self.folder / version / f"{int(rows[0]) // CHUNK:06d}.npy"

    def _chunk(self, version: str, number: int) -> _Chunk:
        """Return an open file. Raises DataError where it is missing, or not what this cache wrote."""
        try:
            return self._files.get((version, number), self._open_file)
        except FileNotFoundError as error:
            raise DataError(
                f"{error.filename}: no such file; the same command computes it again. Several nodes need a folder of "
                "tokens on a disk that they share"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            text, path = one_line(error, 160), self._path(version, number)
            raise DataError(f"{path}: not readable ({text}); delete it, and the next run computes it") from None

    def _open_file(self, key: tuple[str, int]) -> _Chunk:
        (version, number), size = key, self.record_size + _CRC
        path, rows = self._path(version, number), self.rows(number)
        file, views = path.open("rb", buffering=0), self._views.get(key)
        if views is None:
            header, found = file.read(HEADER), os.fstat(file.fileno()).st_size
            views = json.loads(header)["views"]
            if type(views) is not int or header != self._header(number, views):
                raise DataError(f"{path}: holds other tokens; delete it, and the next run computes it again")
            if found != HEADER + len(rows) * views * size:
                raise _damaged(path)
            self._views[key] = views
        return _Chunk(file, views, size, HEADER - int(rows[0]) * views * size)

    def _header(self, chunk: int, views: int) -> bytes:
        rows = self.rows(chunk)
        content = {
            "format": FORMAT, "version": VERSION, "first": int(rows[0]), "lesions": len(rows), "views": views,
            "shape": self.shape, "dtype": self.codec.dtype, "header": HEADER,
        }  # fmt: skip
        return f"{json.dumps(content):<{HEADER - 1}}\n".encode()

    def _path(self, version: str, chunk: int) -> Path:
        return self.folder / version / f"{chunk:06d}.tokens"


@dataclass(frozen=True)
class _Chunk:
    """An open file. size: bytes of a record and its checksum.  offset: where record 0 of the version would be."""

    file: IO[bytes]
    views: int
    size: int
    offset: int

    def read(self, record: int, buffers: list[Any]) -> None:
        """Read a record of the version and its checksum."""
        try:
            if os.preadv(self.file.fileno(), buffers, self.offset + record * self.size) != self.size:
                raise self.damaged()
        except OSError as error:
            raise DataError(f"{self.file.name}: {error.strerror or error}, while reading tokens") from None

    def damaged(self) -> DataError:
        return _damaged(self.file.name)


class JoinedCache:
    """Several caches of one token per photo in float32, read side by side as one token."""

    def __init__(self, caches: Sequence[TokenCache]) -> None:
        self.caches = tuple(caches)
        self.shape = (1, sum(cache.shape[1] for cache in caches))
        self.record_size = sum(cache.record_size for cache in caches)

    def read(self, rows: np.ndarray, view: int, versions: Sequence[str], out: np.ndarray) -> None:
        """Fill `out` (n, record_size) uint8 as `TokenCache.read` does."""
        start = 0
        for cache in self.caches:
            end = start + cache.record_size
            cache.read(rows, view, versions, out[:, start:end])
            start = end

    def decode(self, records: torch.Tensor, copy: bool = False) -> torch.Tensor:
        """Return records (n, record_size) as one token (n, 1, D) float32. copy: see `TokenCache.decode`."""
        return TokenCodec("float32", self.shape).decode(records, copy)

    def numbers(self, rows: np.ndarray, view: int, version: str) -> np.ndarray:
        """Return one token (n, 1, D) float32 of one view of `rows` (n,)."""
        return np.concatenate([cache.numbers(rows, view, version) for cache in self.caches], 2)


def _damaged(path: Path | str) -> DataError:
    return DataError(f"{path}: changed or damaged; delete it, and the next run computes it again")


def _with_checksums(records: np.ndarray, first: int) -> memoryview:
    """Return records (n, size) uint8 with the CRC-32 of each behind it. first: the number of the first one."""
    result = np.empty((len(records), records.shape[1] + _CRC), np.uint8)
    result[:, :-_CRC] = records
    checksums = [zlib.crc32(record, first + number) for number, record in enumerate(np.ascontiguousarray(records))]
    result[:, -_CRC:] = np.array(checksums, "<u4").view(np.uint8).reshape(-1, _CRC)
    return result.data


def cache_key(**identity: object) -> str:
    """Return a short hash of everything that the tokens depend on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
