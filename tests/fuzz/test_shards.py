"""Damaged packed sets and foreign tars: refused in one line, or read with no label changed and no lesion lost."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset  # noqa: F401 - with PyTorch, so that no case is charged with the memory of its import
from hypothesis import strategies as st

from tests.conftest import draw_photo, write_challenge
from tests.fuzz.checks import assert_same_labels, cases, fuzz, result_or_refusal
from tests.fuzz.mutations import ODD_TEXT, edited_bytes, edited_fields, edited_json, edited_parts, without_checksum
from tests.small_tasks import task_of
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import ShardIndex, read_index, read_photo_bytes
from triderm_dist.data.shards.index_foreign import index_shards
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.verify import verify
from triderm_dist.schema import VIEWS


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a packed set of 8 lesions in two tars."""
    folder = tmp_path_factory.mktemp("packed")
    challenge = write_challenge(folder / "challenge", lesions=8, size=(24, 18))
    pack_shards(read_challenge(challenge.folder), folder / "set", short_side=None, shard_samples=4)
    return folder / "set"


def everything(index: ShardIndex) -> dict[str, str | None]:
    """Read all that an index holds, and the photos; return the diagnosis of each lesion."""
    rows = np.arange(len(index))
    index.inputs(rows)
    assert index.canvas and index.bytes >= 0
    index.notes(), index.counts(), index.signature, index.groups.tolist(), index.metadata, index.concept_scores
    photos = [read_photo_bytes(index, row, view) for row in rows.tolist() for view in VIEWS]
    assert sum(map(len, photos)) == index.sizes.sum()
    names = zip(index.lesion_ids.tolist(), index.labels.tolist(), strict=True)
    return {lesion: index.diagnoses[label] if label >= 0 else None for lesion, label in names}


@cases(10, 250)
def test_damaged_index(packed: Path, tmp_path: Path, cases: int) -> None:
    original = everything(read_index(packed))
    folder = shutil.copytree(packed, tmp_path / "set")

    def check(damaged: bytes) -> None:
        (folder / "index.json").write_bytes(damaged)
        found = result_or_refusal(lambda: everything(read_index(folder)), folder)
        assert_same_labels(found or {}, original)

    tree = json.loads((packed / "index.json").read_bytes())
    fuzz(
        check,
        st.one_of(edited_json(tree), edited_json(without_checksum(tree)), edited_json(without_checksum(tree))),
        cases,
    )


@cases(5, 120)
@pytest.mark.parametrize("name", ["samples.parquet", "shard-000001.tar"])
def test_changed_bytes_of_a_packed_set(packed: Path, tmp_path: Path, name: str, cases: int) -> None:
    original = everything(read_index(packed))
    folder, data = shutil.copytree(packed, tmp_path / "set"), (packed / name).read_bytes()

    def check(damaged: bytes) -> None:
        (folder / name).write_bytes(damaged)
        found = result_or_refusal(lambda: everything(read_index(folder, verify=name.endswith("tar"))), folder)
        assert found is None or damaged == data
        assert_same_labels(found or {}, original)

    fuzz(check, st.one_of(edited_bytes(data, 1), edited_fields(data)).filter(lambda it: len(it) == len(data)), cases)


