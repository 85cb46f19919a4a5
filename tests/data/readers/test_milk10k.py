"""The MILK10k reader accepts every published layout, and refuses broken tables with file and row."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Challenge, write_table
from tests.processes import ROOT
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.milk10k import CONCEPTS, read_challenge
from triderm_dist.data.readers.milk10k.labels import read_finer_labels
from triderm_dist.schema import DIAGNOSES, UNLABELED, DataError, FineLabels
from triderm_dist.tasks import milk10k_task

Make = Callable[..., Challenge]


def content(dataset: Dataset) -> str:
    """Return all content except photo folders, as text, since NaN is not equal to itself."""
    return repr(
        [
            (
                (lesion.lesion_id, lesion.concepts, lesion.metadata, lesion.label, lesion.group),
                [Path(path).name for path in lesion.images.values() if path],
            )
            for lesion in dataset.lesions
        ]
    )


def test_official_layout_is_read(make_challenge: Make) -> None:
    challenge = make_challenge()
    dataset = read_challenge(challenge.folder)
    assert dataset.concepts == CONCEPTS
    assert dataset.labeled
    assert [lesion.label for lesion in dataset.lesions] == [i % 11 for i in range(22)]
    lesion, (clinical, dermoscopic) = dataset.lesions[3], challenge.metadata[6:8]
    assert lesion.lesion_id == lesion.group == clinical["lesion_id"]
    assert lesion.images == {"clinical": str(challenge.photo(6)), "dermoscopic": str(challenge.photo(7))}
    monet = [name for name in clinical if name.startswith("MONET_")]
    assert lesion.concepts == tuple([clinical[name] for name in monet] + [dermoscopic[name] for name in monet])
    assert lesion.metadata == (20.0, 0.0, 3.0, milk10k_task().fields[3].parse("upper_extremity"))
    assert math.isnan(dataset.lesions[4].metadata[0]) and math.isnan(dataset.lesions[6].metadata[3])
    assert dataset.notes == ["2 of 22 lesions without age", "2 of 22 lesions without site"]


def archive_layout(challenge: Challenge, nested: str) -> None:
    """Layout of the ISIC Archive's zip: flat photos, tables under supplements/, metadata.csv without scores."""
    images = challenge.folder / "images"
    images.mkdir()
    for row in range(len(challenge.metadata)):
        challenge.photo(row).rename(images / challenge.photo(row).name)
    shutil.rmtree(challenge.folder / f"{challenge.prefix}_Input")
    supplements = challenge.folder / nested
    supplements.mkdir(exist_ok=True)
    challenge.metadata_path.rename(supplements / "training_input.csv")
    challenge.truth_path.rename(supplements / "training_gt.csv")
    write_table(
        challenge.folder / "metadata.csv", [{"isic_id": r["isic_id"], "sex": r["sex"]} for r in challenge.metadata]
    )
    write_table(supplements / "training_supp.csv", [{"isic_id": "ISIC_1", "diagnosis_full": "x"}])


def nested_twice(challenge: Challenge) -> None:
    outer = challenge.folder / f"{challenge.prefix}_Input"
    outer.rename(challenge.folder / "inner")
    outer.mkdir()
    (challenge.folder / "inner").rename(outer / outer.name)


def plain_metadata(challenge: Challenge) -> None:
    archive_layout(challenge, ".")
    (challenge.folder / "training_input.csv").replace(challenge.folder / "metadata.csv")


def windows_tables(challenge: Challenge) -> None:
    write_table(challenge.metadata_path, challenge.metadata, newline="\r\n", encoding="utf-8-sig")
    write_table(challenge.truth_path, challenge.truth, newline="\r\n", encoding="utf-8-sig")


def floats_and_capitals(challenge: Challenge) -> None:
    for row in challenge.metadata:
        row.update(sex=str(row["sex"]).upper(), skin_tone_class=f"{row['skin_tone_class']}.0")
        row["site"] = row["site"] or "NaN"
    challenge.write()


