"""Damaged weights, predictions, tokens and checked files: refused in one line, or equal to what was written."""

from __future__ import annotations

import io
import json
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import strategies as st
from safetensors.numpy import save

from tests.fuzz.checks import cases, fuzz, result_or_refusal
from tests.fuzz.mutations import edited_bytes, edited_fields, edited_json, edited_parts
from tests.small_tasks import TASKS
from tests.synthetic_run import predictions_of
from triderm_dist.checksums import DamagedFile, read_checked_tensors, write_checked_tensors
from triderm_dist.data.token_cache import TokenCache
from triderm_dist.models.weight_files import read_weight_file
from triderm_dist.predictions import (
    DataSplit,
    average_test,
    gather,
    read_oof,
    read_predictions,
    write_oof,
    write_predictions,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about damage


TENSORS = {"block.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.ones(3, np.float16)}


def header_of(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


@st.composite
def edited_safetensors(draw: st.DrawFn, tensors: dict[str, np.ndarray]) -> bytes:
    """Damage the header of a safetensors file as JSON, its length, or any byte."""
    header = {name: header_of(save({name: tensor}))[name] for name, tensor in tensors.items()}
    data, end = b"", 0
    for name, tensor in tensors.items():
        header[name]["data_offsets"] = [end, end := end + tensor.nbytes]
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    length, data = len(text), len(text).to_bytes(8, "little") + text + data
    kind = draw(st.sampled_from(("bytes", "fields", "header", "header", "length")))
    if kind == "bytes":
        return draw(edited_bytes(data))
    if kind == "fields":
        return draw(edited_fields(data))
    if kind == "length":
        return draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    text = draw(edited_json(header))
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def use_weights(path: Path) -> None:
    """Read a file of weights as a tower does, and touch every number."""
    for name, tensor in read_weight_file(path).items():
        assert isinstance(name, str)
        tensor.to(torch.float32).sum()


@cases(8, 200)
def test_damaged_safetensors(tmp_path: Path, cases: int) -> None:
    path = tmp_path / "weights.safetensors"

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        result_or_refusal(lambda: use_weights(path), path)

    fuzz(check, edited_safetensors(TENSORS), cases)


STATE = {name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}
CONTENTS = (
    {"state_dict": STATE},
    STATE,
    {"model": None},
    [STATE],
    {"model": {"state_dict": 3}},
    {1: STATE["bias"]},
    {},
)
"""What a file of torch.save holds; the first two are weights."""


@cache
def saved(content: int, zipped: bool) -> bytes:
    """Return a file of one of CONTENTS, the same in each call: the older format holds addresses of the memory."""
    file = io.BytesIO()
    torch.save(CONTENTS[content], file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@st.composite
def edited_torch_file(draw: st.DrawFn) -> bytes:
    """Damage a file of torch.save: its bytes, the members of its zip, or the pickle in it; or hold something else."""
    content = draw(st.sampled_from(range(2) if draw(st.booleans()) else range(2, len(CONTENTS))))
    data = saved(content, zipped=draw(st.booleans()))
    kind = draw(st.sampled_from(("none", "bytes", "fields", "members")))
    if kind == "members" and data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            parts = draw(edited_parts([archive.read(name) for name in names]))
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, part in zip(names, parts, strict=False):
                archive.writestr(name, part)
        return file.getvalue()
    return draw(edited_fields(data)) if kind == "fields" else draw(edited_bytes(data)) if kind == "bytes" else data


@cases(3, 150)
def test_damaged_torch_file(tmp_path: Path, cases: int) -> None:
    path = tmp_path / "weights.pth"

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        result_or_refusal(lambda: use_weights(path), path)

    fuzz(check, edited_torch_file(), cases)


@cases(3, 80)
def test_changed_bytes_of_checked_tensors(tmp_path: Path, cases: int) -> None:
    path = tmp_path / "turns.safetensors"
    write_checked_tensors(path, TENSORS)
    data = path.read_bytes()

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        found = result_or_refusal(lambda: read_checked_tensors(path), also=(DamagedFile,))
        assert found is None or all(np.array_equal(found[name], tensor) for name, tensor in TENSORS.items())

    fuzz(check, st.one_of(edited_bytes(data), edited_fields(data)), cases)


# --- predictions -----------------------------------------------------------------------------------------------------

TASK = TASKS["everything"]
LESIONS = [f"L{number}" for number in range(9)]
LABELS = np.arange(9) % 3


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of predictions of 9 lesions."""
    path = tmp_path_factory.mktemp("predictions") / "predictions.parquet"
    write_predictions(path, predictions_of("trimodal", LABELS, 0, LESIONS, 0, task=TASK))
    return path


@cases(4, 150)
def test_changed_bytes_of_predictions(written: Path, tmp_path: Path, cases: int) -> None:
    original, data, path = read_predictions(written), written.read_bytes(), tmp_path / "predictions.parquet"

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        found = result_or_refusal(lambda: read_predictions(path), path)
        if found is not None:
            assert found.lesion_ids.tolist() == original.lesion_ids.tolist()
            for name in ("labels", "logits", "features", "concepts", "metadata", "fold"):
                np.testing.assert_array_equal(getattr(found, name), getattr(original, name))

    fuzz(check, st.one_of(edited_bytes(data), edited_fields(data)), cases)


@st.composite
def edited_predictions(draw: st.DrawFn, path: Path) -> pa.Table:
    """Change the header or a column of a prediction file, and leave out the checksums, as in one of another program."""
    table = pq.read_table(path)
    metadata = {key: value for key, value in table.schema.metadata.items() if key == b"triderm"}
    if draw(st.booleans()):
        return table.replace_schema_metadata({b"triderm": draw(edited_json(json.loads(metadata[b"triderm"])))})
    name = draw(st.sampled_from(table.column_names))
    at, column, rows = table.column_names.index(name), table[name].combine_chunks(), len(table)
    kind = draw(st.sampled_from(("drop", "none", "double", "part", "again", "null", "values", "values", "values")))
    if kind == "drop":
        table = table.drop_columns(name)
    elif kind == "double":
        table = pa.concat_tables([table, table])
    elif kind in ("none", "part"):
        table = table.slice(3, 2 if kind == "part" else 0)
    elif kind == "again":
        table = table.append_column(name, column)
    else:
        cell = draw(st.sampled_from((None, 1.5, -5, 2**62, "x", [1.0, None], [], [[1.0]], [1.0], {"a": 1}, True)))
        values = [cell] * rows if draw(st.booleans()) else [*column.to_pylist()[1:], cell]
        try:
            table = table.set_column(at, name, pa.nulls(rows, column.type) if kind == "null" else pa.array(values))
        except (pa.ArrowException, TypeError):  # of two types in one column
            table = table.set_column(at, name, pa.array([cell] * rows))
    return table.replace_schema_metadata(metadata)


@cases(5, 150)
def test_predictions_with_other_columns(written: Path, tmp_path: Path, cases: int) -> None:
    path, oof = tmp_path / "model" / "fold-0" / "predictions.parquet", tmp_path / "oof.parquet"
    path.parent.mkdir(parents=True)

    def read() -> None:
        average_test([read_predictions(path)])
        write_oof(oof, gather([path], None, DataSplit(LESIONS, LABELS, np.zeros(9, int), TASK)))
        read_oof(oof)

    def check(table: pa.Table) -> None:
        pq.write_table(table, path)
        result_or_refusal(read)
        result_or_refusal(lambda: read_oof(path), path)

    fuzz(check, edited_predictions(written), cases)


@cases(3, 80)
def test_damaged_tokens(tmp_path: Path, cases: int) -> None:
    tokens = np.random.default_rng(0).random((4, 2, 3, 5)).astype(np.float16)
    TokenCache(tmp_path, 4, (3, 5)).write("plain", 0, tokens)
    path = tmp_path / "plain" / "000000.tokens"
    data = path.read_bytes()

    def read() -> np.ndarray:
        return TokenCache(tmp_path, 4, (3, 5)).numbers_of_all_views(np.arange(4), "plain")

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        found = result_or_refusal(read, path)
        assert found is None or np.array_equal(found, tokens)

    fuzz(check, st.one_of(edited_bytes(data, 1), edited_fields(data, 1)), cases)
