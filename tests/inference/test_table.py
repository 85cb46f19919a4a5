"""The lesions to predict, read from tables, folders of photos and single photos."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.conftest import draw_photo, write_table
from triderm_dist.data.problems import InvalidLesions
from triderm_dist.data.readers.milk10k import CONCEPTS, read_challenge
from triderm_dist.data.readers.table import read_table
from triderm_dist.inference.inputs import read_input
from triderm_dist.inference.photo_names import lesion_of
from triderm_dist.inference.table import read_lesions, table_of_frame
from triderm_dist.schema import VIEWS, ConfigError, DataError, Task
from triderm_dist.tasks import load_task, milk10k_task

MILK10K, DERM7PT = milk10k_task(), load_task("derm7pt")


@dataclass(frozen=True)
class Trained:
    task: Task = MILK10K
    concepts: tuple[str, ...] = CONCEPTS
    canvas: tuple[int, int] = (48, 36)
    short_side: int | None = None


def draw(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_photo(seed).save(path)
    return path


def rows_of(lesions) -> list[tuple]:
    """Return (id, photos by view, scores, metadata) of each lesion; a missing value is 7."""
    photos = [{view: own and str(own) for view, own in zip(VIEWS, each, strict=True)} for each in zip(
        *(lesions.photos[view] for view in VIEWS), strict=True)]  # fmt: skip
    arrays = [np.nan_to_num(array, nan=7).tolist() for array in (lesions.concept_scores, lesions.metadata)]
    return list(zip(lesions.lesion_ids.tolist(), photos, *arrays, strict=True))


def test_a_challenge_folder_is_read_as_for_packing(make_challenge):
    challenge = make_challenge(lesions=12)
    challenge.photo(4).unlink()
    challenge.metadata.pop(4)
    challenge.write()
    expected = read_challenge(challenge.folder, missing_view="mark")
    for given in (challenge.folder, challenge.metadata_path):
        found = read_input([given], Trained())
        assert found.notes[0] == "1 of 12 lesions with one photo; the other view is missing"
        assert not found.problems and len(found.notes) == 1
        for row, lesion in zip(rows_of(found.lesions), expected.lesions, strict=True):
            assert row[0] == lesion.lesion_id and row[1] == lesion.images
            for values, own in zip(row[2:], (lesion.concepts, lesion.metadata), strict=True):
                assert np.allclose(values, np.nan_to_num(own, nan=7))


def test_columns_of_paths_and_missing_columns(tmp_path):
    table = tmp_path / "lesions.csv"
    rows = [
        {"Clinical": "a/1.jpg", "dermoscopic": "b/1.jpg", "Age": 61, "patient_id": "P1", "phone": 1, "camera": "X"},
        {"Clinical": "", "dermoscopic": str(tmp_path / "b/2.jpg"), "Age": "", "patient_id": "P2", "phone": 2,
         "camera": "Y"},
    ]  # fmt: skip
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg"):
        draw(tmp_path / name)
    write_table(table, rows)
    found = read_input([table], Trained())
    assert found.lesions.lesion_ids.tolist() == ["1", "2"]
    assert found.lesions.photos["clinical"] == [f"{tmp_path}/a/1.jpg", None]
    assert found.lesions.photos["dermoscopic"] == [f"{tmp_path}/b/1.jpg", f"{tmp_path}/b/2.jpg"]
    assert np.array_equal(found.lesions.metadata[:, 0], [61, np.nan], equal_nan=True)
    assert np.isnan(found.lesions.metadata[:, 1:]).all() and np.isnan(found.lesions.concept_scores).all()
    assert found.notes == (
        "1 of 2 lesions with one photo; the other view is missing",
        "lesions.csv: no column for sex, skin tone, site, concept scores: missing for every lesion",
        "lesions.csv: columns that are not used: phone, camera",
    )
    elsewhere = tmp_path / "tables" / "lesions.csv"
    write_table(elsewhere, [{**rows[0], "lesion_id": "no. 7/left"}])
    found = read_input([elsewhere], Trained(), photos=tmp_path)
    assert found.lesions.lesion_ids.tolist() == ["no. 7/left"]
    assert found.lesions.photos["clinical"] == [f"{tmp_path}/a/1.jpg"]


def test_task_with_own_columns_and_words(tmp_path):
    image = DERM7PT.columns.image
    draw(tmp_path / "images" / "A 1.jpg"), draw(tmp_path / "images" / "A 2.jpg")
    trained = Trained(DERM7PT, DERM7PT.concept_names)
    write_table(
        tmp_path / "meta.csv",
        [{image["clinical"]: "A 1", image["dermoscopic"]: "A 2.jpg", "streaks": "irregular", "diagnosis": "nonsense"}],
    )
    found = read_input([tmp_path], trained)
    assert found.lesions.photos == {view: [f"{tmp_path}/images/A {at}.jpg"] for at, view in enumerate(VIEWS, 1)}
    assert found.lesions.concept_scores[0, DERM7PT.concept_names.index("streaks")] == 1
    assert np.isnan(found.lesions.concept_scores).sum() == len(DERM7PT.concept_names) - 1
    (note,) = found.notes
    assert note.startswith("meta.csv: no column for sex, elevation, site, pigment_network, ")


@pytest.mark.parametrize("kind", ["xlsx", "frame"])
def test_workbook_and_frame(tmp_path, kind):
    draw(tmp_path / "1.jpg")
    frame = pd.DataFrame({"dermoscopic": ["1.jpg"], "age": [50.0], "sex": [None], "site": ["hand"]})
    if kind == "xlsx":
        frame.to_excel(tmp_path / "lesions.xlsx", index=False)
        table = read_table(tmp_path / "lesions.xlsx")
    else:
        table = table_of_frame(frame)
    lesions = read_lesions(table, [tmp_path], Trained()).lesions
    assert lesions.photos["dermoscopic"] == [f"{tmp_path}/1.jpg"]
    assert np.array_equal(lesions.metadata, [[50, np.nan, np.nan, 4]], equal_nan=True)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("X.clinical.jpg", ("X", "clinical")),
        ("X_Dermoscopic.JPG", ("X", "dermoscopic")),
        ("X-dermoscopy.png", ("X", "dermoscopic")),
        ("a.b.clinical.jpg", ("a.b", "clinical")),
        ("dermoscopic/X.jpg", ("X", "dermoscopic")),
        ("P1/Clinical/X.jpg", ("P1/X", "clinical")),
        ("P1/X/close-up.jpg", ("P1/X", "clinical")),
        ("P1/X.clinical.jpg", ("P1/X", "clinical")),
        ("P1/X.jpg", ("P1/X", None)),
        ("Xclinical.jpg", ("Xclinical", None)),
    ],
)
def test_lesion_and_view_by_the_name_of_a_photo(path, expected):
    assert lesion_of(Path("in", path), Path(path).parent, milk10k_task()) == expected


def test_folder_of_photos(tmp_path):
    for name in ("L2.clinical.jpg", "L2.dermoscopic.png", "L1.clinical.jpg", "sub/L1.dermoscopic.jpeg"):
        draw(tmp_path / name)
    (tmp_path / "L3.clinical.dcm").write_bytes(b"")
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    found = read_input([tmp_path], Trained())
    assert [row[:2] for row in rows_of(found.lesions)] == [
        ("L1", {"clinical": f"{tmp_path}/L1.clinical.jpg", "dermoscopic": None}),
        ("L2", {"clinical": f"{tmp_path}/L2.clinical.jpg", "dermoscopic": f"{tmp_path}/L2.dermoscopic.png"}),
        ("sub/L1", {"clinical": None, "dermoscopic": f"{tmp_path}/sub/L1.dermoscopic.jpeg"}),
    ]
    assert found.notes == (
        "2 of 3 lesions with one photo; the other view is missing",
        "photos alone: age, sex, skin tone, site, concept scores are missing for every lesion",
        "1 file is not read, since it is no photo (JPEG, PNG, WebP, TIFF, BMP, GIF, HEIC or AVIF): L3.clinical.dcm",
    )


def test_view_of_a_single_photo_is_in_its_name_or_given(tmp_path):
    one, other = draw(tmp_path / "a.jpg"), draw(tmp_path / "b.clinical.jpg")
    with pytest.raises(DataError, match=r"a.jpg: its name does not state the view; name it a.clinical.jpg, or write"):
        read_input([one], Trained())
    found = read_input([one, other], Trained(), view="dermoscopic").lesions
    assert found.lesion_ids.tolist() == ["a", "b"]
    assert found.view_present.tolist() == [[False, True], [True, False]]
    ham = load_task("ham10000")
    found = read_input([one], Trained(ham, ())).lesions
    assert found.photos == {ham.view_names[0]: [one]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"age": "old"}, "row 3: age 'old' is not a number from 0 to 120 years"),
        ({"site": "hnd"}, "row 3: unknown site 'hnd'; did you mean 'hand'?"),
        ({"lesion_id": "L0"}, "row 3: lesion L0 occurs twice, first in row 2; keep one"),
        ({"dermoscopic": "2.jpg"}, "row 3: no photo 2 (.jpg, .png and others) below "),
        ({"dermoscopic": ""}, "row 3: lesion L1 has no photo; add one or remove its rows"),
        ({"lesion_id": ""}, "row 3: lesion_id is empty; every lesion needs its own"),
        ({"lesion_id": "=1+1"}, "row 3: the lesion id '=1+1' begins with =, which a spreadsheet takes for a formula"),
        ({"lesion_id": "1E+05"}, "row 3: the lesion id '1E+05' is a number that a spreadsheet has shortened; format"),
        ({"lesion_id": "a\u202eb"}, "row 3: the lesion id 'a\\u202eb' holds U+202E"),
    ],
)
def test_invalid_row_is_named_or_left_out(tmp_path, row, message):
    draw(tmp_path / "1.jpg")
    rows = [{"lesion_id": f"L{at}", "dermoscopic": "1.jpg", "age": 50, "site": "hand"} for at in range(3)]
    rows[1] |= row
    write_table(tmp_path / "lesions.csv", rows)
    with pytest.raises(InvalidLesions) as error:
        read_input([tmp_path / "lesions.csv"], Trained())
    assert f"{tmp_path}/lesions.csv, {message}" in str(error.value)
    assert "invalid=drop" in str(error.value)
    found = read_input([tmp_path / "lesions.csv"], Trained(), invalid="drop")
    assert found.lesions.lesion_ids.tolist() == [name for name in ("L0", "L2") if row.get("lesion_id") != name]
    assert len(found.problems) == 1


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    write_table(tmp_path / "lesions.csv", [{"name": "1.jpg"}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt.gz").write_bytes(b"")
    draw(tmp_path / "twice" / "1.clinical.jpg"), draw(tmp_path / "twice" / "1_clinical.jpg")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "index.json").write_text("{}")
    for name, message in {
        "nothing": "nothing: no such file or folder",
        "lesions.csv": "lesions.csv: no column names the photos; add one per view (clinical, dermoscopic, or the task's"
        " isic_id) with their paths",
        "empty": "empty: no photo (JPEG, PNG, WebP, TIFF, BMP, GIF, HEIC or AVIF) in or below this folder",
        "a.txt.gz": "a.txt.gz: neither a folder, a table nor a photo",
        "twice": "1_clinical.jpg: lesion 1 has two clinical photos, the other is ",
        "packed": "packed: is a packed set; predict it by data.test_shards=",
    }.items():
        with pytest.raises(DataError) as error:
            read_input([tmp_path / name], Trained())
        assert message in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "\udcff.clinical.jpg").write_bytes(b"")  # a file name that is not in UTF-8
    with pytest.raises(DataError, match=r"\\udcff.clinical.jpg: the name of the lesion holds U\+DCFF .*; rename it"):
        read_input([tmp_path / "\udcff.clinical.jpg"], Trained())
    photo = tmp_path / "twice" / "1.clinical.jpg"
    for path, options in (
        (photo, {"photos": tmp_path}),
        (tmp_path / "twice", {"photos": tmp_path}),
        (tmp_path / "lesions.csv", {"view": "clinical"}),
    ):
        with pytest.raises(ConfigError, match=f"^{next(iter(options))}=.*: has no effect on .*; remove it"):
            read_input([path], Trained(), **options)
    with pytest.raises(DataError, match="view=front: known are clinical, dermoscopic"):
        read_input([tmp_path / "empty"], Trained(), view="front")


def test_rows_of_one_lesion_must_agree(make_challenge):
    challenge = make_challenge(lesions=2, prefix="MILK10k_Test", labeled=False)
    challenge.metadata[1]["site"] = ""
    challenge.metadata[3]["site"] = "genital"
    found = read_input([challenge.write().folder], Trained(), invalid="drop")
    assert found.lesions.lesion_ids.tolist() == ["IL_1000"]
    assert found.lesions.metadata[0, 3] == 0
    (problem,) = found.problems
    assert problem.what == "the photos of lesion IL_1007 differ in site; all rows need the same"


def test_reader_of_a_plugin_is_used(make_challenge, monkeypatch):
    from triderm_dist.data.readers import source

    challenge = make_challenge(lesions=3)
    monkeypatch.setitem(source.READERS, "mine", source.READERS["milk10k"])
    task = replace(milk10k_task(), reader="mine")
    found = read_input([challenge.folder], Trained(task, CONCEPTS[::-1])).lesions
    expected = read_challenge(challenge.folder).lesions
    assert found.lesion_ids.tolist() == [each.lesion_id for each in expected]
    assert np.allclose(found.concept_scores[:, ::-1], [each.concepts for each in expected])