def excel_tables(challenge: Challenge) -> None:
    """Semicolons, decimal commas, UTF-16, capitals, blank rows and columns, synonyms; a lock file and a copy."""
    scores = [name for name in challenge.metadata[0] if name.startswith("MONET_")]
    for row in challenge.metadata:
        row.update({name: str(row[name]).replace(".", ",") for name in scores}, sex=str(row["sex"])[0].upper())
        row.update(site=row["site"] or "#N/A", age_approx=row["age_approx"] or "unknown")
    rows = [list(map(str.upper, challenge.metadata[0])), *(list(row.values()) for row in challenge.metadata)]
    rows = [[*map(str, row), "", ""] for row in rows]
    rows[3:3] = [[""] * len(rows[0])]
    text = "sep=;\r\n" + "".join(";".join(row) + "\r\n" for row in rows)
    challenge.metadata_path.write_text(text, encoding="utf-16", newline="")
    truth = [
        [{"1.0": "TRUE", "0.0": "FALSE"}.get(str(cell), str(cell)) for cell in row.values()] for row in challenge.truth
    ]
    lines = ["\t".join(row) for row in [list(challenge.truth[0]), *truth]]
    challenge.truth_path.write_text("\n".join(lines), encoding="utf-8-sig")
    for name in (f"~${challenge.metadata_path.name}", f"Copy of {challenge.metadata_path.name}"):
        challenge.metadata_path.with_name(name).write_text("x")


def excel_workbook(challenge: Challenge) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="reads .xlsx: pip install 'triderm-dist[excel]'")
    book = openpyxl.Workbook()
    book.create_sheet("empty")
    book.active.append(list(challenge.metadata[0]))
    for row in challenge.metadata:
        book.active.append(list(row.values()))
    book.save(challenge.metadata_path.with_suffix(".xlsx"))
    challenge.metadata_path.unlink()


def reversed_columns(challenge: Challenge) -> None:
    challenge.metadata = [dict(reversed(row.items())) for row in challenge.metadata]
    challenge.truth = [dict(reversed(row.items())) for row in challenge.truth]
    challenge.write()


def macos_leftovers(challenge: Challenge) -> None:
    """Files of zips from macOS: `._` companions of the photos, and a __MACOSX folder."""
    for row in range(len(challenge.metadata)):
        path = challenge.photo(row)
        (path.parent / f"._{path.name}").write_bytes(b"junk")
    junk = challenge.folder / f"{challenge.prefix}_Input" / "__MACOSX"
    junk.mkdir()
    (junk / challenge.photo(0).name).write_bytes(b"junk")


@pytest.mark.parametrize(
    "change",
    [
        lambda challenge: archive_layout(challenge, "supplements"),
        lambda challenge: archive_layout(challenge, "."),
        nested_twice,
        plain_metadata,
        windows_tables,
        floats_and_capitals,
        macos_leftovers,
        excel_tables,
        excel_workbook,
        reversed_columns,
        lambda challenge: challenge.folder.joinpath("old").mkdir(),
    ],
    ids=[
        "archive",
        "archive-flat",
        "nested",
        "metadata.csv",
        "crlf-bom",
        "floats",
        "macos",
        "excel",
        "xlsx",
        "reversed",
        "empty-subfolder",
    ],
)
def test_all_layouts_give_the_same_lesions(make_challenge: Make, change: Callable[[Challenge], Any]) -> None:
    challenge = make_challenge()
    expected = read_challenge(challenge.folder)
    change(challenge)
    dataset = read_challenge(challenge.folder)
    assert content(dataset) == content(expected)
    assert dataset.labeled and dataset.concepts == expected.concepts and dataset.notes == expected.notes
    assert all(path and Path(path).is_file() for lesion in dataset.lesions for path in lesion.images.values())


def test_test_folder_has_no_labels(make_challenge: Make) -> None:
    dataset = read_challenge(make_challenge(prefix="MILK10k_Test", labeled=False).folder)
    assert not dataset.labeled
    assert {lesion.label for lesion in dataset.lesions} == {UNLABELED}


def test_partly_labeled_set_is_read(make_challenge: Make) -> None:
    challenge = make_challenge()
    challenge.truth[2].update(dict.fromkeys(DIAGNOSES, ""))
    del challenge.truth[5]
    dataset = read_challenge(challenge.write().folder)
    assert [i for i, lesion in enumerate(dataset.lesions) if lesion.label == UNLABELED] == [2, 5]
    assert "2 of 22 lesions without a diagnosis" in dataset.notes


def test_training_and_test_files_in_one_folder(make_challenge: Make) -> None:
    training = make_challenge(lesions=4)
    test = make_challenge(lesions=3, prefix="MILK10k_Test", labeled=False)
    with pytest.raises(DataError, match="give the one to read"):
        read_challenge(test.folder)
    assert len(read_challenge(training.metadata_path).lesions) == 4
    dataset = read_challenge(test.metadata_path)
    assert len(dataset.lesions) == 3 and not dataset.labeled
    assert not any("not used" in note for note in dataset.notes)


