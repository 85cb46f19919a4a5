"""JSON and parquet files that hold a checksum of their own content, compared when they are read.

A file that was written before it had one is read without the comparison. Weights and checkpoints have their SHA-256 in
a JSON file next to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from triderm_dist.files import PATIENT_DATA, atomic_path, safetensors_errors, write_json

KEY = "checksum"
_PARQUET_KEY = b"triderm.checksums"
_IN_FOOTER, _FOOTER_KEY = b"in the footer", b"triderm.checksums.footer"
"""The value of `_PARQUET_KEY` in a file whose checksums were known once all rows were written, and their position."""
_CHANGED = "changed or damaged: its content does not match its checksums"


class DamagedFile(Exception):
    """The content of a file differs from what was written. The message does not name the file."""


def write_checked_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, with the SHA-256 of its content as the last key, in place of one that it has."""
    content = {key: value for key, value in content.items() if key != KEY}
    write_json(path, {**content, KEY: _json_sha256(json.loads(json.dumps(content)))})


def read_checked_json(path: Path, schema: type[BaseModel] | None = None) -> dict[str, Any]:
    """Read the mapping in a JSON file. schema: the keys that it must have, with their types; others are not checked.

    A file that holds no checksum is read without the comparison. Raises DamagedFile for every other content and for a
    file that cannot be read, FileNotFoundError.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(f"not readable ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise DamagedFile("damaged: not a text in UTF-8") from None
    except (ValueError, RecursionError):
        raise DamagedFile("damaged or cut off: not JSON") from None
    if not isinstance(tree, dict):
        raise DamagedFile(f"changed or damaged: a {type(tree).__name__}, not a mapping")
    content = without_checksum(tree)
    if schema is not None:
        check_mapping(content, schema)
    return content


def check_mapping(tree: Mapping[str, Any], schema: type[BaseModel]) -> None:
    """Check the keys of a mapping and the types of their values. Raises DamagedFile that names the first wrong one."""
    try:
        schema.model_validate(tree, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "its content"
        raise DamagedFile(f"changed or damaged: {key}: {first['msg'].lower()}") from None


def _json_sha256(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def without_checksum(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file of `write_checked_json` that was parsed. Raises DamagedFile if it differs."""
    content = {key: value for key, value in tree.items() if key != KEY}
    if KEY in tree and tree[KEY] != _json_sha256(content):
        raise DamagedFile(f"changed or damaged: its content has another checksum than {str(tree[KEY])[:16]}...")
    return content


def write_checked_parquet(path: Path, table: Any, metadata: Mapping[bytes, bytes] | None = None) -> None:
    """Write a parquet file of lesions atomically, with checksums of its pages, columns and metadata."""
    import pyarrow.parquet as pq

    metadata = dict(metadata or {})
    checksums = {
        "metadata": _metadata_sha256(metadata),
        "columns": {name: _column_sha256(table[name]) for name in table.column_names},
    }
    table = table.replace_schema_metadata({**metadata, _PARQUET_KEY: json.dumps(checksums)})
    with atomic_path(path, PATIENT_DATA) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


class ParquetRows:
    """Writes the rows of a parquet file, one table per row group, and hashes them as they pass."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None
        self._metadata: dict[bytes, bytes] = {}
        self._hashes: dict[str, _ColumnHash] = {}

    def write(self, table: Any) -> None:
        """Write a row group. All tables must have the columns of the first one, whose metadata are the file's."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            self._metadata = dict(table.schema.metadata or {})
            schema = table.schema.with_metadata({**self._metadata, _PARQUET_KEY: _IN_FOOTER})
            text = [field.name for field in schema if pa.types.is_string(field.type)]
            self._writer = pq.ParquetWriter(
                self._path, schema, compression="zstd", use_dictionary=text, write_page_checksum=True
            )
            self._hashes = {name: _ColumnHash() for name in table.column_names}
        self._writer.write_table(table.replace_schema_metadata(None), row_group_size=max(len(table), 1))
        for name, digest in self._hashes.items():
            digest.update(table[name])

    def close(self, complete: bool) -> None:
        """Close the file. complete: with its checksums, as all rows are written."""
        if self._writer is None:
            return
        if complete:
            columns = {name: digest.hexdigest() for name, digest in self._hashes.items()}
            checksums = {"metadata": _metadata_sha256(self._metadata), "columns": columns}
            self._writer.add_key_value_metadata({_FOOTER_KEY: json.dumps(checksums).encode()})
        self._writer.close()


