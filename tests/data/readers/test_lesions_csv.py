"""One table and its photos are read as defined by a task; invalid rows are refused with row and column."""

from __future__ import annotations

import csv
import math
import os
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.processes import ROOT
from triderm_dist.data.problems import InvalidLesions
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.lesions_csv import read_labels, read_lesions
from triderm_dist.schema import UNLABELED, DataError, Task
from triderm_dist.tasks import load_task

PER_PHOTO: dict[str, Any] = {
    "name": "clinic",
    "diagnoses": [{"name": "MEL", "words": ["melanoma", "1"]}, {"name": "NV", "words": ["mole", "2"]}],
    "views": [{"name": "clinical", "words": ["close-up"]}, {"name": "dermoscopic", "words": ["dermatoscope"]}],
    "concepts": {"prefix": "s_"},
    "fields": [
        {"name": "age", "column": "Age", "kind": "number", "high": 120},
        {
            "name": "sex",
            "column": "sex",
            "kind": "category",
            "categories": ["female", "male"],
            "synonyms": {"w": "female"},
        },
    ],
    "columns": {"image": "photo", "lesion_id": "lesion", "view": "kind", "diagnosis": "dx", "group": "patient"},
}


def rows_of_photos() -> list[dict[str, Any]]:
    rows = []
    for at in range(4):
        for kind in ("close-up", "dermatoscope"):
            rows.append(
                {
                    "lesion": f"L{at}",
                    "photo": f"p{at}{kind[0]}",
                    "kind": kind,
                    "patient": f"P{at // 2}",
                    "AGE": ["85+", "40", "2,5", "unknown"][at],
                    "sex": ["W", "male", "M A L E", "#N/A"][at].replace(" ", ""),
                    "dx": ["melanoma", "NV", "2.0", ""][at],
                    "s_b": at / 4,
                    "s_A": 0.5 if kind == "close-up" else "",
                }
            )
    return rows


def write(folder: Path, rows: list[dict[str, Any]], photos: list[str] | None = None, name: str = "table.csv") -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    for path in photos if photos is not None else [f"a/b/{row['photo']}.JPG" for row in rows]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    return folder


def task_of(**keys: Any) -> Task:
    return Task.from_mapping({**PER_PHOTO, **keys}, "task.yaml")


def labels(dataset: Dataset) -> list[int]:
    return [lesion.label for lesion in dataset.lesions]


def test_table_with_a_row_per_photo_in_any_order(tmp_path: Path) -> None:
    rows = rows_of_photos()
    dataset = read_lesions(write(tmp_path, rows), task_of())
    assert dataset.concepts == ("clinical/A", "clinical/b", "dermoscopic/A", "dermoscopic/b")
    assert labels(dataset) == [0, 1, 1, UNLABELED] and dataset.labeled
    assert [lesion.group for lesion in dataset.lesions] == ["P0", "P0", "P1", "P1"]
    first = dataset.lesions[0]
    assert first.metadata == (85.0, 0.0) and dataset.lesions[2].metadata == (2.5, 1.0)
    assert all(map(math.isnan, dataset.lesions[3].metadata))
    assert first.concepts[:2] == (0.5, 0.0) and math.isnan(first.concepts[2])
    assert first.images == {
        "clinical": str(tmp_path / "a" / "b" / "p0c.JPG"),
        "dermoscopic": str(tmp_path / "a" / "b" / "p0d.JPG"),
    }
    shuffled = [dict(random.Random(0).sample(list(row.items()), len(row))) for row in rows]
    random.Random(1).shuffle(shuffled)
    again = read_lesions(write(tmp_path, shuffled), task_of())
    assert repr(sorted(again.lesions, key=lambda each: each.lesion_id)) == repr([*dataset.lesions])


def test_lesions_with_the_same_age_keep_their_own_other_values(tmp_path: Path) -> None:
    rows = [{**row, "AGE": "40", "sex": "W" if row["lesion"] == "L0" else "male"} for row in rows_of_photos()]
    dataset = read_lesions(write(tmp_path, rows), task_of())
    assert [lesion.metadata for lesion in dataset.lesions] == [(40.0, 0.0), *[(40.0, 1.0)] * 3]