def test_concept_scores_are_read_from_the_table(make_challenge: Make) -> None:
    challenge = make_challenge()
    for row in challenge.metadata:
        del row["MONET_hair"]
        row["MONET_scale"] = 0.25
    challenge.metadata[0]["MONET_scale"] = ""
    dataset = read_challenge(challenge.write().folder)
    assert len(dataset.concepts) == 14
    assert "clinical/hair" not in dataset.concepts
    column = dataset.concepts.index("clinical/scale")
    assert math.isnan(dataset.lesions[0].concepts[column]) and dataset.lesions[1].concepts[column] == 0.25


def test_finer_label_on_which_the_photos_of_a_lesion_agree(make_challenge: Make) -> None:
    """Lesions 0 to 3 are equal in both photos, different, of one photo, and without any."""
    challenge = make_challenge()
    fine = FineLabels("diagnosis_full", {DIAGNOSES[label]: (f"{label} a", f"{label} b") for label in range(11)})
    words = {0: "0 b", 1: "0 b", 2: "1 a", 3: "1 b", 5: "2 a"}
    rows = [{"isic_id": challenge.metadata[row]["isic_id"], fine.column: word} for row, word in words.items()]
    write_table(challenge.folder / f"{challenge.prefix}_Supplement.csv", rows)
    lesions = read_challenge(challenge.folder, replace(milk10k_task(), fine=fine)).lesions
    expected = [fine.label_of("0 b"), UNLABELED, fine.label_of("2 a"), UNLABELED]
    assert [lesion.fine for lesion in lesions[:4]] == expected


def test_patients_are_groups(make_challenge: Make) -> None:
    challenge = make_challenge()
    for i, row in enumerate(challenge.metadata):
        row["patient_id"] = f"P{i // 8}" if i < 16 else ""
    groups = [lesion.group for lesion in read_challenge(challenge.write().folder).lesions]
    assert groups[:8] == ["P0"] * 4 + ["P1"] * 4
    assert groups[8] == challenge.metadata[16]["lesion_id"]
    challenge.metadata[1]["patient_id"] = "P7"
    with pytest.raises(DataError, match=r"row 3: the photos of lesion IL_1000 differ in patient_id; all rows need"):
        read_challenge(challenge.write().folder)


def test_missing_view_can_be_marked(make_challenge: Make) -> None:
    challenge = make_challenge()
    del challenge.metadata[1]
    challenge.photo(4).unlink()
    with pytest.raises(DataError, match="missing_view=mark"):
        read_challenge(challenge.write().folder)
    dataset = read_challenge(challenge.folder, missing_view="mark")
    first, third = dataset.lesions[0], dataset.lesions[2]
    assert first.images["clinical"] and first.images["dermoscopic"] is None
    assert not any(map(math.isnan, first.concepts[:7])) and all(map(math.isnan, first.concepts[7:]))
    # Only the file is missing; its row has the scores.
    assert third.images["dermoscopic"] is None and not any(map(math.isnan, third.concepts))
    assert "2 of 22 lesions with one photo, the other view marked missing" in dataset.notes


@pytest.mark.parametrize("missing_view", ["refuse", "mark"])
def test_photo_in_another_format_is_refused_by_name(make_challenge: Make, missing_view: Any) -> None:
    challenge = make_challenge(lesions=3)
    challenge.photo(2).unlink()
    challenge.photo(2).with_suffix(".DCM").write_bytes(bytes(128) + b"DICM")
    what = r"row 4: isic_id: no photo ISIC_5002, but \S+/ISIC_5002.DCM, a DICOM file; convert it to JPEG, PNG, "
    with pytest.raises(DataError, match=what):
        read_challenge(challenge.folder, missing_view=missing_view)


def test_of_several_photos_of_one_name_that_of_the_lesion_is_taken(make_challenge: Make) -> None:
    challenge = make_challenge(lesions=3)
    small = challenge.folder / "MILK10k_Training_Input" / "small" / "ISIC_5002.jpg"
    small.parent.mkdir()
    small.write_bytes(b"a thumbnail")
    assert read_challenge(challenge.folder).lesions[1].images["clinical"] == str(challenge.photo(2))
    challenge.photo(2).rename(challenge.photo(0).with_name("ISIC_5002.jpg"))
    with pytest.raises(
        DataError, match=r"row 4: isic_id: several photos are named ISIC_5002: \S+ and \S+small/ISIC_5002.jpg"
    ):
        read_challenge(challenge.folder)