@st.composite
def edited_columns(draw: st.DrawFn, table: pa.Table) -> pa.Table:
    """Change the type, the values or the order of the columns of samples.parquet."""
    at = draw(st.integers(0, table.num_columns - 1))
    name, column = table.column_names[at], table.column(at).combine_chunks()
    kind = draw(st.sampled_from(("drop", "rename", "null", "cast", "reverse", "fewer", "numbers", "text", "double")))
    if kind == "drop":
        return table.drop_columns(name)
    if kind == "rename":
        return table.rename_columns([each + "x" * (each == name) for each in table.column_names])
    if kind == "fewer":
        return table.slice(0, draw(st.integers(0, len(table))))
    if kind == "double":
        return pa.concat_tables([table, table])
    if kind == "null":
        column = pa.nulls(len(table), column.type)
    elif kind == "reverse":
        column = column.take(pa.array(np.arange(len(table))[::-1].copy()))
    elif pa.types.is_integer(column.type):
        limit = 2 ** (column.type.bit_width - 1)
        values = st.sampled_from((-limit, -2, -1, 0, 1, 11, 1000, limit - 1))
        column = pa.array(draw(st.lists(values, min_size=len(table), max_size=len(table))), column.type)
    elif pa.types.is_string(column.type):
        odd = st.sampled_from([*ODD_TEXT, None])
        column = pa.array(draw(st.lists(odd, min_size=len(table), max_size=len(table))), pa.string())
    if kind == "cast":
        column = column.cast(pa.large_string()) if pa.types.is_string(column.type) else pa.array(["a"] * len(table))
    return table.set_column(at, name, column)


@cases(4, 100)
def test_other_columns_of_a_packed_set(packed: Path, tmp_path: Path, cases: int) -> None:
    """Rewrite samples.parquet and its checksum, as another program or an attacker may."""
    folder = shutil.copytree(packed, tmp_path / "set")
    raw = without_checksum(json.loads((packed / "index.json").read_bytes()))

    def check(table: pa.Table) -> None:
        file = io.BytesIO()
        pq.write_table(table, file)
        data = file.getvalue()
        (folder / "samples.parquet").write_bytes(data)
        samples = {**raw["samples"], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "index.json").write_text(json.dumps({**raw, "samples": samples}))
        result_or_refusal(lambda: everything(read_index(folder)), folder)

    fuzz(check, edited_columns(pq.read_table(packed / "samples.parquet")), cases)


@cases(2, 40)
def test_verifying_a_damaged_set(packed: Path, tmp_path: Path, cases: int) -> None:
    folder, data = shutil.copytree(packed, tmp_path / "set"), (packed / "shard-000000.tar").read_bytes()

    def check(damaged: bytes) -> None:
        (folder / "shard-000000.tar").write_bytes(damaged)

        def read() -> None:
            assert damaged == data or verify(read_index(folder), 2, 0, workers=1)

        result_or_refusal(read, folder)

    same_size = st.one_of(edited_bytes(data), edited_fields(data)).filter(lambda it: len(it) == len(data))
    fuzz(check, same_size, cases)


# --- tars of other programs ------------------------------------------------------------------------------------------

TASK = task_of(views=("dermoscopic",), concepts=(), fields=False)
LABELS = {f"L{number}": TASK.diagnosis_names[number % 3] for number in range(6)}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    draw_photo(seed, (24, 18)).save(file, "JPEG")
    return file.getvalue()