def test_value_in_one_row_holds_for_the_lesion(tmp_path: Path) -> None:
    rows = rows_of_photos()
    for row in rows[1::2]:
        row.update(AGE="", sex="", dx="", patient="")
    dataset = read_lesions(write(tmp_path, rows), task_of())
    assert labels(dataset)[:3] == [0, 1, 1] and dataset.lesions[1].metadata == (40.0, 1.0)
    assert dataset.lesions[3].group == "P1"


def test_table_with_a_row_per_lesion_and_paths(tmp_path: Path) -> None:
    rows = [
        {"case_num": at, "clinic": f"x/{at}.jpg", "derm": f"y\\{at}.jpg", "diagnosis": word, "pigment_network": network}
        for at, (word, network) in enumerate([("clark nevus", "atypical"), ("melanoma (in situ)", "absent")])
    ]
    task = load_task("derm7pt")
    for row in rows:
        row |= {name: "absent" for name in task.concepts.names if name not in row}
        row |= {"sex": "male", "elevation": "flat", "location": "back"}
    photos = [f"images/{folder}/{at}.jpg" for folder in "xy" for at in range(2)]
    (tmp_path / "meta").mkdir()
    write(tmp_path, rows, photos, "meta/meta.csv")
    dataset = read_lesions(tmp_path, task)
    assert dataset.concepts == task.concepts.names and dataset.lesions[0].concepts == (1.0, *[0.0] * 6)
    assert [task.diagnosis_names[label] for label in labels(dataset)] == ["NEV", "MEL"]
    assert dataset.lesions[1].images["dermoscopic"] == str(tmp_path / "images" / "y" / "1.jpg")
    assert [lesion.lesion_id for lesion in dataset.lesions] == ["0", "1"]


def test_task_with_close_ups_only_and_one_hot_labels(tmp_path: Path) -> None:
    rows = [{"photo": f"P_{at}.png", "ACK": int(at == 0), "NEV": "TRUE" if at else "FALSE"} for at in range(3)]
    task = Task.from_mapping(
        {
            "name": "one",
            "diagnoses": [{"name": "ACK"}, {"name": "NEV"}],
            "views": [{"name": "clinical"}],
            "columns": {"image": "photo"},
        },
        "task.yaml",
    )
    dataset = read_lesions(write(tmp_path, rows, [row["photo"] for row in rows]), task)
    assert labels(dataset) == [0, 1, 1] and dataset.concepts == () and dataset.lesions[0].metadata == ()
    assert dataset.lesions[0].images["dermoscopic"] is None and dataset.lesions[0].lesion_id == "P_0"
    for wrong in (1, 0.5, ""):
        rows[0]["NEV"] = wrong
        with pytest.raises(InvalidLesions, match="row 2: lesion P_0 needs a single 1"):
            read_lesions(write(tmp_path, rows, []), task)


def test_tolerated_gaps_are_noted(tmp_path: Path) -> None:
    rows = [{**row, "itch": "yes"} for row in rows_of_photos()]
    del rows[7]["patient"], rows[0]["patient"]
    rows = [{name: cell for name, cell in row.items() if name not in ("patient", "sex")} for row in rows[:-1]]
    write(tmp_path, rows, [*(f"{row['photo']}.jpg" for row in rows), "other.png"])
    notes = read_lesions(tmp_path, task_of(), missing_view="mark").notes
    assert "1 of 4 lesions with one photo, the other view marked missing" in notes
    assert "1 of 4 lesions without age" in notes and "1 of 4 lesions without a diagnosis" in notes
    assert "table.csv: columns that are not used: itch" in notes and "1 photos are not in table.csv" in notes
    assert "no column 'sex': sex is missing for every lesion" in notes
    assert "no column 'patient': each lesion is a group of its own" in notes