def test_linked_folders_are_searched_once(make_challenge: Make) -> None:
    challenge = make_challenge(lesions=3)
    photos = challenge.folder / "MILK10k_Training_Input"
    for name in ("ring", "second"):
        (photos / name).symlink_to(photos)
    assert len(read_challenge(challenge.folder).lesions) == 3


def test_labels_of_unknown_lesions_are_refused_or_dropped(make_challenge: Make) -> None:
    challenge = make_challenge()
    challenge.metadata = challenge.metadata[:-4]
    with pytest.raises(DataError, match=r"GroundTruth.csv, row 22: lesion IL_1140 is not in MILK10k_Training_Metadata"):
        read_challenge(challenge.write().folder)
    dataset = read_challenge(challenge.folder, invalid="drop")
    assert f"4 photos are not in {challenge.metadata_path.name}" in dataset.notes
    assert [problem.lesion_id for problem in dataset.problems] == ["IL_1140", "IL_1147"]


@pytest.mark.parametrize(("before", "after"), [("IL_1021", "il_1021"), ("IL_1021", "IL_001021")])
def test_closest_label_is_suggested(make_challenge: Make, before: str, after: str) -> None:
    challenge = make_challenge()
    challenge.truth[3]["lesion_id"] = after
    with pytest.raises(DataError, match=rf"row 5: lesion {after} is not in \S+; is '{before}' meant"):
        read_challenge(challenge.write().folder)


def test_unused_columns_are_reported_once(make_challenge: Make) -> None:
    challenge = make_challenge()
    for row in challenge.metadata:
        row.update(itch="yes", patient="x")
    notes = read_challenge(challenge.write().folder).notes
    assert "MILK10k_Training_Metadata.csv: columns that are not used: itch, patient" in notes


def edit(row: int, **cells: Any) -> Callable[[Challenge], None]:
    return lambda challenge: challenge.metadata[row].update(cells)


def edit_truth(row: int, **cells: Any) -> Callable[[Challenge], None]:
    return lambda challenge: challenge.truth[row].update(cells)


def without(table: str, column: str) -> Callable[[Challenge], None]:
    return lambda challenge: [row.pop(column) for row in getattr(challenge, table)] and None


BROKEN = {
    "column": (without("metadata", "site"), r"Metadata.csv: column 'site' is missing"),
    "truth column": (without("truth", "DF"), r"GroundTruth.csv: column 'DF' is missing"),
    "no scores": (
        lambda c: [r.pop(k) for r in c.metadata for k in list(r) if k.startswith("MONET_")],
        r"Metadata.csv: no column starts with MONET_",
    ),
    "one photo": (lambda c: c.metadata.pop(5), r"row 6: lesion IL_1014 has no dermoscopic photo"),
    "no photo file": (lambda c: c.photo(7).unlink(), r"row 9: isic_id: no photo ISIC_5007 \(.*missing_view"),
    "duplicate lesion": (lambda c: c.truth.append(c.truth[3]), r"row 24: lesion IL_1021 occurs twice.*row 5"),
    "duplicate rows": (
        lambda c: c.metadata.append(c.metadata[3]),
        r"row 46: photo ISIC_5003 occurs twice, first in row 5",
    ),
    "duplicate view": (edit(3, image_type="clinical: close-up"), r"row 5: lesion IL_1007 has two clinical.*row 4"),
    "duplicate photo": (edit(3, isic_id="ISIC_5000"), r"row 5: photo ISIC_5000 occurs twice.*row 2"),
    "no photo name": (edit(3, isic_id=""), r"row 5: isic_id '' is empty"),
    "image type": (edit(3, image_type="overview"), r"row 5: unknown image_type 'overview'"),
    "sex": (edit(3, sex="mal"), r"row 5: unknown sex 'mal'"),
    "site": (edit(3, site="torso"), r"row 5: unknown site 'torso'"),
    "skin tone": (edit(3, skin_tone_class=6), r"row 5: unknown skin_tone_class '6'"),
    "age": (edit(3, age_approx="old"), r"row 5: age_approx 'old'"),
    "age infinite": (edit(3, age_approx="inf"), r"row 5: age_approx 'inf'"),
    "age negative": (edit(3, age_approx=-5), r"row 5: age_approx '-5'"),
    "ages differ": (edit(3, age_approx=80), r"row 5: the photos of lesion IL_1007 differ in age_approx"),
    "score high": (edit(3, MONET_hair=1.5), r"row 5: MONET_hair '1.5'"),
    "score text": (edit(3, MONET_hair="high"), r"row 5: MONET_hair 'high'"),
    "lesion id": (edit(3, lesion_id="IL.7"), r"row 5: lesion_id 'IL.7'"),
    "diagnosis": (lambda c: [r.update(SCC=0.0) for r in c.truth], r"GroundTruth.csv: unknown diagnosis 'SCC'"),
    "two labels": (edit_truth(3, NV=1.0), r"GroundTruth.csv, row 5: lesion IL_1021 needs a single 1"),
    "no label": (edit_truth(3, BKL=0.0), r"GroundTruth.csv, row 5: lesion IL_1021 needs a single 1"),
    "label text": (edit_truth(3, BKL="yes"), r"GroundTruth.csv, row 5: lesion IL_1021 needs a single 1"),
    "label half": (edit_truth(3, BKL=0.5, NV=0.5), r"GroundTruth.csv, row 5: lesion IL_1021 needs a single 1"),
}


