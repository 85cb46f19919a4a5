"""Ids of patients: hashes in everything that is packed; salt and ids stay in a file beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import write_challenge
from tests.data.shards.test_index_foreign import write_foreign
from triderm_dist.commands.pack import PackConfig, main
from triderm_dist.config import DataConfig
from triderm_dist.data import group_hashes
from triderm_dist.data.group_hashes import GroupHashes, GroupHashing, groups_file, hash_groups, read_salt, salt_of
from triderm_dist.data.problems import Problem
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.index import read_index
from triderm_dist.data.shards.index_foreign import index_shards
from triderm_dist.data.shards.verify import verify
from triderm_dist.engine.fold import assigned_folds
from triderm_dist.schema import DataError, InputError

PATIENT = "MRN-000{}-Smith"
NAMES = ("=Smith", "P1", "Smith" * 41, "P2")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A challenge of 33 lesions of 17 patients, of which one is unknown, and one has a damaged photo."""
    challenge = write_challenge(tmp_path_factory.mktemp("patients") / "challenge", lesions=33)
    for number, row in enumerate(challenge.metadata):
        row["patient_id"] = PATIENT.format(number // 4) if number // 4 != 3 else ""
    challenge.write()
    challenge.photo(0).write_bytes(b"no photo")
    return challenge.folder


def pack(source: Path, output: Path, **settings) -> None:
    main(PackConfig(source=str(source), output=str(output), short_side=None, invalid="drop", workers=1, **settings))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "train"
    pack(source, folder)
    return folder


def test_no_packed_file_holds_a_patient_id(source, packed):
    for name, data in contents(packed).items():
        assert b"MRN" not in data, name
    assert b"Smith" not in str(pq.read_table(packed / "samples.parquet").to_pylist()).encode()
    index, plain = read_index(packed), read_challenge(source, invalid="drop")
    clear = {lesion.lesion_id: lesion.group for lesion in plain.lesions}
    hashed = dict(zip(index.lesion_ids, index.groups, strict=True))
    assert len({hashed[lesion] for lesion in hashed}) == len({clear[lesion] for lesion in hashed}) > 10
    for one in hashed:
        for other in hashed:
            assert (hashed[one] == hashed[other]) == (clear[one] == clear[other])
    assert verify(index, folds=2, fold_seed=0) == []


def test_no_problem_holds_an_invalid_patient_id(tmp_path):
    challenge = write_challenge(tmp_path / "challenge", lesions=33)
    for number, row in enumerate(challenge.metadata):
        row["patient_id"] = "=Smith" if number < 2 else f"P{number // 4}"
    challenge.write()
    pack(challenge.folder, tmp_path / "out")
    write_foreign(tmp_path / "theirs", lesions=12, change=lambda sample, at: sample["json"].update(group=NAMES[at % 4]))
    index_shards(tmp_path / "theirs", invalid="drop", hashing=GroupHashing())
    for folder, count in (("out", 2), ("theirs", 6)):
        problems = read_index(tmp_path / folder).problems
        assert len(problems) == count and "Smith" not in (tmp_path / folder / "index.json").read_text()
        assert {problem.what.split(",")[0] for problem in problems} <= {
            "patient_id begins with =",
            "group begins with =",
            "group must have at most 200 characters",
        }


def test_file_of_groups_is_private_and_names_every_group(packed, source):
    file = groups_file(packed)
    assert file.parent == packed.parent and stat.S_IMODE(file.stat().st_mode) == 0o600
    _, header, *rows = file.read_text().splitlines()
    assert header == "group,hash"
    hashes = GroupHashes(read_salt(file))
    assert dict(row.split(",") for row in rows)[PATIENT.format(0)] == hashes.of(PATIENT.format(0))
    raw = json.loads((packed / "index.json").read_text())
    assert raw["groups"] == {"salt": hashes.fingerprint} and hashes.salt.hex() not in json.dumps(raw)
    assert "salt" not in repr(hashes)


def test_packing_again_gives_the_same_bytes(source, packed, tmp_path):
    (tmp_path / "again.groups.csv").write_bytes(groups_file(packed).read_bytes())
    pack(source, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(packed)
    before = contents(packed)
    pack(source, packed)  # finds itself packed
    assert contents(packed) == before
    pack(source, tmp_path / "other", salt=str(packed))
    assert contents(tmp_path / "other") == before
    pack(source, tmp_path / "random")
    assert contents(tmp_path / "random") != before


def test_folds_do_not_depend_on_the_salt(source, packed, tmp_path):
    pack(source, tmp_path / "random")
    one, other = read_index(packed), read_index(tmp_path / "random")
    assert one.group_salt != other.group_salt and set(one.groups).isdisjoint(other.groups)
    np.testing.assert_array_equal(*(assigned_folds(index, DataConfig(folds=3)) for index in (one, other)))


def test_set_without_its_file_of_groups_is_not_packed_under_another_salt(source, packed, tmp_path):
    pack(source, tmp_path / "set")
    groups_file(tmp_path / "set").unlink()
    with pytest.raises(DataError, match=r"set\.groups\.csv: no such file, .* restore it, or delete"):
        pack(source, tmp_path / "set")
    assert not groups_file(tmp_path / "set").exists()
    with pytest.raises(DataError, match=r"set\.groups\.csv: no such file|not readable"):
        salt_of(tmp_path / "set")


def test_plain_groups_on_request_and_in_sets_of_earlier_versions(source, tmp_path, capsys):
    pack(source, tmp_path / "set", groups="plain")
    index = read_index(tmp_path / "set")
    assert PATIENT.format(2) in index.groups.tolist() and index.group_salt is None
    assert not groups_file(tmp_path / "set").exists()
    before = contents(tmp_path / "set")
    pack(source, tmp_path / "set")
    assert contents(tmp_path / "set") == before and "holds group ids as they are; delete its" in capsys.readouterr().out
    assert salt_of(tmp_path / "set") is None
    with pytest.raises(DataError, match="packed from other data, with other settings"):
        pack(source, tmp_path / "set", groups="hash")


def test_set_without_patients_has_no_salt_and_keeps_its_bytes(tmp_path):
    challenge = write_challenge(tmp_path / "challenge", lesions=11)
    for groups in ("hash", "plain"):
        pack(challenge.folder, tmp_path / groups, groups=groups)
    assert contents(tmp_path / "hash") == contents(tmp_path / "plain")
    assert not groups_file(tmp_path / "hash").exists()


def test_salt_is_checked_where_no_lesion_has_a_group(packed, tmp_path):
    assert GroupHashing.of("plain", None, True) is None
    assert GroupHashing.of("hash", str(packed), False) == GroupHashing(str(packed), False)
    for groups, salt, message in (
        ("plain", str(packed), "salt=.*: has no effect with groups=plain; remove one of them"),
        ("hash", str(tmp_path / "missing"), "missing: not readable"),
        ("hash", __file__, "holds no salt in its first line"),
    ):
        with pytest.raises(InputError, match=message):
            GroupHashing.of(groups, salt, True)


def test_another_salt_than_that_of_the_file_is_refused(source, packed, tmp_path):
    pack(source, tmp_path / "set")
    with pytest.raises(DataError, match="holds another salt than the one of salt="):
        pack(source, tmp_path / "set", salt=str(groups_file(packed)))


def test_index_of_other_tars_holds_hashes(source, packed, tmp_path):
    pack(source, tmp_path / "foreign", groups="plain")
    for name in ("index.json", "samples.parquet"):
        (tmp_path / "foreign" / name).unlink()
    tars, notes = contents(tmp_path / "foreign"), list[str]()
    index = index_shards(tmp_path / "foreign", note=notes.append, hashing=GroupHashing())
    hashes = GroupHashes(read_salt(groups_file(index.folder)))
    clear = {lesion.lesion_id: lesion.group for lesion in read_challenge(source, invalid="drop").lesions}
    assert index.group_salt == hashes.fingerprint and notes[-1].endswith("; the tars hold their ids")
    assert all(hashes.of(clear[one]) == own for one, own in zip(index.lesion_ids, index.groups, strict=True))
    assert b"MRN" not in (index.folder / "index.json").read_bytes()
    assert {name: data for name, data in contents(index.folder).items() if name in tars} == tars
    assert verify(index, folds=2, fold_seed=0) == []
    groups_file(index.folder).write_bytes(groups_file(packed).read_bytes())
    with pytest.raises(DataError, match=r"foreign\.groups\.csv: its salt is not that of"):
        verify(index, folds=2, fold_seed=0)
    groups_file(index.folder).unlink()  # the groups of the tars cannot be compared
    assert verify(index, folds=2, fold_seed=0) == []


@pytest.mark.parametrize("content", [b"", b"group,hash\nP1,ab\n", b"\xff\xfe", b"salt=12"])
def test_damaged_file_of_groups_is_named(tmp_path, content):
    (tmp_path / "x.groups.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.groups\.csv: (holds no salt|not readable)"):
        read_salt(tmp_path / "x.groups.csv")


def test_processes_that_start_at_once_get_one_salt(tmp_path):
    salts, barrier = [], threading.Barrier(8)

    def create() -> None:
        barrier.wait()
        salts.append(group_hashes._own_salt(tmp_path / "x.groups.csv", None))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(salts) == 8 and len(set(salts)) == 1
    assert os.listdir(tmp_path) == ["x.groups.csv"]


@pytest.mark.parametrize("group", ["P7", "Smith, John", "12.03.1950", "O'Neil (2)", "2019/7", "ä"])
def test_groups_in_paths_of_problems_are_hashed(group):
    hashes = GroupHashes(bytes(32), ("12", "P", group))
    where = (
        f"photos/{group}/Q.png: no a.jpg, but {group}/Qb.jpg in C:\\{group}\\a.jpg and /x/{group}.jpg, row 12 of t.csv"
    )
    (found,) = hashes.without_ids([Problem("L", "kind", where, "what 12, P/Pa.jpg")])
    assert found.where == where.replace(group, hashes.of(group)) and found.what == f"what 12, {hashes.of('P')}/Pa.jpg"


def test_groups_in_paths_of_problems_are_looked_up():
    hashed = list[str]()

    class Counted(GroupHashes):
        def of(self, group):
            hashed.append(group)
            return super().of(group)

    groups = [f"Patient {number}" for number in range(1000)]
    problems = [Problem("L", "kind", f"photos/{group}/a.jpg", "cut off") for group in groups[:100]]
    Counted(bytes(32), groups).without_ids(problems)
    assert hashed == groups[:100]


@pytest.mark.parametrize(
    ("lesion", "group", "noted"),
    [
        ("MRN-1_2", "MRN-1", True),
        ("P12-a", "P12", True),
        ("IL_1", "1", False),
        ("IL_1", "P1", False),
        ("IL_1", "IL_1", False),
    ],
)
def test_lesion_ids_that_hold_the_id_of_their_patient_are_noted(source, tmp_path, lesion, group, noted):
    dataset = read_challenge(source, invalid="drop")
    lesions = [
        dataclasses.replace(dataset.lesions[0], lesion_id=lesion, group=group),
        dataclasses.replace(dataset.lesions[1], lesion_id="x", group="other"),
    ]
    found, _ = hash_groups(Dataset(dataset.task, lesions, dataset.concepts, True, []), tmp_path / "set", GroupHashing())
    assert bool(found.notes) == noted
    if noted:
        assert found.notes[0].startswith(f"1 lesion ids hold the id of their patient_id, such as {lesion}; only groups")
