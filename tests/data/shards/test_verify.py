"""Verification reports every kind of damage to a packed set, all in one run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Challenge
from triderm_dist.checksums import write_checked_json
from triderm_dist.config import RemoteConfig
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.open import open_index
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.verify import verify
from triderm_dist.files import file_sha256

Change = Callable[[ShardIndex], Any]


@pytest.fixture
def index(make_challenge: Callable[..., Challenge], tmp_path: Path) -> ShardIndex:
    """22 lesions of 11 patients in shards of 5."""
    challenge = make_challenge()
    for number, row in enumerate(challenge.metadata):
        row["patient_id"] = f"P{number // 4}"
    folder = challenge.write().folder
    return pack_shards(read_challenge(folder), tmp_path / "out", short_side=None, shard_samples=5)


def overwrite(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def photo(row: int, view: int, data: bytes, skip: int = 0) -> Change:
    def change(index: ShardIndex) -> None:
        overwrite(index.path(int(index.shard[row])), int(index.offsets[row, view]) + skip, data)

    return change


def record(old: bytes, new: bytes) -> Change:
    """Replace text in the first JSON that contains it by text of the same length."""

    def change(index: ShardIndex) -> None:
        path = index.path(0)
        overwrite(path, path.read_bytes().index(old), new)

    return change


def rows(column: str, values: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Replace a column of samples.parquet, and update its checksum."""

    def change(index: ShardIndex) -> None:
        path = index.folder / "samples.parquet"
        table = pq.read_table(path)
        number = table.schema.get_field_index(column)
        array = pa.array(values(table[column].to_numpy(zero_copy_only=False).copy()), table.schema.field(number).type)
        pq.write_table(table.set_column(number, table.schema.field(number), array), path)
        raw = json.loads((index.folder / "index.json").read_text())
        raw["samples"].update(bytes=path.stat().st_size, sha256=file_sha256(path))
        write_checked_json(index.folder / "index.json", raw)

    return change


def swap(array: np.ndarray) -> np.ndarray:
    array[[3, 4]] = array[[4, 3]]
    return array


def count_one_more(index: ShardIndex) -> None:
    raw = json.loads((index.folder / "index.json").read_text())
    raw["counts"]["NV"] += 1
    write_checked_json(index.folder / "index.json", raw)


def duplicate(array: np.ndarray) -> np.ndarray:
    array[7] = array[6]
    return array


DAMAGE: dict[str, tuple[Change, set[str], str]] = {
    "nothing": (lambda index: None, set(), ""),
    "counts": (count_one_more, {"count"}, "3 lesions of NV, samples.parquet has 2"),
    "photo": (photo(2, 0, b"xx"), {"checksum", "sample"}, "the clinical photo does not decode"),
    "end of photo": (photo(6, 1, b"\0" * 90, skip=600), {"checksum", "sample"}, "dermoscopic photo does not decode"),
    "label": (record(b'"label": "', b'"lebel": "'), {"checksum", "sample"}, "the label of the sample's JSON"),
    "group": (record(b'"group": "P', b'"group": "Q'), {"checksum", "sample"}, "the group of the sample's JSON"),
    "json": (
        record(b'{"lesion_id"', b'?"lesion_id"'),
        {"checksum", "sample"},
        "its JSON cannot be read at line 1, column 1",
    ),
    "order": (rows("lesion_id", swap), {"order", "missing"}, "webdataset reads lesion .* instead of lesion"),
    "offset": (
        rows("clinical_offset", lambda a: a + (np.arange(22) == 6)),
        {"sample"},
        "photo is not at the offset",
    ),
    "score": (rows("label", swap), {"sample"}, "the label of the sample's JSON differs from samples.parquet"),
    "duplicate": (rows("lesion_id", duplicate), {"order", "missing", "duplicate lesion"}, "1 lesions occur twice"),
    "tar": (
        lambda index: overwrite(index.path(1), 0, b"?" * 600),
        {"checksum", "tar"},
        "shard-000001.tar: data of an unknown kind, not a plain tar; copy or make it again",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(index: ShardIndex, name: str) -> None:
    change, kinds, message = DAMAGE[name]
    change(index)
    problems = verify(read_index(index.folder), 3, 0)
    assert {problem.kind for problem in problems} == kinds
    if kinds:
        text = "\n".join(map(str, problems))
        assert re.search(message, text), text


def test_all_damage_is_reported_in_one_run(index: ShardIndex) -> None:
    for row in (0, 7, 20):
        photo(row, 1, b"xx")(index)
    problems = verify(read_index(index.folder), 3, 0)
    assert [p.lesion_id for p in problems if p.kind == "sample"] == [index.lesion_ids[row] for row in (0, 7, 20)]
    assert sum(p.kind == "checksum" for p in problems) == 3


def test_photo_shared_by_two_groups_is_reported(make_challenge: Callable[..., Challenge], tmp_path: Path) -> None:
    """Packing and verifying name both lesions; within a group a shared photo is allowed."""
    challenge = make_challenge()
    for number, row in enumerate(challenge.metadata):
        row["patient_id"] = f"P{number // 4}"
    del challenge.truth[20]  # unlabeled lesions are in no fold
    for one, other in ((0, 11), (2, 19), (4, 7), (9, 41)):  # photos, two per lesion
        challenge.photo(other).write_bytes(challenge.photo(one).read_bytes())
    dataset = read_challenge(challenge.write().folder)
    index = pack_shards(dataset, tmp_path / "out", short_side=None, shard_samples=5)
    assert index.unlabeled == 1
    assert {frozenset(pair) for pair in index.shared_photos} == {
        frozenset(("IL_1000", "IL_1035")),
        frozenset(("IL_1007", "IL_1063")),
    }
    assert verify(index, 3, 0) == []
    (note,) = index.notes()
    assert "IL_1000" in note and "IL_1035" in note and "IL_1007" in note and "IL_1063" in note


FORGED: dict[str, Any] = {"photo_sizes": {"48x36": 43, "36x48": 1}, "shared_photos": [["IL_1000", "IL_1007"]]}


@pytest.mark.parametrize("name", FORGED)
def test_photo_entries_of_the_index_are_verified(index: ShardIndex, name: str) -> None:
    path = index.folder / "index.json"
    write_checked_json(path, {**json.loads(path.read_text()), name: FORGED[name]})
    (problem,) = verify(read_index(index.folder), 3, 0)
    assert problem.kind == "count" and name in problem.what


def test_more_folds_than_groups_are_refused(index: ShardIndex) -> None:
    (problem,) = verify(index, 12, 0)
    assert "12 folds need at least 12 groups" in problem.what and "folds=" in problem.what


def test_tars_behind_a_url_are_fetched_for_the_check(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote = open_index(index.folder.as_uri(), RemoteConfig())
    done: list[tuple[int, int]] = []
    assert verify(remote, 5, 0, progress=lambda *counts: done.append(counts)) == []
    assert done == [(row + 1, len(index)) for row in range(len(index))]
    assert not list(tmp_path.glob("cache/**/*.tar"))
    photo(7, 0, b"\0" * 20)(index)
    index.path(3).write_bytes(index.path(3).read_bytes()[:3000])
    problems = verify(remote, 5, 0)
    assert [problem.kind for problem in problems] == ["checksum", "checksum", "sample", "tar"]
    assert [Path(problem.where.split(",")[0]).name for problem in problems] == [
        f"shard-00000{n}.tar" for n in (1, 3, 1, 3)
    ]
    assert problems[0].where.startswith("file://")
