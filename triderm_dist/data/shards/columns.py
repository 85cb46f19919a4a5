"""The columns of samples.parquet: read into memory, or mapped from files that the processes of a node share.

A column of parquet is compressed, so each process that reads it holds it. Of a large set, the first process of a node
writes the columns as plain arrays into a folder of the cache, after it has checked samples.parquet against its index:

    NAME.bin                  an array, or NAME.ends.bin and NAME.text.bin of a column of strings
    folds-FOLDS-SEED.safetensors    the fold of each lesion, at the first time that it is asked for
    columns.json              which files there are: types, shapes, SHA-256; written last
    checked-HOST              which files the processes that run on a machine have compared with their SHA-256

Others map these files: a process uses memory for the pages that it reads, and all of them use the same pages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from triderm_dist.checksums import (
    DamagedFile,
    read_checked_json,
    read_checked_tensors,
    write_checked_json,
    write_checked_tensors,
)
from triderm_dist.data.shards.format import ROW_GROUP, SAMPLES, Text, to_array
from triderm_dist.files import PATIENT_DATA, file_sha256, lock_file, open_new
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import VIEWS, DataError

MAPPED_FROM = 500_000
"""Lesions of a set whose columns are mapped: of fewer, a process holds less than 100 MB."""

MANIFEST = "columns.json"
TEXTS = ("lesion_id", "group")
_VERSION = 1
_FOLDER = 0o750


class Columns(Protocol):
    """The columns of N lesions."""

    def array(self, name: str) -> np.ndarray:
        """Return a column of numbers, (N,) or (N, W); see `array_columns`."""

    def text(self, name: str) -> Text:
        """Return one of `TEXTS`."""

    def folds(self, folds: int, seed: int, assign: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the folds (N,) that `assign` assigns, which are the same for the same number and seed."""


@dataclass(frozen=True)
class ArrayColumn:
    """A column of numbers, of one or several columns of samples.parquet. width: of its rows, None for numbers."""

    name: str
    sources: tuple[str, ...]
    dtype: type[np.generic]
    width: int | None = None

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.width is None else (rows, self.width)

    def of(self, batch: pa.RecordBatch) -> np.ndarray:
        """Return the column of a batch of rows."""
        if self.width is None:
            return to_array(batch[self.sources[0]]).astype(self.dtype, copy=False)
        if len(self.sources) > 1:
            return np.stack([to_array(batch[name]).astype(self.dtype, copy=False) for name in self.sources], axis=1)
        values = batch[self.sources[0]].flatten()
        found = values.to_numpy(zero_copy_only=False) if values.null_count else to_array(values)
        return found.reshape(-1, self.width)


def array_columns(concepts: int, fields: int, fine: bool) -> tuple[ArrayColumn, ...]:
    """Return the columns of numbers of a set: `fine` where its task has finer labels, the lists where they are not
    empty.
    """
    lists = (("concepts", concepts), ("metadata", fields))
    return (
        ArrayColumn("label", ("label",), np.int64),
        *([ArrayColumn("fine", ("fine",), np.int64)] if fine else []),
        ArrayColumn("shard", ("shard",), np.int32),
        ArrayColumn("offsets", tuple(f"{view}_offset" for view in VIEWS), np.int64, len(VIEWS)),
        ArrayColumn("sizes", tuple(f"{view}_size" for view in VIEWS), np.int32, len(VIEWS)),
        *(ArrayColumn(name, (name,), np.float32, width) for name, width in lists if width),
    )