@contextmanager
def checked_parquet_rows(path: Path) -> Iterator[ParquetRows]:
    """Yield a writer of a parquet file of lesions, which is there when the block ends and not before.

    The file has the checksums of `write_checked_parquet`, at its end. At least one table must be written, which may be
    empty.
    """
    with atomic_path(path, PATIENT_DATA) as temporary:
        rows, complete = ParquetRows(temporary), False
        try:
            yield rows
            complete = True
        finally:
            rows.close(complete)


Column = Literal["text", "integers", "numbers", "lists"]
"""What a column of a parquet file holds: `lists` are lists of numbers or booleans."""


class CheckedParquet:
    """A parquet file with checksums that is read in batches of rows.

    metadata: that it was written with.  rows: their number.  names: of the columns. Raises DamagedFile for a file that
    is not readable as parquet or whose metadata do not match their checksum, and FileNotFoundError.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        with _parquet_errors():
            about = pq.read_metadata(path)
            schema = about.schema.to_arrow_schema()
            self.metadata, self._checksums = _split_metadata(schema, about)
        _compare_metadata(self._checksums, self.metadata)
        self.rows, self.names = about.num_rows, tuple(schema.names)

    def batches(self, columns: Sequence[str], kinds: Mapping[str, Column], rows: int) -> Iterator[Any]:
        """Yield tables of at most this number of rows, in order, of columns that hold what `kinds` says.

        Raises DamagedFile for a column that is missing, there twice, of another kind or with empty cells, and, after
        the last table, for content that does not match its checksums.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if absent := [name for name in columns if name not in self.names]:
            raise DamagedFile(f"column {absent[0]!r} is missing")
        if repeated := [name for name in columns if self.names.count(name) > 1]:
            raise DamagedFile(f"column {repeated[0]!r} occurs twice")
        hashes = {name: _ColumnHash() for name in columns}
        with _parquet_errors():
            file = pq.ParquetFile(self.path, page_checksum_verification=True, buffer_size=1 << 20, pre_buffer=False)
            batches = iter(file.iter_batches(rows, columns=list(columns)))
        while True:
            with _parquet_errors():
                batch = next(batches, None)
            if batch is None:
                break
            table = pa.Table.from_batches([batch])
            for name in columns:
                _check_column(table, name, kinds[name])
                hashes[name].update(table[name])
            yield table
        _compare(self._checksums, {name: each.hexdigest() for name, each in hashes.items()}, columns)


def read_checked_parquet(
    path: Path, columns: Sequence[str] | None = None, kinds: Mapping[str, Column] | None = None
) -> Any:
    """Read the columns of a parquet file as a table, with the metadata that it was written with.

    kinds: columns that the table must have, without empty cells. Raises DamagedFile, also for a file that is not
    readable as parquet, and FileNotFoundError.
    """
    import pyarrow.parquet as pq

    with _parquet_errors():
        table = pq.read_table(path, columns=columns, page_checksum_verification=True)
        metadata, expected = _split_metadata(table.schema, pq.read_metadata(path))
        actual = {name: _column_sha256(table[name]) for name in table.column_names}
        _compare_metadata(expected, metadata)
        _compare(expected, actual, columns)
    for name, kind in (kinds or {}).items():
        _check_column(table, name, kind)
    return table.replace_schema_metadata(metadata)


