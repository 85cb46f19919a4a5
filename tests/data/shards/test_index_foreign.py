"""Shards written by other programs: valid ones are indexed like packed ones, all problems are listed."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from tests.conftest import draw_photo
from tests.processes import without_root
from triderm_dist.checksums import write_checked_json
from triderm_dist.commands.index import IndexConfig, main
from triderm_dist.data.problems import InvalidLesions, write_problems
from triderm_dist.data.readers.milk10k import CONCEPTS
from triderm_dist.data.shards import scan_tar
from triderm_dist.data.shards.colors import matrix_profile
from triderm_dist.data.shards.format import INDEX, SAMPLES
from triderm_dist.data.shards.index import read_index, read_photo_bytes
from triderm_dist.data.shards.index_foreign import index_shards, index_slice
from triderm_dist.data.shards.verify import verify
from triderm_dist.files import LOCK_SECONDS, exclusive_lock
from triderm_dist.schema import DIAGNOSES, UNLABELED, VIEWS, Busy, DataError, Task, View
from triderm_dist.tasks import load_task

Change = Callable[[dict[str, Any], int], Any]


def photo(seed: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    draw_photo(seed).save(buffer, **{"format": "JPEG", "quality": 90, **options})
    return buffer.getvalue()


def write_foreign(
    folder: Path, lesions: int = 8, shard_lesions: int = 3, change: Change = lambda sample, number: None
) -> None:
    """Write shards as `webdataset` does: members in alphabetical order, long names in pax headers."""
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / "part-%03d.tar"), maxcount=shard_lesions, verbose=0) as writer:
        for number in range(lesions):
            sample = {
                "__key__": f"L{number}",
                "clinical.jpg": photo(2 * number),
                "dermoscopic.jpg": photo(2 * number + 1),
                "json": {
                    "label": DIAGNOSES[number % 11],
                    "concepts": {"hair": number / 100, "scale": None},
                    "metadata": {"age": 40, "sex": "Female", "site": "hand"},
                },
            }
            change(sample, number)
            writer.write(sample)


def test_foreign_shards_are_indexed(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs")
    before = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    index = index_shards(tmp_path / "theirs")
    assert {path.name: path.read_bytes() for path in (tmp_path / "theirs").glob("*.tar")} == before
    assert index.lesion_ids.tolist() == [f"L{number}" for number in range(8)]
    assert [shard.samples for shard in index.shards] == [3, 3, 2]
    assert index.labels.tolist() == list(range(8)) and index.groups.tolist() == index.lesion_ids.tolist()
    assert index.concepts == ("hair", "scale")
    np.testing.assert_array_equal(index.concept_scores[:, 0], np.float32(np.arange(8) / 100))
    assert np.isnan(index.concept_scores[:, 1]).all()
    np.testing.assert_array_equal(index.metadata, np.tile(np.float32([40, 0, np.nan, 4]), (8, 1)))
    for row in range(8):
        for place, view in enumerate(VIEWS):
            assert read_photo_bytes(index, row, view) == photo(2 * row + place)
    assert verify(index, 2, 0) == []
    assert index_shards(tmp_path / "theirs").fingerprint == index.fingerprint  # a second scan gives the same index


def flat_record(sample: dict[str, Any], number: int) -> None:
    """Use folders in keys, other extensions, a flat record with the challenge's column names, the label as .cls."""
    sample["__key__"] = f"train/{'x' * 60}_{number}"
    sample["derm.jpg"], sample["closeup.jpeg"] = sample.pop("dermoscopic.jpg"), sample.pop("clinical.jpg")
    sample["json"] = {
        "patient_id": f"P{number // 2}",
        "age_approx": 35,
        "sex": "male",
        "skin_tone_class": 3.0,
        "MONET_hair": 0.25,
    }
    sample["cls"] = DIAGNOSES[number % 3].lower().encode()