@dataclass(frozen=True)
class ParquetColumns:
    """Columns that are read from samples.parquet when they are asked for. file: it, open, so that the columns do not
    change if the folder is replaced or removed.
    """

    path: Path
    file: pa.NativeFile
    rows: int
    layout: tuple[ArrayColumn, ...]

    def array(self, name: str) -> np.ndarray:
        """Read a column batch by batch: a second copy is never whole."""
        column = next(each for each in self.layout if each.name == name)
        result, start = np.empty(column.shape(self.rows), column.dtype), 0
        for batch in self.batches(column.sources):
            end = start + len(batch)
            result[start:end], start = column.of(batch), end
        pa.default_memory_pool().release_unused()
        return result

    def text(self, name: str) -> Text:
        return Text(pa.chunked_array([batch[name] for batch in self.batches([name])], pa.string()))

    def folds(self, folds: int, seed: int, assign: Callable[[], np.ndarray]) -> np.ndarray:
        return assign()

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield these columns in batches of rows. Raises DataError where they are not readable, or have empty cells."""
        try:
            file = pq.ParquetFile(self.file, pre_buffer=False)  # else it holds the bytes of all that was read
            for batch in file.iter_batches(ROW_GROUP, columns=[*names], use_threads=False):
                batch.validate(full=True)  # text that is not UTF-8
                if empty := next((name for name in names if batch[name].null_count), None):
                    raise DataError(f"{self.path}: column {empty!r} has empty cells; pack the data again")
                yield batch
        except (OSError, pa.ArrowException) as error:
            raise unreadable(self.path, error) from None


def unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not readable ({one_line(error, 160)}); pack the data again")


class _Manifest(BaseModel):
    """Keys of columns.json."""

    version: int
    set: str
    rows: int
    files: dict[str, dict[str, Any]]


class MappedColumns:
    """Columns in the files of a folder, mapped when they are asked for, after their SHA-256 was compared, once for all
    processes of a node that run at the same time.

    The files are opened at once, so that they stay readable if the folder is removed.
    """

    def __init__(self, folder: Path) -> None:
        """Raises DamagedFile or OSError where the folder does not hold what this version writes."""
        manifest = read_checked_json(folder / MANIFEST, _Manifest)
        if manifest["version"] != _VERSION:
            raise DamagedFile("of another version")
        self.folder, self.rows = folder, manifest["rows"]
        self._about, self._lock = manifest["files"], threading.Lock()
        self._files: dict[str, FileIO] = {}
        self._files.update({name: (folder / name).open("rb", buffering=0) for name in self._about})
        self._checked = _Checked(folder)

    def array(self, name: str) -> np.ndarray:
        return self._mapped(f"{name}.bin")

    def text(self, name: str) -> Text:
        ends, text = (pa.py_buffer(self._mapped(f"{name}.{part}.bin")) for part in ("ends", "text"))
        return Text(pa.chunked_array([pa.LargeStringArray.from_buffers(self.rows, ends, text)]))

    def folds(self, folds: int, seed: int, assign: Callable[[], np.ndarray]) -> np.ndarray:
        path = self.folder / f"folds-{folds}-{seed}.safetensors"

        def stored() -> np.ndarray | None:
            try:
                found = read_checked_tensors(path).get("fold")
            except (FileNotFoundError, DamagedFile):
                return None
            return found if found is not None and found.shape == (self.rows,) else None

        if (known := stored()) is not None:
            return known
        with contextlib.suppress(OSError), _locked(self.folder):  # of a folder that was removed or is read-only
            if (known := stored()) is None:
                known = assign().astype(np.int8 if folds < 128 else np.int16)
                write_checked_tensors(path, {"fold": known})
        return assign() if known is None else known

    def _mapped(self, name: str) -> np.ndarray:
        """Return the content of a file as an array that is not writable. Raises DataError where it is damaged."""
        about, file = self._about[name], self._files[name]

        def compare() -> None:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != about["sha256"]:
                advice = f"delete {self.folder}, which is made again from {SAMPLES}"
                raise DataError(f"{self.folder / name}: changed or damaged; {advice}")

        with self._lock:
            self._checked.compare_once(file, compare)
            shape = tuple(about["shape"])
            if not np.prod(shape):
                return np.empty(shape, about["dtype"])
            file.seek(0)
            return np.asarray(np.memmap(file, about["dtype"], "r", shape=shape))


class _Checked:
    """Which files of a folder of columns processes of this machine have compared with their SHA-256.

    They hold a shared lock of the record while they use the folder, and the record counts only as long: the first
    process that finds no other one begins a new one. So damage at rest is noticed by the next start.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"checked-{socket.gethostname()}"
        self._file: FileIO | None = None
        with contextlib.suppress(OSError):  # a folder that is read-only, or a file system without locks
            file = self._path.open("ab", buffering=0)
            with contextlib.suppress(BlockingIOError):  # another process uses the folder
                lock_file(file, wait=False)
                file.truncate(0)
            lock_file(file, shared=True)
            self._file = file

    def compare_once(self, file: FileIO, compare: Callable[[], None]) -> None:
        """Call `compare`, which raises DataError for a damaged file, unless another process has done so and the file
        was not written since.
        """
        about = os.fstat(file.fileno())
        line = f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"
        with contextlib.ExitStack() as stack:
            known = ""
            if self._file is not None:
                with contextlib.suppress(OSError):  # of a folder that was removed
                    stack.enter_context(_locked(self._path))
                    known = self._path.read_text(encoding="utf-8")
            if line not in known.splitlines():
                compare()
                if self._file is not None:
                    with contextlib.suppress(OSError):
                        self._file.write(f"{line}\n".encode())