def member(name: str, data: bytes, kind: int = tarfile.GNU_FORMAT, **fields: Any) -> bytes:
    """Return header, content and padding of a member, its header with a right checksum whatever the fields."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(kind) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def members(kind: int, in_json: bool) -> list[bytes]:
    """Return the members of a tar with the lesions of `LABELS`."""
    found = []
    for number, (lesion, label) in enumerate(LABELS.items()):
        record = {"lesion_id": lesion, "label": label, "patient_id": f"P{number // 2}", "note": "x"}
        name, text = ("json", json.dumps(record)) if in_json else ("cls", label)
        found += [
            member(f"{lesion}.dermoscopic.jpg", jpeg(number), kind),
            member(f"{lesion}.{name}", text.encode(), kind),
        ]
    return found


def joined(parts: Sequence[bytes], end: int = 2) -> bytes:
    return b"".join(parts) + bytes(end * tarfile.BLOCKSIZE)


def check_tar(data: bytes, folder: Path, complete: bool = False) -> None:
    """Index a tar, and fail where a label changed, or a lesion or a label is missing without a word.

    complete: whether the damage cannot remove a member as a whole, so that a lesion that is missing was lost.
    """
    for old in folder.iterdir():
        old.unlink()
    (folder / "a.tar").write_bytes(data)
    notes: list[str] = []

    def read(invalid: Any) -> ShardIndex:
        return index_shards(folder, task=TASK, invalid=invalid, workers=1, note=notes.append)

    index = result_or_refusal(lambda: read("refuse"), folder)
    if index is None:
        index = result_or_refusal(lambda: read("drop"), folder)
        assert index is None or index.problems, "refused without a problem that is named when dropping"
    if index is None:
        return
    found = everything(index)
    lost = {lesion for lesion, label in found.items() if label is None and LABELS.get(lesion)}
    assert not lost or any("label" in note for note in notes), f"labels lost without a note: {lost}"
    assert_same_labels({lesion: label for lesion, label in found.items() if lesion not in lost}, LABELS)
    if complete and not index.problems:
        assert len(found) >= len(LABELS), f"lesions lost without a word: {sorted(set(LABELS) - set(found))}"


@cases(3, 80)
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes_of_a_foreign_tar(kind: str, tmp_path: Path, cases: int) -> None:
    data = joined(members(FORMATS[kind], in_json=kind != "ustar"))
    damaged = st.one_of(
        edited_bytes(data, 1), edited_fields(data, 1), st.integers(0, len(data)).map(lambda it: data[:it])
    )
    fuzz(lambda it: check_tar(it, tmp_path, complete=True), damaged, cases)


NAMES = (
    *("L1.dermoscopic.jpg", "L1.json", "L1.cls", "L9.json", ".json", "L1", "a/L1.json", "../L1.json", "/L1.json"),
    *("README.md", "L1.DERMOSCOPIC.JPG", "x" * 200 + ".json", "\udcff.json", "\u202e.json", "L1\n.json"),
)
ODD_FIELDS: tuple[dict[str, Any], ...] = (
    *({}, {"size": 10**9}, {"size": 2**40}, {"size": 0}, {"size": 513}, {"mode": 0}, {"mtime": 2**33}),
    *({"type": tarfile.SYMTYPE, "linkname": "L1.json"}, {"type": tarfile.LNKTYPE, "linkname": "L0.json"}),
    *({"type": tarfile.DIRTYPE}, {"type": tarfile.FIFOTYPE}, {"type": tarfile.GNUTYPE_SPARSE}, {"type": b"Z"}),
    *({"pax_headers": {"size": "-5"}}, {"pax_headers": {"GNU.sparse.map": "0,x"}}, {"pax_headers": {"path": ""}}),
    *({"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}}, {"pax_headers": {"mtime": "nan"}}),
)


@st.composite
def odd_members(draw: st.DrawFn, parts: Sequence[bytes]) -> bytes:
    """Remove, repeat, move or damage members, add odd ones, or write other ends of a tar."""
    parts = draw(edited_parts(parts)) if draw(st.booleans()) else [*parts]
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from([*FORMATS.values()]))
        name, fields = draw(st.sampled_from(NAMES)), draw(st.sampled_from(ODD_FIELDS))
        data = draw(st.one_of(st.just(jpeg(50)), edited_json({"lesion_id": "L7", "label": "wart"}), st.just(b"mole")))
        try:
            extra = member(name, data, kind, **fields)
        except (ValueError, OverflowError, UnicodeError):
            continue
        parts.insert(draw(st.integers(0, len(parts))), extra)
    end = draw(st.sampled_from((0, 1, 2, 2, 2, 20)))
    tail = draw(st.sampled_from((b"", b"", b"x", bytes(100), joined(parts[:2]))))
    return joined(parts, end) + tail


@cases(4, 150)
@pytest.mark.parametrize("kind", FORMATS)
def test_foreign_tar_with_odd_members(kind: str, tmp_path: Path, cases: int) -> None:
    fuzz(lambda it: check_tar(it, tmp_path), odd_members(members(FORMATS[kind], in_json=kind != "ustar")), cases)
