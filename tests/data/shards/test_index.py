"""Shards have the data of the folder, any tar reader agrees with the index, and damage is reported."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from tests.conftest import Challenge
from tests.processes import ROOT
from triderm_dist.checksums import write_checked_json
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import ShardIndex, read_index, read_photo_bytes, verify_shards
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.tar_writer import TarWriter
from triderm_dist.data.shards.verify import verify
from triderm_dist.files import file_sha256, write_json
from triderm_dist.schema import DIAGNOSES, VIEWS, DataError, Diagnosis, TaskColumns

Make = Callable[..., Challenge]


def pack(dataset: Dataset, output: Path, **options: Any) -> ShardIndex:
    return pack_shards(dataset, output, **{"short_side": 24, "shard_samples": 5, **options})


@pytest.fixture
def dataset(make_challenge: Make) -> Dataset:
    """22 lesions, one without a dermoscopic photo, one without a diagnosis."""
    challenge = make_challenge()
    del challenge.metadata[9]
    challenge.truth[7].update(dict.fromkeys(DIAGNOSES, ""))
    return read_challenge(challenge.write().folder, missing_view="mark")


def test_index_has_the_content_of_the_data_set(dataset: Dataset, tmp_path: Path) -> None:
    index = pack(dataset, tmp_path / "out")
    order = {lesion.lesion_id: lesion for lesion in dataset.lesions}
    lesions = [order[name] for name in index.lesion_ids]
    assert len(index) == len(dataset.lesions) == len(set(index.lesion_ids))
    assert [shard.samples for shard in index.shards] == [5, 5, 5, 5, 2]
    assert index.shard.tolist() == [row // 5 for row in range(22)]
    assert index.labels.tolist() == [lesion.label for lesion in lesions]
    assert index.groups.tolist() == [lesion.group for lesion in lesions]
    np.testing.assert_array_equal(index.concept_scores, np.float32([lesion.concepts for lesion in lesions]))
    np.testing.assert_array_equal(index.metadata, np.float32([lesion.metadata for lesion in lesions]))
    assert index.concepts == dataset.concepts and index.diagnoses == DIAGNOSES
    types = {name: getattr(index, name).dtype for name in ("labels", "shard", "offsets", "sizes", "concept_scores")}
    assert list(types.values()) == [np.int64, np.int32, np.int64, np.int32, np.float32]
    assert index.unlabeled == 1 and sum(index.counts().values()) == 21
    diagnoses = (dataclasses.replace(index.task.diagnoses[0], name="unlabeled"), *index.task.diagnoses[1:])
    named = dataclasses.replace(index, task=dataclasses.replace(index.task, diagnoses=diagnoses))
    assert named.unlabeled == 1 and named.counts()["unlabeled"] == 2
    raw = json.loads((tmp_path / "out" / "index.json").read_text())
    assert raw["counts"] == {**dict.fromkeys(DIAGNOSES, 2), DIAGNOSES[7]: 1, "unlabelled": 1}
    missing = np.argwhere(index.sizes == 0)
    assert [(index.lesion_ids[row], VIEWS[view]) for row, view in missing] == [("IL_1028", "dermoscopic")]
    assert not (tmp_path / "out.part").exists()


def test_webdataset_reads_the_same_samples(dataset: Dataset, tmp_path: Path) -> None:
    """The webdataset package reads the same IDs, photo bytes, labels and scores in the order of the index."""
    index = pack(dataset, tmp_path / "out")
    urls = [str(tmp_path / "out" / shard.url) for shard in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == index.lesion_ids.tolist()
    for row, sample in enumerate(samples):
        for view in VIEWS:
            assert sample.get(f"{view}.jpg", b"") == read_photo_bytes(index, row, view)
        record = json.loads(sample["json"])
        label = int(index.labels[row])
        assert record["label"] == (DIAGNOSES[label] if label >= 0 else None)
        assert record["lesion_id"] == index.lesion_ids[row] and record["group"] == index.groups[row]
        scores = [math.nan if score is None else score for score in record["concepts"].values()]
        np.testing.assert_array_equal(np.float32(scores), index.concept_scores[row])
        assert tuple(record["concepts"]) == index.concepts
        age = index.metadata[row, 0]
        assert record["metadata"]["age"] == (None if np.isnan(age) else age)
        assert record["metadata"]["sex"] in ("male", "female")


def test_canvas_of_the_index_is_the_most_frequent_size(dataset: Dataset, tmp_path: Path) -> None:
    index = pack(dataset, tmp_path / "out")
    assert index.photo_sizes == {(32, 24): 43} and index.canvas == (32, 24) and index.notes() == []
    for sizes, canvas in (
        ({(30, 40): 7, (400, 300): 6}, (30, 40)),
        ({(30, 40): 7, (400, 300): 7}, (400, 300)),
        ({(400, 300): 7, (300, 400): 7, (9, 9): 3}, (400, 300)),
    ):
        for order in (sizes, dict(reversed(sizes.items()))):
            assert dataclasses.replace(index, photo_sizes=order).canvas == canvas


def test_photos_are_downscaled_or_kept(make_challenge: Make, tmp_path: Path) -> None:
    dataset = read_challenge(make_challenge(lesions=3).folder)
    reduced, kept = pack(dataset, tmp_path / "small"), pack(dataset, tmp_path / "full", short_side=None)
    for lesion in dataset.lesions:
        original = Path(str(lesion.images["clinical"])).read_bytes()
        for index, size in ((reduced, (32, 24)), (kept, (48, 36))):
            row = index.lesion_ids.tolist().index(lesion.lesion_id)
            data = read_photo_bytes(index, row, "clinical")
            assert Image.open(io.BytesIO(data)).size == size
            if index is kept:
                assert data == original  # these have no metadata to strip


def test_packed_bytes_are_reproducible(dataset: Dataset, tmp_path: Path) -> None:
    shuffled = dataclasses.replace(dataset, lesions=dataset.lesions[::-1])
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    pack(dataset, folders[0], workers=1)
    pack(dataset, folders[1], workers=7)
    pack(shuffled, folders[2])
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1] == contents[2]
    with tarfile.open(folders[0] / "shard-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_shards_mix_diagnoses(make_challenge: Make, tmp_path: Path) -> None:
    challenge = make_challenge(lesions=44)
    challenge.truth.sort(key=lambda row: [row[name] for name in DIAGNOSES])
    index = pack(read_challenge(challenge.folder), tmp_path / "out", shard_samples=22)
    assert all(len(np.unique(index.labels[index.shard == shard])) >= 7 for shard in (0, 1))


def test_packing_twice_skips_or_refuses(dataset: Dataset, tmp_path: Path) -> None:
    """The same input is not packed twice; a different input or setting never overwrites."""
    output = tmp_path / "out"
    output.mkdir()  # an empty folder is allowed
    first = pack(dataset, output)
    times = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert pack(dataset, output, workers=1).fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == times
    relabeled = dataclasses.replace(dataset.lesions[0], label=3)
    others = [
        lambda: pack(dataset, output, short_side=25),
        lambda: pack(dataclasses.replace(dataset, lesions=dataset.lesions[1:]), output),
        lambda: pack(dataclasses.replace(dataset, lesions=[relabeled, *dataset.lesions[1:]]), output),
    ]
    for other in others:
        with pytest.raises(DataError, match=r"by another version; choose another output folder"):
            other()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(DataError, match="exists and is not a packed set"):
        pack(dataset, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_fingerprint_depends_on_the_meaning_of_the_task_alone(dataset: Dataset, tmp_path: Path) -> None:
    index = pack(dataset, tmp_path / "shards")
    path = tmp_path / "shards" / "index.json"
    raw = json.loads(path.read_text())
    # MILK10k: as when index.json had no task, so that folds finished then stay finished.
    write_json(path, {key: value for key, value in raw.items() if key not in ("task", "checksum")})
    assert index.fingerprint == read_index(tmp_path / "shards").fingerprint == file_sha256(path)

    def fingerprint(**changes: Any) -> str:
        write_checked_json(path, {**raw, "task": dataclasses.replace(index.task, **changes).to_mapping()})
        return read_index(tmp_path / "shards").fingerprint

    assert fingerprint(title="A title", decision="argmax") == index.fingerprint
    others = {fingerprint(name="other"), fingerprint(views=index.task.views[:1], columns=TaskColumns("photo"))}
    assert len({*others, index.fingerprint}) == 3


def test_packing_again_updates_titles_of_the_task_and_refuses_other_meanings(dataset: Dataset, tmp_path: Path) -> None:
    def packed_for(**changes: Any) -> ShardIndex:
        task = dataclasses.replace(dataset.task, name="clinic", **changes)
        return pack(dataclasses.replace(dataset, task=task), tmp_path / "shards")

    before, after = packed_for(), packed_for(title="A title")
    assert (before.task.title, after.task.title) == ("MILK10k", "A title") and after.fingerprint == before.fingerprint
    with pytest.raises(DataError, match=r"was packed for task 'clinic', not for another description of it; choose"):
        packed_for(diagnoses=(*dataset.task.diagnoses[:-1], Diagnosis("SCAR")))
    with pytest.raises(DataError, match=r"was packed for task 'clinic', not for task 'milk10k'; choose"):
        pack(dataset, tmp_path / "shards")
    assert read_index(tmp_path / "shards").task == after.task


def test_unreadable_photos_are_reported_or_dropped(make_challenge: Make, tmp_path: Path) -> None:
    challenge = make_challenge()
    for row in (8, 30):
        path = challenge.photo(row)
        path.write_bytes(path.read_bytes()[:-40])
    dataset = read_challenge(challenge.folder)
    with pytest.raises(DataError, match=r"ISIC_5\d+\.jpg: truncated.*2 of 22 lesions.*invalid=drop"):
        pack(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()
    index = pack(dataset, tmp_path / "out", invalid="drop")
    assert len(index) == 20 and not {"IL_1028", "IL_1105"} & set(index.lesion_ids)
    assert len(index.problems) == 2 and all("truncated" in problem.what for problem in index.problems)
    assert {problem.lesion_id for problem in index.problems} == {"IL_1028", "IL_1105"}
    raw = json.loads((tmp_path / "out" / "index.json").read_text())
    assert raw["dropped"] == {"unreadable photo": 2} and sum(raw["counts"].values()) == 20
    flow = index.flow()
    assert flow["dropped"] == {"unreadable photo": 2} and flow["missing_photos"] == {"clinical": 0, "dermoscopic": 0}
    assert sum(shard.samples for shard in index.shards) == 20 and max(shard.samples for shard in index.shards) <= 5
    assert verify(index, 2, 0) == []
    for row in range(44):
        challenge.photo(row).write_bytes(b"")
    with pytest.raises(DataError, match="no valid lesion to pack"):
        pack(read_challenge(challenge.folder), tmp_path / "none", invalid="drop")


def test_many_lesions_with_long_names(make_challenge: Make, tmp_path: Path) -> None:
    """Names over the 100 bytes of a plain tar header take extra blocks; offsets must include them."""
    challenge = make_challenge(lesions=3)
    old = challenge.metadata[0]["lesion_id"]
    for row in [*challenge.metadata[:2], challenge.truth[0]]:
        row["lesion_id"] = "Läsion" + "x" * 74
    (challenge.photo(2).parents[1] / old).rename(challenge.photo(0).parent)
    index = pack(read_challenge(challenge.write().folder), tmp_path / "out")
    assert verify(index, 2, 0) == []


def test_tar_writer_returns_the_offsets_of_members(tmp_path: Path) -> None:
    """Members with sizes around the block size are at the offsets that `add` returns; tarfile finds no others."""
    members = {f"m{size}": bytes([size % 251]) * size for size in (1, 511, 512, 513, 1024, 9999)}
    writer = TarWriter(tmp_path / "a.tar")
    offsets = [writer.add(name, data) for name, data in members.items()]
    closed = writer.close()
    data = (tmp_path / "a.tar").read_bytes()
    assert closed == (len(data), hashlib.sha256(data).hexdigest())
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [(m.name, m.offset_data) for m in tar.getmembers()] == list(zip(members, offsets, strict=True))
    for offset, content in zip(offsets, members.values(), strict=True):
        assert data[offset : offset + len(content)] == content
    assert len(data) == tarfile.RECORDSIZE * -(-len(data) // tarfile.RECORDSIZE)


# --- damage ----------------------------------------------------------------------------------------------------------


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((folder / "index.json").read_text())
    change(raw)
    write_checked_json(folder / "index.json", raw)


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def set_url(url: str) -> Callable[[Path], None]:
    return lambda folder: edit_index(folder, lambda raw: raw["shards"][1].update(url=url))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda f: (f / "index.json").unlink(), "no index.json in this folder"),
    "another bit": (
        lambda f: (f / "index.json").write_bytes(
            (f / "index.json").read_bytes().replace(b"basal cell", b"basal bell", 1)
        ),
        "changed or damaged",
    ),
    "not json": (lambda f: (f / "index.json").write_text("{"), "not readable as JSON"),
    "list": (lambda f: (f / "index.json").write_text("[]"), "not an index of shards"),
    "format": (
        lambda f: edit_index(f, lambda raw: raw.update(format="other")),
        "'other' version 2, this program reads",
    ),
    "version": (
        lambda f: edit_index(f, lambda raw: raw.update(version=1)),
        "version 1, .* pack the data again by triderm pack, or index",
    ),
    "key": (lambda f: edit_index(f, lambda raw: raw.pop("concepts")), "has no 'concepts', so it is incomplete"),
    "sizes": (
        lambda f: edit_index(f, lambda raw: raw.pop("photo_sizes")),
        "has no 'photo_sizes', so it is incomplete; pack or index the data again",
    ),
    "no sizes": (lambda f: edit_index(f, lambda raw: raw.update(photo_sizes={})), "photo_sizes is empty"),
    "wrong size": (lambda f: edit_index(f, lambda raw: raw.update(photo_sizes={"0x9": 1})), "photo size '0x9'"),
    "diagnoses": (lambda f: edit_index(f, lambda raw: raw["diagnoses"].reverse()), "diagnoses are not those"),
    "missing shard": (lambda f: (f / "shard-000001.tar").unlink(), "shard-000001.tar: missing"),
    "short shard": (lambda f: (f / "shard-000001.tar").write_bytes(b"short"), "shard-000001.tar: 5 bytes, index.json"),
    "missing rows": (lambda f: (f / "samples.parquet").unlink(), "samples.parquet: missing"),
    "pipe": (set_url("pipe:cat secret.tar"), "'pipe:cat secret.tar' is not a file name"),
    "outside": (set_url("../shard-000001.tar"), "'../shard-000001.tar' is not a file name"),
    "absolute": (set_url("/tmp/shard-000001.tar"), "is not a file name"),
    "counts": (
        lambda f: edit_index(f, lambda raw: raw["shards"][0].update(samples=4)),
        "do not match the counts of index.json",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_refused(make_challenge: Make, tmp_path: Path, name: str) -> None:
    pack(read_challenge(make_challenge(lesions=11).folder), tmp_path / "out")
    change, message = DAMAGE[name]
    change(tmp_path / "out")
    with pytest.raises(DataError, match=message) as caught:
        read_index(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; create it by triderm pack"):
        read_index(tmp_path / "absent")


def test_index_checksums_are_verified(make_challenge: Make, tmp_path: Path) -> None:
    index = pack(read_challenge(make_challenge(lesions=11).folder), tmp_path / "out")
    read_index(tmp_path / "out", verify=True)
    shard = tmp_path / "out" / "shard-000001.tar"
    expected, offset = index.shards[1].sha256, int(index.offsets[7, 0])
    flip_byte(shard, offset + 300)
    actual = hashlib.sha256(shard.read_bytes()).hexdigest()
    read_index(tmp_path / "out")  # sizes are unchanged
    for check in (lambda: read_index(tmp_path / "out", verify=True), lambda: verify_shards(index)):
        with pytest.raises(DataError, match=rf"shard-000001.tar: checksum {actual[:16]}.*{expected[:16]}.*pack"):
            check()
    flip_byte(shard, offset + 300)
    flip_byte(tmp_path / "out" / "samples.parquet", 200)
    with pytest.raises(DataError, match=r"samples.parquet: checksum"):
        read_index(tmp_path / "out", verify=True)


def update_checksum(samples: Path) -> None:
    about = {"bytes": samples.stat().st_size, "sha256": file_sha256(samples)}
    edit_index(samples.parent, lambda raw: raw["samples"].update(about))


def test_rows_out_of_range_are_refused(make_challenge: Make, tmp_path: Path) -> None:
    pack(read_challenge(make_challenge(lesions=11).folder), tmp_path / "out")
    path = tmp_path / "out" / "samples.parquet"
    table = pq.read_table(path)
    offsets = table.column("clinical_offset").to_numpy()
    for wrong in (offsets + 10**7, np.full(11, 2**63 - 1), -offsets):
        pq.write_table(table.set_column(4, table.schema.field(4), [wrong]), path)
        update_checksum(path)
        with pytest.raises(DataError, match="an offset or a label is out of range"):
            read_index(tmp_path / "out")
    pq.write_table(table.set_column(1, table.schema.field(1), [pa.array([None] * 11, pa.string())]), path)
    update_checksum(path)
    with pytest.raises(DataError, match=r"samples.parquet: column 'group' has empty cells"):
        read_index(tmp_path / "out").groups  # noqa: B018
    pq.write_table(pa.concat_tables([table] * 3), path)
    update_checksum(path)
    with pytest.raises(DataError, match=r"samples.parquet: 33 rows, index.json lists 11"):
        read_index(tmp_path / "out")
    pq.write_table(table.drop_columns("group"), path)
    update_checksum(path)
    with pytest.raises(DataError, match="its columns are not those"):
        read_index(tmp_path / "out")


def test_a_changed_byte_of_the_samples_is_refused(make_challenge: Make, tmp_path: Path) -> None:
    pack(read_challenge(make_challenge(lesions=11).folder), tmp_path / "out")
    path = tmp_path / "out" / "samples.parquet"
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes((data[at] ^ 4,)) + data[at + 1 :])
        with pytest.raises(DataError, match=r"samples\.parquet: checksum"):
            read_index(tmp_path / "out")


REAL = ROOT.parent / "shared" / "milk10k_original"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real MILK10k photos are not on this machine")
def test_packing_real_photos(tmp_path: Path) -> None:
    dataset = read_challenge(REAL)
    few = dataclasses.replace(dataset, lesions=dataset.lesions[:24])
    index = pack_shards(few, tmp_path / "out", short_side=None)
    for row in range(len(index)):
        lesion = next(lesion for lesion in few.lesions if lesion.lesion_id == index.lesion_ids[row])
        for view in VIEWS:
            data = read_photo_bytes(index, row, view)
            original = Image.open(str(lesion.images[view]))
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(original))
            assert b"adobe" not in data.lower() and b"photoshop" not in data.lower()