def test_similar_columns_and_ids_spelled_alike_are_noted(tmp_path: Path) -> None:
    rows = rows_of_photos()
    for row in rows:
        row["patient_id"] = row.pop("patient", "")
    notes = read_lesions(write(tmp_path, rows), task_of()).notes
    assert "no column 'patient' (is 'patient_id' meant?): each lesion is a group of its own" in notes
    rows = rows_of_photos()
    for number, row in enumerate(rows):
        row["patient"] = ("P01", "P1")[number // 2 % 2]
    notes = read_lesions(write(tmp_path, rows), task_of()).notes
    assert "patient: 1 equal another one but for case, zeros or separators, such as 'P01' and 'P1'" in notes


def test_a_category_or_diagnosis_that_no_row_has_is_noted(tmp_path: Path) -> None:
    rows = [{**row, "sex": "male", "dx": "NV"} for row in rows_of_photos()]
    notes = read_lesions(write(tmp_path, rows), task_of()).notes
    assert "sex: no row has female" in notes and "no lesion has the diagnosis MEL" in notes


def edit(row: int, **cells: Any) -> Callable[[list[dict[str, Any]]], object]:
    return lambda rows: rows[row].update(cells)


BROKEN: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "category": (
        edit(2, sex="mal"),
        "row 4: unknown sex 'mal'; did you mean 'male'? Known are female, male; correct it, list",
    ),
    "number": (edit(2, AGE="150"), "row 4: Age '150' is not a number from 0 to 120"),
    "score": (edit(2, s_b="1.5"), "row 4: s_b '1.5' is not a score from 0 to 1"),
    "diagnosis": (
        edit(2, dx="melanom"),
        "row 4: unknown dx 'melanom'; did you mean 'melanoma'? Correct it, or add it to",
    ),
    "view": (edit(2, kind="overview"), "row 4: unknown kind 'overview'; known are clinical, close-up"),
    "id": (edit(2, lesion="L.1"), "row 4: lesion 'L.1' holds a dot, a slash or an unusual space"),
    "id of a formula": (edit(2, lesion="=L1"), "row 4: lesion '=L1' begins with =, which a spreadsheet takes for"),
    "patient of a terminal": (edit(2, patient="P\x1b[0m"), "row 4: patient holds U+001B"),
    "patient of a damaged sheet": (edit(2, patient="#REF!"), "row 4: patient is an error value of a spread"),
    "photo of a terminal": (edit(2, photo="p\x07"), r"row 4: photo: 'p\x07' holds U+0007"),
    "long diagnosis": (edit(2, dx="n" * 30000), f"row 4: unknown dx '{'n' * 60}'... (30,000 characters); known"),
    "long category": (edit(2, sex="m" * 30000), f"row 4: unknown sex '{'m' * 60}'... (30,000 characters); known"),
    "thousand": (edit(2, AGE="1,000"), "row 4: Age '1,000' is not a number from 0 to 120"),
    "two of a view": (edit(3, kind="close-up"), "row 5: lesion L1 has two clinical photos, the first in row 4"),
    "photo twice": (edit(3, photo="p1c"), "row 5: photo p1c occurs twice, first in row 4"),
    "no photo": (edit(3, photo="p9"), "row 5: photo: no photo p9 (.jpg, .png and others) below"),
    "one photo": (lambda rows: rows.pop(3), "row 4: lesion L1 has no dermoscopic photo; add it, or allow"),
    "ages differ": (edit(3, AGE="41"), "row 5: the photos of lesion L1 differ in Age"),
    "diagnoses differ": (edit(3, dx="MEL"), "row 5: the photos of lesion L1 differ in dx"),
    "patients differ": (edit(3, patient="P9"), "row 5: the photos of lesion L1 differ in patient"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_invalid_row_is_refused_or_its_lesion_dropped(tmp_path: Path, name: str) -> None:
    rows = rows_of_photos()
    photos = [f"{row['photo']}.jpg" for row in rows]
    change, says = BROKEN[name]
    change(rows)
    write(tmp_path, rows, photos)
    with pytest.raises(InvalidLesions) as error:
        read_lesions(tmp_path, task_of())
    assert says in str(error.value) and "\n" not in str(error.value)
    dropped = read_lesions(tmp_path, task_of(), invalid="drop")
    assert "L1" not in {lesion.lesion_id for lesion in dropped.lesions} and len(dropped.lesions) == 3


def test_photo_name_that_several_files_have(tmp_path: Path) -> None:
    rows = rows_of_photos()
    write(tmp_path, rows, [f"{row['photo']}.jpg" for row in rows] + ["old/p0c.png"])
    assert read_lesions(tmp_path, task_of()).lesions[0].images["clinical"] == str(tmp_path / "p0c.jpg")
    for path, content in ((tmp_path / "p0c.jpg", b"one"), (tmp_path / "old" / "p0c.png", b"two")):
        path.write_bytes(content)
        os.utime(path, (0, 0))
    with pytest.raises(InvalidLesions, match=r"several photos are named p0c: .*p0c.jpg and .*old/p0c.png"):
        read_lesions(tmp_path, task_of())
    rows[0]["photo"] = "old/p0c.png"
    assert read_lesions(write(tmp_path, rows, []), task_of()).lesions[0].images["clinical"] == str(
        tmp_path / "old/p0c.png"
    )


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ((("a", "b"), ("c", "a")), "row 3: photo a occurs twice, first in row 2; remove one"),
        ((("a", "b"), ("c", "c.jpg")), "row 3: photo c.jpg occurs twice, in near and derm; remove one"),
        ((("u/a", "b"), ("u/b", "u/a")), "row 3: photo https://h.org/a occurs twice, first in row 2; remove one"),
        ((("u/a", "b"), ("u/b", "c")), None),
    ],
)
def test_photo_is_in_one_row_and_column(tmp_path: Path, cells: list[tuple[str, str]], says: str | None) -> None:
    rows = [
        {"near": clinical.replace("u/", "https://h.org/"), "derm": other.replace("u/", "https://h.org/"), "dx": "NV"}
        for clinical, other in cells
    ]
    write(tmp_path, rows, ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    task = task_of(columns={"image": {"clinical": "near", "dermoscopic": "derm"}, "diagnosis": "dx"})
    if says:
        with pytest.raises(InvalidLesions) as error:
            read_lesions(tmp_path, task)
        assert says in str(error.value)
    dataset = read_lesions(tmp_path, task, invalid="drop")
    unused = 4 - len({cell.removesuffix(".jpg") for row in cells for cell in row if "/" not in cell})
    assert len(dataset.lesions) == (1 if says else 2) and f"{unused} photos are not in table.csv" in dataset.notes


def test_words_of_concepts_are_read_in_any_case(tmp_path: Path) -> None:
    rows = [{**row, "s_b": ("PRESENT", "absent")[row["lesion"] == "L1"]} for row in rows_of_photos()]
    task = task_of(concepts={"names": ["s_b"], "words": {"Absent": 0, "present": 1}})
    assert [lesion.concepts[0] for lesion in read_lesions(write(tmp_path, rows), task).lesions] == [1, 0, 1, 1]


def test_two_spellings_of_a_column_in_a_task(tmp_path: Path) -> None:
    rows = rows_of_photos()
    task = task_of(columns={**PER_PHOTO["columns"], "group": "LESION"})
    assert [lesion.group for lesion in read_lesions(write(tmp_path, rows), task).lesions] == ["L0", "L1", "L2", "L3"]


def test_diagnosis_may_be_one_of_the_words_that_mean_a_missing_value(tmp_path: Path) -> None:
    rows = [{**row, "dx": row["dx"].replace("NV", "unk")} for row in rows_of_photos()]
    task = task_of(diagnoses=[*PER_PHOTO["diagnoses"], {"name": "UNK"}])
    assert labels(read_lesions(write(tmp_path, rows), task)) == [0, 2, 1, UNLABELED]


@pytest.mark.parametrize("missing_view", ["refuse", "mark"])
def test_photo_in_another_format_is_refused_by_name(tmp_path: Path, missing_view: Literal["refuse", "mark"]) -> None:
    rows = rows_of_photos()
    write(tmp_path, rows, [*(f"{row['photo']}.jpg" for row in rows[1:]), f"{rows[0]['photo']}.dcm"])
    with pytest.raises(InvalidLesions, match=r"row 2: photo: no photo p0c, but \S+/p0c.dcm, .*; convert it"):
        read_lesions(tmp_path, task_of(), missing_view)


def test_photo_names_with_accents_are_found_in_either_spelling(tmp_path: Path) -> None:
    rows = rows_of_photos()
    rows[0]["photo"] = unicodedata.normalize("NFC", "nävus")
    write(
        tmp_path, rows, [*(f"{row['photo']}.jpg" for row in rows[1:]), unicodedata.normalize("NFD", "nävus") + ".jpg"]
    )
    assert len(read_lesions(tmp_path, task_of()).lesions) == 4


def test_missing_photo_can_be_marked(tmp_path: Path) -> None:
    rows = rows_of_photos()
    write(tmp_path, rows, [f"{row['photo']}.jpg" for row in rows[1:]])
    with pytest.raises(InvalidLesions, match=r"row 2: photo: no photo p0c \(.jpg, .png and others\) below"):
        read_lesions(tmp_path, task_of())
    dataset = read_lesions(tmp_path, task_of(), missing_view="mark")
    assert dataset.lesions[0].images["clinical"] is None and len(dataset.lesions) == 4
    assert "1 of 4 lesions with one photo, the other view marked missing" in dataset.notes


def test_several_photos_of_a_lesion_in_one_view(tmp_path: Path) -> None:
    rows = [row for row in rows_of_photos() if row["kind"] == "close-up"]
    rows[1]["lesion"] = "L0"
    columns = {**PER_PHOTO["columns"]}
    del columns["view"]
    task = task_of(views=[{"name": "clinical"}], columns=columns)
    with pytest.raises(InvalidLesions, match=r"lesion L0 occurs twice, .*columns: \{lesion_id: null, group: lesion\}"):
        read_lesions(write(tmp_path, rows), task)
    task = task_of(views=[{"name": "clinical"}], columns={"image": "photo", "diagnosis": "dx", "group": "lesion"})
    dataset = read_lesions(tmp_path, task)
    assert [lesion.group for lesion in dataset.lesions] == ["L0", "L0", "L2", "L3"]


def test_table_is_chosen_by_its_columns(tmp_path: Path) -> None:
    write(tmp_path, [{"x": 1}], [])
    with pytest.raises(DataError, match=r"column 'photo' is missing from the header; name it by columns.image"):
        read_lesions(tmp_path, task_of())
    write(tmp_path, [{"x": 1}], [], "other.csv")
    with pytest.raises(DataError, match=r"none of other.csv, table.csv has a column 'photo'"):
        read_lesions(tmp_path, task_of())
    write(tmp_path, rows_of_photos())
    assert len(read_lesions(tmp_path, task_of()).lesions) == 4
    write(tmp_path, rows_of_photos(), [], "third.csv")
    with pytest.raises(DataError, match=r"table.csv and third.csv have the columns of photos; give the one to read"):
        read_lesions(tmp_path, task_of())
    assert len(read_lesions(tmp_path / "third.csv", task_of()).lesions) == 4
    with pytest.raises(DataError, match="no such folder"):
        read_lesions(tmp_path / "none", task_of())


HAM = ROOT.parent / "shared" / "ham10000"


@pytest.mark.skipif(not HAM.is_dir(), reason="the HAM10000 photos are not on this machine")
def test_ham10000_is_read_by_the_shipped_task() -> None:
    dataset = read_lesions(HAM, load_task("ham10000"))
    assert len(dataset.lesions) == 3028 and not dataset.problems
    assert [labels(dataset).count(at) for at in range(7)] == [146, 211, 466, 48, 393, 1700, 64]


def test_labels_alone_are_read_without_photos(tmp_path: Path) -> None:
    task = Task.from_mapping(PER_PHOTO, "task.yaml")
    path = tmp_path / "truth.csv"
    path.write_text("LESION;dx\nL1;melanoma\nL1;MEL\nL2;2\nL3;\n")
    assert read_labels(path, task) == {"L1": 0, "L2": 1, "L3": UNLABELED}
    for text, message in (
        ("lesion,dx\nL1,melanoma\nL1,mole\n", "row 3: lesion L1 has another diagnosis than in an earlier row"),
        ("lesion,dx\nL1,melanom\n", "row 2: unknown dx 'melanom'; did you mean 'melanoma'"),
        ("id,dx\nL1,melanoma\n", "column 'lesion' is missing"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_labels(path, task)