@contextmanager
def _parquet_errors() -> Iterator[None]:
    """Raise DamagedFile for an error of reading a file as parquet, but FileNotFoundError as it is."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedFile(f"not a readable parquet file ({reason})") from None


def _split_metadata(schema: Any, about: Any) -> tuple[dict[bytes, bytes], dict[str, Any] | None]:
    """Return the metadata that a file was written with, and its checksums, None if it has none."""
    metadata = dict(schema.metadata or {})
    found = metadata.pop(_PARQUET_KEY, None)
    if found == _IN_FOOTER:
        found = (about.metadata or {}).get(_FOOTER_KEY, b"{}")
    return metadata, None if found is None else json.loads(found)


def _compare_metadata(expected: dict[str, Any] | None, metadata: Mapping[bytes, bytes]) -> None:
    """Raise DamagedFile where the checksum of metadata is not the expected one, if there is one."""
    if expected is not None and expected.get("metadata") != _metadata_sha256(metadata):
        raise DamagedFile(_CHANGED)


def _compare(expected: dict[str, Any] | None, actual: Mapping[str, str], columns: Sequence[str] | None) -> None:
    """Raise DamagedFile where checksums of columns are not the expected ones, if there are any."""
    if expected is None:
        return
    known = expected.get("columns", {})
    wanted = set(known if columns is None else columns)
    if not known or wanted != set(actual) or any(known.get(name) != digest for name, digest in actual.items()):
        raise DamagedFile(_CHANGED)


def _check_column(table: Any, name: str, kind: Column) -> None:
    import pyarrow.types as types

    if name not in table.column_names:
        raise DamagedFile(f"column {name!r} is missing")
    column = table[name]
    if column.null_count:
        raise DamagedFile(f"column {name!r} has empty cells")
    of = column.type
    is_kind = {
        "text": types.is_string(of) or types.is_large_string(of),
        "integers": types.is_integer(of),
        "numbers": types.is_integer(of) or types.is_floating(of),
        "lists": (types.is_list(of) or types.is_large_list(of) or types.is_fixed_size_list(of))
        and (types.is_floating(of.value_type) or types.is_integer(of.value_type) or types.is_boolean(of.value_type)),
    }
    if not is_kind[kind]:
        raise DamagedFile(f"column {name!r} holds {of}, not {kind}")


def matrix_of(table: Any, name: str) -> np.ndarray:
    """Return a column of lists of equal lengths as an array (N, W). Raises DamagedFile for other lengths."""
    import pyarrow.compute as pc

    column = table[name]
    lengths = pc.list_value_length(column).to_numpy()
    if len(lengths) and not (lengths == lengths[0]).all():
        raise DamagedFile(f"column {name!r} has rows of {lengths.min():.0f} to {lengths.max():.0f} numbers")
    width = int(lengths[0]) if len(lengths) else 0
    # Chunk by chunk: the offsets of one chunk are 32-bit numbers, which all rows together may exceed.
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    values: np.ndarray = np.concatenate(parts) if parts else np.empty(0, np.float32)
    return values.reshape(len(lengths), width)


def _metadata_sha256(metadata: Mapping[bytes, bytes]) -> str:
    pairs = sorted((key.hex(), value.hex()) for key, value in metadata.items() if key != b"ARROW:schema")
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _column_sha256(column: Any) -> str:
    """Hash the values of a chunked array of numbers, booleans, text or lists of numbers, however it is chunked."""
    digest = _ColumnHash()
    digest.update(column)
    return digest.hexdigest()


class _ColumnHash:
    """The hash of a column of numbers, booleans, text or lists of numbers, however it is chunked."""

    def __init__(self) -> None:
        self._values, self._lengths, self._nulls = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()

    def update(self, column: Any) -> None:
        """Add the values of a chunked array."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for chunk in column.chunks:
            self._nulls.update(chunk.is_null().to_numpy(zero_copy_only=False).tobytes())
            if pa.types.is_string(chunk.type):
                self._update_text(chunk)
                continue
            if hasattr(chunk.type, "value_type"):
                lengths = pc.list_value_length(chunk).fill_null(-1).to_numpy(zero_copy_only=False)
                self._lengths.update(lengths.tobytes())
                chunk = chunk.flatten()
            self._values.update(np.ascontiguousarray(chunk.to_numpy(zero_copy_only=False)).data)

    def _update_text(self, chunk: Any) -> None:
        """Add the UTF-8 of all texts after one another, and their lengths; an empty cell is an empty text."""
        import pyarrow.compute as pc

        chunk = pc.fill_null(chunk, "")
        lengths = pc.binary_length(chunk).to_numpy(zero_copy_only=False).astype(np.int64)
        self._lengths.update(lengths.tobytes())
        if len(chunk):
            _, offsets, data = chunk.buffers()
            first, last = np.frombuffer(offsets, np.int32)[[chunk.offset, chunk.offset + len(chunk)]]
            self._values.update(memoryview(data)[first:last] if data else b"")

    def hexdigest(self) -> str:
        parts = (self._values, self._lengths, self._nulls)
        return hashlib.sha256(b"".join(each.digest() for each in parts)).hexdigest()


def write_checked_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file atomically, with a checksum of its tensors in its metadata."""
    from safetensors.numpy import save_file

    with atomic_path(path) as temporary, safetensors_errors(path):
        save_file(dict(tensors), temporary, {KEY: _tensors_sha256(tensors)})


def read_checked_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file. Raises DamagedFile, also for a file of another format, and FileNotFoundError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            expected = (file.metadata() or {}).get(KEY)
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise DamagedFile(f"not a readable safetensors file ({error})") from None
    if expected not in (None, _tensors_sha256(tensors)):
        raise DamagedFile("changed or damaged: its tensors do not match its checksum")
    return tensors


def _tensors_sha256(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()