def test_alternative_extensions_and_column_names(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs", change=flat_record)
    names = {"clinical": ("closeup.jpeg",), "dermoscopic": ("dermoscopic.jpg", "derm.jpg")}
    index = index_shards(tmp_path / "theirs", extensions=names)
    assert index.lesion_ids[7] == f"{'x' * 60}_7"
    assert index.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert index.groups.tolist() == ["P0", "P0", "P1", "P1", "P2", "P2", "P3", "P3"]
    assert index.concepts == ("hair",) and (index.concept_scores == 0.25).all()
    np.testing.assert_array_equal(index.metadata[0], np.float32([35, 1, 3, np.nan]))
    assert verify(index, 2, 0) == []


def test_photos_without_records_can_be_indexed_for_prediction(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs", change=lambda sample, number: sample.pop("json"))
    notes: list[str] = []
    index = index_shards(tmp_path / "theirs", note=notes.append)
    assert index.unlabeled == 8 and index.concepts == CONCEPTS
    assert np.isnan(index.concept_scores).all() and np.isnan(index.metadata).all()
    assert "no sample has concept scores" in notes[0] and "no sample has a label" in notes[1]
    assert verify(index, 2, 0) == []


def test_index_is_independent_of_the_table_chunk_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small chunks, rows are converted before the end of the tar and before the first sample with concepts."""
    write_foreign(tmp_path / "theirs", change=lambda sample, n: sample["json"].pop("concepts") if n < 4 else None)
    index = index_shards(tmp_path / "theirs")
    monkeypatch.setattr(scan_tar, "TABLE_ROWS", 2)
    again = index_shards(tmp_path / "theirs")
    assert again.fingerprint == index.fingerprint and verify(again, 2, 0) == []
    assert np.isnan(again.concept_scores[:4]).all() and (again.concept_scores[4:, 0] > 0).all()


def set_record(number: int, **cells: Any) -> Change:
    return lambda sample, place: sample["json"].update(cells) if place == number else None


def set_member(number: int, name: str, data: bytes | None) -> Change:
    def change(sample: dict[str, Any], place: int) -> None:
        if place == number:
            sample.pop(name)
            if data is not None:
                sample[name] = data

    return change


BROKEN: dict[str, tuple[Change, str, str]] = {
    "score": (set_record(4, concepts={"hair": 2}), "record", "hair '2' is not a score"),
    "new concept": (set_record(4, concepts={"pus": 0.1}), "record", "lesion L4 has a concept 'pus' that the first"),
    "concept list": (set_record(4, concepts=[1]), "record", "concepts is a list"),
    "age": (set_record(4, metadata={"age": "old"}), "record", "age_approx 'old' is not a number from 0 to 120 years"),
    "lesion id": (set_record(4, lesion_id="a.b"), "record", "lesion_id 'a.b' holds a dot, a slash or an unusual space"),
    "duplicate": (set_record(4, lesion_id="L1"), "duplicate lesion", "lesion L1 occurs twice, first in .*part-000.tar"),
    "formula": (set_record(4, group="=1+1"), "record", "group begins with =, which a spreadsheet takes"),
    "json": (set_member(4, "json", b"{"), "record", "part-001.tar, sample L4: "),
    "json list": (set_member(4, "json", b"[]"), "record", "its JSON is a list"),
    "no photo": (set_member(4, "clinical.jpg", None), "missing photo", "no clinical photo named .clinical.jpg among"),
    "text": (
        set_member(4, "clinical.jpg", b"no photo"),
        "unreadable photo",
        "clinical.jpg: a text file, shards hold JPEGs",
    ),
    "png": (
        set_member(4, "clinical.jpg", photo(0, format="PNG")),
        "unreadable photo",
        "clinical.jpg: a PNG, shards hold",
    ),
    "cut": (set_member(4, "clinical.jpg", photo(0)[:-30]), "unreadable photo", "clinical.jpg: truncated"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_all_problems_of_foreign_shards_are_listed(tmp_path: Path, name: str) -> None:
    change, kind, message = BROKEN[name]
    write_foreign(tmp_path / "theirs", change=change)
    with pytest.raises(InvalidLesions, match=message) as caught:
        index_shards(tmp_path / "theirs")
    assert [problem.kind for problem in caught.value.problems] == [kind] and "\n" not in str(caught.value)
    assert not list((tmp_path / "theirs").glob("[!p]*"))
    index = index_shards(tmp_path / "theirs", invalid="drop")
    assert len(index) == 7 and "L4" not in index.lesion_ids.tolist()
    assert verify(index, 2, 0) == []


def test_problems_are_listed_in_the_order_of_the_lesions(tmp_path: Path) -> None:
    def change(sample: dict[str, Any], number: int) -> None:
        if number in (1, 2):
            sample["json"]["concepts"] = {"pus": 0.1}
        elif number == 3:
            sample["json"]["lesion_id"] = "L0"

    write_foreign(tmp_path / "theirs", shard_lesions=8, change=change)
    with pytest.raises(InvalidLesions) as caught:
        index_shards(tmp_path / "theirs")
    found = [(problem.lesion_id, problem.kind) for problem in caught.value.problems]
    assert found == [("L1", "record"), ("L2", "record"), ("L0", "duplicate lesion")]


def test_lesions_with_concepts_of_their_own_are_found_in_one_pass(tmp_path: Path, monkeypatch) -> None:
    write_foreign(
        tmp_path / "theirs",
        shard_lesions=8,
        change=lambda sample, number: sample["json"].update(concepts={f"own {number}": 0.1}),
    )
    reads, rows = [], scan_tar.TarScan.rows
    monkeypatch.setattr(scan_tar.TarScan, "rows", lambda scan, *columns: reads.append(columns) or rows(scan, *columns))
    with pytest.raises(InvalidLesions) as caught:
        index_shards(tmp_path / "theirs")
    assert [problem.what.split("'")[1] for problem in caught.value.problems] == [f"own {at}" for at in range(1, 8)]
    assert reads.count(("lesion_id", "concept_set")) == 1


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> list[tarfile.TarInfo]:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return tar.getmembers()


def members_of(number: int, **record: Any) -> list[tuple[str, bytes]]:
    return [
        (f"L{number}.clinical.jpg", photo(2 * number)),
        (f"L{number}.dermoscopic.jpg", photo(2 * number + 1)),
        (f"L{number}.json", json.dumps({"label": DIAGNOSES[number], **record}).encode()),
    ]


def problems_of(folder: Path, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidLesions) as caught:
        index_shards(folder, **options)
    return [(problem.lesion_id, problem.kind) for problem in caught.value.problems]


def test_lesions_behind_damage_are_never_lost_in_silence(tmp_path: Path) -> None:
    """A flipped bit in a header, a cut between members, joined tars: refused, or the rest is dropped by name."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    headers = write_tar(folder / "a.tar", [member for number in range(4) for member in members_of(number)])
    whole = (folder / "a.tar").read_bytes()
    flipped = bytearray(whole)
    flipped[headers[7].offset] ^= 1
    joined = whole + whole[: headers[3].offset] + bytes(1024)
    for damaged, kept, dropped in (
        (bytes(flipped), 2, ["", "L2"]),
        (whole[: headers[8].offset], 2, ["", "L2"]),  # between a photo and the record
        (whole[: headers[9].offset], 2, ["", "L2"]),  # between two lesions, which nothing shows
        (joined, 3, ["", "L3"]),
    ):
        (folder / "a.tar").write_bytes(damaged)
        assert problems_of(folder) == [(name, "tar") for name in dropped]
        index = index_shards(folder, invalid="drop")
        assert index.lesion_ids.tolist() == [f"L{number}" for number in range(kept)]
        assert [problem.where for problem in index.problems] == ["a.tar"] * 2 and verify(index, 2, 0) == []
        # An index of an earlier version, which did not notice.
        raw = json.loads((folder / "index.json").read_text())
        write_checked_json(folder / "index.json", {**raw, "problems": []})
        assert "tar" in {problem.kind for problem in verify(read_index(folder), 2, 0)}


def test_folders_with_empty_tars(tmp_path: Path) -> None:
    folder, notes = tmp_path / "theirs", list[str]()
    folder.mkdir()
    write_tar(folder / "a.tar", [])
    with pytest.raises(DataError, match=r"theirs: no valid lesion in 1 tars; no lesion in a.tar; not in the index"):
        index_shards(folder)
    write_tar(folder / "b.tar", members_of(0))
    write_tar(folder / "._b.tar", [])
    index = index_shards(folder, note=notes.append)
    assert [shard.url for shard in index.shards] == ["b.tar"] and notes[0] == "no lesion in a.tar; not in the index"
    (folder / "a.tar").write_bytes(b"")
    assert problems_of(folder) == [("", "tar")]
    (folder / "a b;c.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"a b;c.tar: the name of a shard has .*; rename it"):
        index_shards(folder)


def test_tars_that_are_not_read_are_named(tmp_path: Path) -> None:
    """Compressed ones, parts of downloads, those of other folders, and other spellings of the suffix."""
    folder, notes = tmp_path / "theirs", list[str]()
    (folder / "more").mkdir(parents=True)
    write_tar(folder / "a.tar", [*members_of(0), *members_of(1)])
    for name in ("b.tar.gz", "c.tgz", "d.tar.part", "a.tar.aria2", "more/e.tar", "._b.tar.gz"):
        (folder / name).write_bytes(b"")
    index_shards(folder, note=notes.append)
    assert notes[0] == (
        "not read, as no plain tar in this folder: a.tar.aria2, b.tar.gz, c.tgz, d.tar.part, more/e.tar"
    )
    (folder / "F.TAR").write_bytes(b"")
    with pytest.raises(DataError, match=r"F.TAR: the name of a shard has .* ends with .tar; rename it"):
        index_shards(folder)


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_tar(folder / "a.tar", members_of(0))
    fingerprint = index_shards(folder).fingerprint
    for content in (b"", b"{", b"\0" * 90):
        (folder / "index.json").write_bytes(content)
        assert index_shards(folder).fingerprint == fingerprint


def test_huge_records_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    monkeypatch.setattr(scan_tar, "MAX_RECORD", 1000)
    write_tar(folder / "a.tar", members_of(0, note="x" * 1000))
    with pytest.raises(InvalidLesions, match=r"sample L0: .json has 10\d\d bytes, too many for what it is"):
        index_shards(folder)


def test_members_that_are_no_lesion_are_named(tmp_path: Path) -> None:
    """A README, a caption, hidden files of macOS: not read, and told; webdataset still reads the same lesions."""
    folder, notes = tmp_path / "theirs", list[str]()
    folder.mkdir()
    others = [("README.md", b"hello"), ("set/._L9.clinical.jpg", b"\0"), ("LICENSE", b"free"), ("Thumbs.db", b"")]
    captions = [("L0.txt", b"a mole"), ("L1.txt", b"another")]
    zero, one = members_of(0), members_of(1)
    write_tar(folder / "a.tar", [*others, *zero, captions[0], *one, captions[1]])
    index = index_shards(folder, note=notes.append)
    assert index.lesion_ids.tolist() == ["L0", "L1"] and verify(index, 2, 0) == []
    assert "not used, as neither a record nor a photo of a view: .txt (2 times), README.md, Thumbs.db" in notes
    assert not index.problems


MEMBERS: dict[str, tuple[Callable[[list[tuple[str, bytes]]], Any], str, str]] = {
    "twice": (lambda m: m.insert(1, m[0]), "member", ".clinical.jpg occurs twice"),
    "other format": (
        lambda m: m.__setitem__(0, ("L1.clinical.png", photo(0, format="PNG"))),
        "missing photo",
        "no clinical photo named .clinical.jpg, but .clinical.png; shards hold JPEGs, so convert it",
    ),
    "two photos": (
        lambda m: m.insert(1, ("L1.closeup.jpg", photo(9))),
        "several photos",
        ".clinical.jpg and .closeup.jpg are different clinical photos; name one by clinical=EXTENSION",
    ),
    "two labels": (lambda m: m.append(("L1.cls", b"NV")), "record", "its labels differ: label 'BCC', .cls 'NV'"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_choice_between_members_is_refused(tmp_path: Path, name: str) -> None:
    """Also where a missing view may be marked."""
    change, kind, message = MEMBERS[name]
    folder, lesion = tmp_path / "theirs", members_of(1)
    folder.mkdir()
    change(lesion)
    write_tar(folder / "a.tar", [*members_of(0), *lesion, *members_of(2)])
    options: dict[str, Any] = {
        "missing_view": "mark",
        "extensions": {"clinical": ("clinical.jpg", "closeup.jpg"), "dermoscopic": ("dermoscopic.jpg",)},
    }
    if name == "other format":
        del options["extensions"]
    with pytest.raises(InvalidLesions, match=re.escape(message)):
        index_shards(folder, **options)
    index = index_shards(folder, **options, invalid="drop")
    assert index.lesion_ids.tolist() == ["L0", "L2"]
    assert [(problem.lesion_id, problem.kind) for problem in index.problems] == [("L1", kind)]


def test_names_of_any_bytes_are_dropped_and_written(tmp_path: Path) -> None:
    """A name in Latin-1 and one that begins a formula, in folders: in no file as they are."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in [*members_of(0), *members_of(1), ("set/L\xe4s.json", b"{}"), ("set/=1+1.json", b"{}")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = index_shards(folder, invalid="drop")
    assert [problem.lesion_id for problem in index.problems] == ["L\\udce4s", "=1+1"]
    write_problems(tmp_path / "problems.csv", index.problems)
    with (tmp_path / "problems.csv").open(encoding="utf-8", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["lesion_id", "L\\udce4s", "'=1+1"]
    assert verify(index, 2, 0) == []


def test_linked_members_are_named(tmp_path: Path) -> None:
    """GNU tar stores a second name of a file as a hard link: its sample would lose a label or a photo."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    write_tar(folder / "a.tar", members_of(0))
    with tarfile.open(folder / "a.tar", "a") as tar:
        info = tarfile.TarInfo("L1.json")
        info.type, info.linkname = tarfile.LNKTYPE, "L0.json"
        tar.addfile(info)
    with pytest.raises(InvalidLesions, match=r"sample L1: .json is a hard link; make the tar again from plain files"):
        index_shards(folder)


def test_an_index_does_not_depend_on_the_place_of_the_folder(tmp_path: Path) -> None:
    write_foreign(tmp_path / "one", change=set_record(4, concepts=[1]))
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    for name in ("one", "other"):
        index_shards(tmp_path / name, invalid="drop")
    one, other = ((tmp_path / name / "index.json").read_bytes() for name in ("one", "other"))
    assert one == other and json.loads(one)["problems"][0]["where"] == "part-001.tar, sample L4"


def numbered(sample: dict[str, Any], number: int) -> None:
    """HAM10000 with the labels of torchvision's folders: numbers in alphabetical order."""
    sample["json"] = {}
    sample["cls"] = str(number % 7).encode()


def ham(**words: str) -> Task:
    names = ("AKIEC", "BCC", "BKL", "DF", "MEL", "NV", "VASC")
    diagnoses = [{"name": name, "words": [words[name]] if name in words else []} for name in names]
    raw = {"name": "ham", "diagnoses": diagnoses, "views": [{"name": "dermoscopic"}]}
    return Task.from_mapping(raw, "task.yaml")


@pytest.mark.parametrize("invalid", ["refuse", "drop"])
def test_numbers_are_no_labels_without_a_task(tmp_path: Path, invalid: Any) -> None:
    write_foreign(tmp_path / "theirs", lesions=9, change=numbered)
    with pytest.raises(DataError) as error:
        index_shards(tmp_path / "theirs", invalid=invalid)
    assert "labels that name no diagnosis: '0' in 2 lesions, '1' in 2 lesions, '2' in 1" in str(error.value)
    assert "task=FILE" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "theirs").glob("[!p]*"))


def test_a_task_says_what_labels_mean(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs", lesions=7, change=numbered)
    task = ham(AKIEC="0", BCC="1", BKL="2", DF="3", MEL="4", NV="5", VASC="6")
    index = index_shards(tmp_path / "theirs", task=task)
    assert [index.diagnoses[label] for label in index.labels] == list(task.diagnosis_names)
    assert verify(index, 2, 0) == []


def test_one_unknown_label_is_refused_or_dropped(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs", change=set_record(4, label="SCC"))
    with pytest.raises(DataError, match="labels that name no diagnosis: 'SCC' in 1 lesions; list them"):
        index_shards(tmp_path / "theirs")
    index = index_shards(tmp_path / "theirs", invalid="drop")
    assert [(problem.lesion_id, problem.kind) for problem in index.problems] == [("L4", "label")]
    assert len(index) == 7 and verify(index, 2, 0) == []


CLINIC = Task.from_mapping(
    {
        "name": "clinic",
        "diagnoses": [{"name": "MEL", "words": ["1"]}, {"name": "NV", "words": ["2", "mole"]}],
        "views": [{"name": "dermoscopic"}],
        "concepts": {"names": ["streaks", "veil"], "words": {"absent": 0, "present": 1}},
        "fields": [{"name": "sex", "column": "Geschlecht", "kind": "category", "categories": ["w", "m"]}],
        "columns": {"image": "photo", "diagnosis": "dx", "group": "Patient"},
        "missing_words": ["k.A."],
    },
    "task.yaml",
)


def clinic_record(sample: dict[str, Any], number: int) -> None:
    """Use one view, numbers as labels, and the words and columns of a task; the last lesion says that none is known."""
    del sample["clinical.jpg"]
    cells = {"label": 1.0 + number % 2, "veil": "present", "streaks": "k.A.", "Geschlecht": "M", "Patient": number // 2}
    sample["json"] = cells if number < 7 else {"label": "k.A.", "Geschlecht": "K.A."}


def test_records_are_read_by_the_words_of_the_task(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs", change=clinic_record)
    index = index_shards(tmp_path / "theirs", task=CLINIC)
    assert index.task == CLINIC and index.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, UNLABELED]
    assert index.concepts == ("streaks", "veil") and index.groups.tolist() == ["0", "0", "1", "1", "2", "2", "3", "L7"]
    np.testing.assert_array_equal(index.concept_scores, np.float32([[np.nan, 1]] * 7 + [[np.nan, np.nan]]))
    np.testing.assert_array_equal(index.metadata[:, 0], np.float32([1] * 7 + [np.nan]))
    assert not index.sizes[:, 0].any() and index.sizes[:, 1].all()
    assert verify(index, 2, 0) == []


def test_one_view_is_required_and_enough_where_the_task_has_one(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs", change=clinic_record)
    closeups = replace(CLINIC, views=(View("clinical"),))
    with pytest.raises(InvalidLesions, match=r"lesion L0: no clinical photo named .*name its extension by [^,]*\(8"):
        index_shards(tmp_path / "theirs", task=closeups, missing_view="mark")


def test_labels_of_another_task_are_refused(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs")
    with pytest.raises(DataError, match=r"labels that name no diagnosis: 'AKIEC' in .*known are bcc, "):
        index_shards(tmp_path / "theirs", task=load_task("derm7pt"))


def test_missing_view_can_be_marked(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs", change=set_member(4, "clinical.jpg", None))
    index = index_shards(tmp_path / "theirs", missing_view="mark")
    assert (index.sizes == 0).sum() == 1 and index.sizes[4, 0] == 0
    assert verify(index, 2, 0) == []


def test_rotated_photos_are_reported(tmp_path: Path) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    write_foreign(tmp_path / "theirs", change=set_member(4, "clinical.jpg", photo(0, exif=exif)))
    notes: list[str] = []
    index_shards(tmp_path / "theirs", note=notes.append)
    assert notes == ["the EXIF of 1 photos asks for a rotation, which training ignores; triderm pack would apply it"]


def test_photos_in_another_color_space_are_reported(tmp_path: Path) -> None:
    profile = matrix_profile((0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
    write_foreign(tmp_path / "theirs", change=set_member(4, "clinical.jpg", photo(0, icc_profile=profile)))
    notes: list[str] = []
    index_shards(tmp_path / "theirs", note=notes.append)
    assert notes == [
        "1 photos have CMYK colors or a color profile other than sRGB, which training ignores; triderm pack would "
        "convert them"
    ]


def test_truncated_tar_is_refused(tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs")
    path = tmp_path / "theirs" / "part-001.tar"
    with tarfile.open(path) as tar:
        last = [member for member in tar.getmembers() if member.name.startswith("L4.")][-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 5])
    with pytest.raises(InvalidLesions, match=r"part-001.tar: not a readable plain tar .*L4.*is truncated"):
        index_shards(tmp_path / "theirs")


def test_folders_without_uncompressed_tars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        index_shards(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no \*.tar in this folder$"):
        index_shards(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"decompress a.tar.gz to a plain tar first"):
        index_shards(tmp_path)


def test_packed_folder_keeps_its_index(make_challenge: Any, tmp_path: Path) -> None:
    from triderm_dist.data.readers.milk10k import read_challenge
    from triderm_dist.data.shards.pack import pack_shards

    index = pack_shards(read_challenge(make_challenge(lesions=11).folder), tmp_path / "ours", short_side=None)
    with pytest.raises(DataError, match="written by triderm pack"):
        index_shards(tmp_path / "ours")
    # Without their index they are indexed as foreign shards, with the same columns.
    (tmp_path / "ours" / "index.json").unlink()
    again = index_shards(tmp_path / "ours")
    assert again.lesion_ids.tolist() == index.lesion_ids.tolist() and again.concepts == index.concepts
    for name in ("labels", "offsets", "sizes", "concept_scores", "metadata"):
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name))
    assert json.loads((tmp_path / "ours" / "index.json").read_text())["extensions"]
    assert read_index(tmp_path / "ours", verify=True).fingerprint == again.fingerprint


def test_slices_give_the_index_of_one_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_foreign(tmp_path / "theirs", shard_lesions=2, change=grouped)
    shutil.copytree(tmp_path / "theirs", tmp_path / "copy")
    expected = index_shards(tmp_path / "theirs")
    scanned = scans(monkeypatch)
    for number in (2, 1, 2):
        assert index_slice(tmp_path / "copy", number, 2, workers=3) == []
    assert sorted(scanned) == [f"part-{number:03d}.tar" for number in range(4)]
    index = index_shards(tmp_path / "copy")
    assert len(scanned) == 4 and index.fingerprint == expected.fingerprint
    for name in (INDEX, SAMPLES):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_only_changed_tars_are_scanned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_label(sample: dict[str, Any], number: int) -> None:
        sample["json"]["label"] = "unheard of" if number == 3 else DIAGNOSES[number]

    write_foreign(tmp_path / "theirs", shard_lesions=2, change=without_label)
    scanned = scans(monkeypatch)
    with pytest.raises(DataError, match="labels that name no diagnosis: 'unheard of' in 1 lesions"):
        index_shards(tmp_path / "theirs")
    write_foreign(tmp_path / "right", shard_lesions=2)
    shutil.copy(tmp_path / "right" / "part-001.tar", tmp_path / "theirs")
    scanned.clear()
    assert len(index_shards(tmp_path / "theirs")) == 8 and scanned == ["part-001.tar"]
    scanned.clear()
    index_slice(tmp_path / "theirs", 1, 2)
    index_slice(tmp_path / "theirs", 1, 2, missing_view="mark")
    # Threads scan the tars of a slice, in any order.
    assert sorted(scanned) == ["part-000.tar", "part-000.tar", "part-002.tar", "part-002.tar"]


def test_two_processes_do_not_index_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOCK_SECONDS, "0")
    write_foreign(tmp_path / "theirs", lesions=2)
    part = tmp_path / "theirs.index.part"
    for name, work in (
        ("lock", lambda: index_shards(tmp_path / "theirs")),
        ("lock", lambda: index_slice(tmp_path / "theirs", 1, 2)),
        ("slice-1-of-2.lock", lambda: index_slice(tmp_path / "theirs", 1, 2)),
        ("slice-2-of-2.lock", lambda: index_shards(tmp_path / "theirs")),
    ):
        with exclusive_lock(part / name, ""), pytest.raises(Busy, match="another process is indexing these tars"):
            work()
    index_slice(tmp_path / "theirs", 1, 2)


def grouped(sample: dict[str, Any], number: int) -> None:
    """Groups of two lesions; concepts from the third lesion on, in another order in the last tar."""
    sample["json"]["group"] = f"P{number // 2}"
    if number < 2:
        del sample["json"]["concepts"]
    elif number > 5:
        sample["json"]["concepts"] = {"scale": 0.5, "hair": None}


def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that the name of every tar joins whose members are read."""
    scanned: list[str] = []
    read = scan_tar.tar_members

    def members(path: Path) -> Iterator[Any]:
        scanned.append(path.name)
        yield from read(path)

    monkeypatch.setattr(scan_tar, "tar_members", members)
    return scanned


def test_read_only_folder_is_refused_before_the_scan(tmp_path):
    write_foreign(tmp_path / "foreign")
    (tmp_path / "foreign").chmod(0o555)
    done = without_root("index", f"folder={tmp_path}/foreign", "task=milk10k", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        rf"error: {tmp_path}/foreign: read-only for this user; .* file://{tmp_path}/foreign .* output=FOLDER\n",
        done.stderr,
    )
    assert not (tmp_path / "foreign.index.part").exists()


def test_the_task_that_is_assumed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(tmp_path / "theirs", lesions=9)
    main(IndexConfig(folder=str(tmp_path / "theirs")))
    note = "note: no task= is set and the folder has no task.yaml: the tars are read as those of MILK10k"
    assert note in capsys.readouterr().out
    main(IndexConfig(folder=str(tmp_path / "theirs"), task="milk10k"))
    assert note not in capsys.readouterr().out