def share_columns(columns: ParquetColumns, folder: Path, check: Callable[[], None]) -> Columns:
    """Return the columns mapped from the files in `folder`, which the first process that calls this writes.

    check: compares samples.parquet with the index; called before the columns are written, and where they cannot be:
    then every process reads them on its own, and a note is printed.
    """
    with contextlib.suppress(OSError, DamagedFile):
        return MappedColumns(folder)
    checked = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=_FOLDER)
        with _locked(folder):
            with contextlib.suppress(OSError, DamagedFile):  # another process has written it meanwhile
                return MappedColumns(folder)
            check()
            checked = True
            _write(columns, folder)
        return MappedColumns(folder)
    except (OSError, DamagedFile) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        print(f"note: {folder}: {why}; so every process holds the columns of {columns.path} on its own", flush=True)
        if not checked:
            check()
        return columns


def _write(columns: ParquetColumns, folder: Path) -> None:
    """Write the columns into `folder` in place of what it holds, and remove those of earlier content of the set."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    source = str(columns.path.parent.resolve())
    for killed in folder.parent.glob(f"{folder.name}.*.part"):
        shutil.rmtree(killed, ignore_errors=True)
    part.mkdir(mode=_FOLDER)
    try:
        files = {}
        with contextlib.ExitStack() as stack:

            def new(name: str) -> _Writer:
                files[name] = _Writer(stack.enter_context(open_new(part / name, PATIENT_DATA)))
                return files[name]

            arrays = [(column, new(f"{column.name}.bin")) for column in columns.layout]
            texts = [(name, new(f"{name}.ends.bin"), new(f"{name}.text.bin")) for name in TEXTS]
            for _, ends, _ in texts:
                ends.write(np.zeros(1, np.int64))
            for batch in columns.batches([*TEXTS, *(name for column in columns.layout for name in column.sources)]):
                for column, file in arrays:
                    file.write(column.of(batch))
                for name, ends, text in texts:
                    lengths, content = _text_of(batch[name])
                    ends.write(text.bytes + np.cumsum(lengths))
                    text.write(content)
        shapes: dict[str, Sequence[int]] = {f"{column.name}.bin": column.shape(columns.rows) for column, _ in arrays}
        about = {name: {**file.json(), "shape": shapes.get(name, file.shape())} for name, file in files.items()}
        write_checked_json(part / MANIFEST, {"version": _VERSION, "set": source, "rows": columns.rows, "files": about})
        shutil.rmtree(folder, ignore_errors=True)  # damaged
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for other in folder.parent.iterdir():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if other != folder and json.loads((other / MANIFEST).read_text(encoding="utf-8")).get("set") == source:
                shutil.rmtree(other)


class _Writer:
    """Writes arrays of one type into a file, one after the other, and hashes them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._dtype, self.bytes = file, hashlib.sha256(), np.dtype(np.uint8), 0

    def write(self, array: np.ndarray) -> None:
        content = memoryview(np.ascontiguousarray(array).data).cast("B") if array.size else memoryview(b"")
        self._file.write(content)
        self._digest.update(content)
        self._dtype, self.bytes = array.dtype, self.bytes + len(content)

    def shape(self) -> Sequence[int]:
        return (self.bytes // self._dtype.itemsize,)

    def json(self) -> Mapping[str, Any]:
        return {"dtype": self._dtype.str, "sha256": self._digest.hexdigest()}


def _text_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths (n,) int64 in bytes of strings, and the bytes of all, uint8."""
    _, ends, text = column.cast(pa.large_string()).buffers()
    at = np.frombuffer(ends, np.int64)[column.offset : column.offset + len(column) + 1]
    content = np.frombuffer(text, np.uint8) if text else np.empty(0, np.uint8)
    return np.diff(at), content[at[0] : at[-1]]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a folder of columns or of its record, after waiting for a process that writes it."""
    with path.with_name(f"{path.name}.lock").open("ab") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            lock_file(file)
        yield


def content_key(index: Path) -> str:
    """Return the name of the folder of a set's columns: equal for equal content of its index.json."""
    return file_sha256(index)[:16]