def test_photo_with_two_finer_labels_is_refused(make_challenge: Make) -> None:
    challenge = make_challenge()
    task = replace(milk10k_task(), fine=FineLabels("diagnosis_full", {"NV": ("Blue", "Spitz"), "MEL": ("Nodular",)}))
    photos = [row["isic_id"] for row in challenge.metadata]
    table = challenge.folder / f"{challenge.prefix}_Supplement.csv"
    rows = [{"isic_id": photos[0], "diagnosis_full": "Blue"}, {"isic_id": photos[1], "diagnosis_full": ""}]
    write_table(table, [*rows, {**rows[0], "diagnosis_full": "blue"}, rows[1]])
    assert read_finer_labels(challenge.metadata_path, task) == (
        {photos[0]: 0},
        [f"{table}: rows that repeat a photo with the same diagnosis_full: 2"],
    )
    for row, other in ((rows[0], "Spitz"), (rows[0], ""), (rows[1], "Spitz")):
        write_table(table, [*rows, {**row, "diagnosis_full": other}])
        message = f"{table}, row 4: photo {row['isic_id']} occurs twice: diagnosis_full {other!r}, and "
        with pytest.raises(DataError) as caught:
            read_challenge(challenge.folder, task)
        assert str(caught.value).startswith(message) and str(caught.value).endswith(
            f"{row['diagnosis_full']!r} in {table}, row {2 + rows.index(row)}; remove one"
        )


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tables_are_refused(make_challenge: Make, name: str) -> None:
    challenge = make_challenge()
    change, message = BROKEN[name]
    change(challenge)
    with pytest.raises(DataError, match=message) as caught:
        read_challenge(challenge.write().folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the file is empty"),
        (b"\xff\xfe\x00", "begins as UTF-16 and is cut off"),
        (b"lesion_id,lesion_id\n", "column 'lesion_id' appears twice"),
        (b"lesion,image_type,isic_id\n", "column 'lesion_id' is missing from the header; is 'lesion' meant?"),
    ],
)
def test_unreadable_tables_are_refused(make_challenge: Make, text: bytes, message: str) -> None:
    challenge = make_challenge(lesions=2)
    challenge.metadata_path.write_bytes(text)
    with pytest.raises(DataError, match=message.replace("?", r"\?")) as caught:
        read_challenge(challenge.folder)
    assert "\n" not in str(caught.value) and str(challenge.metadata_path) in str(caught.value)


def test_row_with_too_few_cells_is_refused(make_challenge: Make) -> None:
    challenge = make_challenge(lesions=2)
    lines = challenge.metadata_path.read_text().splitlines()
    challenge.metadata_path.write_text("\n".join([*lines[:3], "", lines[3].rpartition(",")[0], lines[4]]))
    with pytest.raises(DataError, match="row 5: 16 cells, the header has 17"):
        read_challenge(challenge.folder)


def test_missing_files_are_refused(make_challenge: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_challenge(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \*_Metadata.csv"):
        read_challenge(tmp_path / "empty")
    challenge = make_challenge(lesions=2)
    challenge.truth_path.unlink()
    with pytest.raises(DataError, match=r"no ground truth in its folder; put MILK10k_Training_GroundTruth.csv there"):
        read_challenge(challenge.folder)


REAL = ROOT.parent / "shared" / "milk10k_original"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real MILK10k photos are not on this machine")
def test_real_milk10k_folder() -> None:
    dataset = read_challenge(REAL)
    assert dataset.concepts == CONCEPTS and dataset.labeled
    assert len(dataset.lesions) > 300 and {lesion.label for lesion in dataset.lesions} == set(range(11))
