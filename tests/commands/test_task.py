"""`triderm task init` writes a task.yaml that works, and `triderm task check` reports the data it reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.readers.test_lesions_csv import HAM, rows_of_photos, write
from tests.data.readers.test_milk10k import Make
from triderm_dist.commands.task import main
from triderm_dist.data.readers.describe import describe_folder
from triderm_dist.data.readers.lesions_csv import read_lesions
from triderm_dist.data.synthetic import write_synthetic
from triderm_dist.schema import ConfigError, DataError, TableFormat
from triderm_dist.tasks import load_task


def clinic(folder: Path, patients: int = 30) -> Path:
    """Two photos of each lesion, with the words of `rows_of_photos`."""
    rows = []
    for patient in range(patients):
        for row in rows_of_photos()[:4]:
            extra = {"lesion": f"{row['lesion']}{patient}", "photo": f"{patient}{row['photo']}", "patient": patient}
            if patient == 1:  # else the sex tells the diagnosis
                extra["sex"] = "m"
            number = {"AGE": 20 + patient, "s_A": patient / 40, "s_b": patient / 50}
            rows.append({**row, **extra, **number, "dx_type": "x", "note": f"text {patient}", "empty": ""})
    return write(folder / "clinic", rows)


def test_init_writes_a_task_that_reads_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clinic(tmp_path)
    main(["init", str(folder)])
    text = (folder / "task.yaml").read_text()
    task = load_task(folder / "task.yaml")
    assert task.view_names == ("clinical", "dermoscopic") and task.concepts.prefix == "s_"
    assert task.columns.lesion_id == "lesion" and task.columns.view == "kind" and task.columns.group == "patient"
    assert [(each.name, each.malignant) for each in task.diagnoses] == [("MELANOMA", True), ("NV", False)]
    assert [(each.name, each.kind) for each in task.fields] == [("age", "number"), ("sex", "category")]
    assert "#   dx_type: it may follow from the diagnosis" in text and "#   empty: empty" in text
    assert len(read_lesions(folder, task).lesions) == 60
    capsys.readouterr()
    main(["check", str(folder)])
    shown = capsys.readouterr().out
    assert "60 lesions in 30 groups, the largest of 2" in shown and "photos: 60 clinical, 60 dermoscopic" in shown
    assert "columns that are not used: dx_type, note, empty" in shown
    with pytest.raises(ConfigError, match=r"task\.yaml: exists"):
        main(["init", str(folder)])


def test_init_describes_criteria_as_concepts_and_rounds_ranges_up(tmp_path: Path) -> None:
    rows = [
        {
            "photo": f"p{number}.jpg",
            "dx": ("x", "y")[number % 2],
            "streaks": ("absent", "irregular")[number % 2],
            "veil": ("Absent", "grey")[number % 2],
            "width_mm": number // 2 * 2,
            "row": number,
            "family_history": ("yes", "no")[number % 3 == 0],
            "waist": "wide" if number == 30 else number,
            "stage": ("I", "II", "early", "late")[number % 4],
            "histology": "a",
        }
        for number in range(1, 31)
    ]
    main(["init", str(write(tmp_path / "set", rows, [str(row["photo"]) for row in rows]))])
    text, task = (tmp_path / "set" / "task.yaml").read_text(), load_task(tmp_path / "set" / "task.yaml")
    assert task.concepts.names == ("streaks", "veil")
    assert task.concepts.words == {"absent": 0, "irregular": 1, "grey": 1}
    assert "    grey: 1 # CHECK" in text and "    irregular: 1\n" in text
    assert {each.name: each.high for each in task.fields if each.is_number} == {"width_mm": 50}
    assert '#   waist: numbers apart from "wide"; a field, if these are listed in missing_words' in text
    assert "#   stage: each of its words has one diagnosis only; finer labels (fine)?" in text
    assert "family_history" in [each.name for each in task.fields]
    assert "#   row: a running number; the id of the lesion (lesion_id)?" in text
    assert "# Inputs besides the photos; remove what is not known before the diagnosis.\nfields:\n" in text
    assert "#   histology: it may follow from the diagnosis" in text


def test_init_reads_german_words_and_shows_commands_as_a_shell_takes_them(tmp_path, capsys) -> None:
    rows = [
        {"Läsion": f"L{number // 2}", "Bild": f"{number}.jpg", "Art": ("Übersicht", "Auflicht")[number % 2],
         "dx": "xy"[number // 2 % 2]}
        for number in range(20)
    ]  # fmt: skip
    folder = write(tmp_path / "Häute & Mäler", rows, [row["Bild"] for row in rows])
    main(["init", str(folder)])
    assert capsys.readouterr().out.rstrip().endswith(f"triderm task check '{folder}'")
    task = load_task(folder / "task.yaml")
    assert (task.name, task.columns.view, task.columns.lesion_id) == ("haute_maler", "Art", "Läsion")
    (folder / "table.csv").write_text((folder / "table.csv").read_text().replace("Auflicht", "Foto"))
    main(["init", str(folder), f"output={tmp_path / 'own.yaml'}"])
    text = (tmp_path / "own.yaml").read_text()
    assert "CHECK: every photo is a lesion; if a column tells the views of a Läsion, name it: view=COLUMN" in text


def test_init_names_a_shipped_task_with_the_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_synthetic(tmp_path / "set", load_task("derm7pt"), 100, 50, seed=0)
    main(["init", str(tmp_path / "set" / "train")])
    shown = capsys.readouterr().out
    assert "the columns are those of derm7pt, a task that ships" in shown and "pad_ufes" not in shown


def test_check_lists_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clinic(tmp_path)
    main(["init", str(folder), f"output={tmp_path / 'own.yaml'}"])
    table = folder / "table.csv"
    table.write_text(table.read_text().replace(";W;", ";woman;", 1))
    with pytest.raises(DataError, match="row 2: unknown sex 'woman'"):
        main(["check", str(folder), f"task={tmp_path / 'own.yaml'}"])
    shown = capsys.readouterr().out
    assert "59 lesions without a problem in 30 groups" in shown and "problem: " in shown and "more problem" not in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["age", "AGE", "number", "0", "0"] in [row[:5] for row in rows]
    assert ["sex", "sex", "category", "0", "1"] in [row[:5] for row in rows]


def test_check_reads_a_folder_of_milk10k(make_challenge: Make, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(make_challenge(lesions=11).folder)])
    shown = capsys.readouterr().out
    assert "11 lesions in 11 groups" in shown and "photos: 11 clinical, 11 dermoscopic" in shown
    assert "age_approx" in shown and "malignant" in shown


def test_init_takes_columns_that_it_does_not_recognize(tmp_path: Path) -> None:
    rows = [
        {"Foto": f"{at}{view}", "Fall-Nr": f"c{at}", "PNr": f"p{at // 2}", "Befund": "xyz"[at % 3], "Art": view}
        for at in range(12)
        for view in ("Uebersicht", "Lupe-derm")
    ]
    folder = write(tmp_path / "own", rows, [f"{row['Foto']}.jpg" for row in rows])
    with pytest.raises(DataError, match=r"name it by diagnosis=COLUMN \(columns of 2 to 100 words: .*Befund, Art\)"):
        main(["init", str(folder)])
    with pytest.raises(DataError, match=r"no column 'Befunde' \(diagnosis=\); did you mean 'Befund'\?"):
        main(["init", str(folder), "diagnosis=Befunde"])
    with pytest.raises(ConfigError, match=r"unknown setting 'patient'; .* group"):
        main(["init", str(folder), "patient=PNr"])
    assert not (folder / "task.yaml").exists()
    main(["init", str(folder), "diagnosis=befund", "lesion_id=Fall-Nr", "group=PNr", "view=Art"])
    dataset = read_lesions(folder, load_task(folder / "task.yaml"))
    assert len(dataset.lesions) == 12 and len({lesion.group for lesion in dataset.lesions}) == 6
    assert all("derm" in str(lesion.images["dermoscopic"]) for lesion in dataset.lesions)
    assert not dataset.task.fields


def test_init_recognizes_columns_of_other_languages(tmp_path: Path) -> None:
    rows = [
        {"foto": f"{at}.jpg", "Läsion": f"c{at}", "Paciente": f"p{at // 2}", "Diagnose": "xyz"[at % 3]}
        for at in range(12)
    ]
    folder = write(tmp_path / "own", rows, [row["foto"] for row in rows])
    main(["init", str(folder)])
    columns = load_task(folder / "task.yaml").columns
    assert (columns.lesion_id, columns.group, columns.diagnosis) == ("Läsion", "Paciente", "Diagnose")


def test_init_reads_names_of_columns_with_blanks_as_those_with_underscores(tmp_path: Path) -> None:
    """A patient that is not recognized would be in several folds, and a result of the biopsy an input."""
    rows = [
        {"photo": f"p{at}", "Lesion ID": f"l{at}", "Patient ID": at // 2, "Diagnosis": ["nv", "mel"][at % 2],
         "Biopsy result": ["a", "b", "b"][at % 3], "Pat-Nr": at % 5}
        for at in range(24)
    ]  # fmt: skip
    folder = write(tmp_path, rows, [f"{row['photo']}.jpg" for row in rows])
    text, _ = describe_folder(folder)
    assert "  lesion_id: Lesion ID\n" in text and "  group: Patient ID #" in text
    assert "#   Biopsy result: it may follow from the diagnosis" in text
    for row in rows:
        del row["Patient ID"]
    write(folder, rows, [])
    assert "  group: Pat-Nr #" in describe_folder(folder)[0]


@pytest.mark.parametrize("words", [["init"], ["check", "a", "b"], ["describe", "a"], []])
def test_unknown_subcommand_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="write triderm task init FOLDER"):
        main(words)


def test_init_refuses_one_column_for_two_roles(make_challenge: Make) -> None:
    folder = make_challenge().folder
    with pytest.raises(DataError, match="column 'sex' is given as diagnosis and as lesion_id; name two columns"):
        describe_folder(folder, {"diagnosis": "sex", "lesion_id": "sex"})


def test_init_refuses_a_column_of_views_where_each_view_has_its_own_photos(tmp_path: Path) -> None:
    rows = [{"close": f"c{at}", "derm": f"d{at}", "dx": ["nv", "mel"][at % 2], "site": "arm"} for at in range(8)]
    folder = write(tmp_path, rows, [f"{row[name]}.jpg" for row in rows for name in ("close", "derm")])
    assert "image: {clinical: close, dermoscopic: derm}" in describe_folder(folder)[0]
    with pytest.raises(DataError, match="view=site has no effect, since close and derm name photos"):
        describe_folder(folder, {"view": "site"})


def test_init_refuses_a_folder_without_photos_labels_or_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        main(["init", str(tmp_path / "none")])
    with pytest.raises(DataError, match="no photo"):
        main(["init", str(tmp_path)])
    (tmp_path / "lesions.tar").touch()
    with pytest.raises(DataError, match="in this folder; tars are read by triderm index"):
        main(["init", str(tmp_path)])
    write(tmp_path, [{"a": 1}], ["x.jpg"])
    with pytest.raises(DataError, match=r"no column names the photos \(table.csv\)"):
        main(["init", str(tmp_path)])
    write(tmp_path, [{"a": "x"}], [])
    with pytest.raises(DataError, match="no column looks like the diagnosis"):
        main(["init", str(tmp_path)])
    assert not (tmp_path / "task.yaml").exists()


def test_init_writes_the_encoding_and_the_sheet(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="reads .xlsx: pip install 'triderm-dist[excel]'")
    rows = [{"photo": f"p{at}", "dx": ["nävus", "mel"][at % 2]} for at in range(8)]
    folder = write(tmp_path / "text", rows, [f"{row['photo']}.jpg" for row in rows])
    table = folder / "table.csv"
    table.write_bytes(table.read_text("utf-8").encode("cp1252"))
    main(["init", str(folder)])
    task = load_task(folder / "task.yaml")
    assert task.table.encoding == "cp1252" and len(read_lesions(folder, task).lesions) == 8
    book = openpyxl.Workbook()
    book.active.append(["about this study"])
    sheet = book.create_sheet("lesions")
    for row in (["photo", "dx"], *(list(row.values()) for row in rows)):
        sheet.append(row)
    (folder / "task.yaml").unlink()
    table.unlink()
    book.save(folder / "table.xlsx")
    with pytest.raises(DataError, match="has the sheets 'Sheet', 'lesions'; name one by table"):
        read_lesions(folder, replace(task, table=TableFormat()))
    main(["init", str(folder)])
    task = load_task(folder / "task.yaml")
    assert task.table.sheet == "lesions" and len(read_lesions(folder, task).lesions) == 8


def test_init_tells_why_no_table_is_readable(tmp_path: Path) -> None:
    write(tmp_path, [{"a": 1}], ["x.jpg"])
    (tmp_path / "table.csv").write_text("<html>")
    with pytest.raises(DataError, match=r"table\.csv: is a web page"):
        main(["init", str(tmp_path)])


@pytest.mark.skipif(not HAM.is_dir(), reason="the HAM10000 photos are not on this machine")
def test_init_describes_ham10000_as_the_shipped_task_does(tmp_path: Path) -> None:
    main(["init", str(HAM), f"output={tmp_path / 'task.yaml'}"])
    own, shipped = (load_task(name) for name in (tmp_path / "task.yaml", "ham10000"))
    assert {each.name: each.malignant for each in own.diagnoses} == {
        each.name: each.malignant for each in shipped.diagnoses
    }
    assert own.fields[1:] and own.fields[2].categories == shipped.fields[2].categories
    main(["check", str(HAM), f"task={tmp_path / 'task.yaml'}"])


def test_check_tells_of_lesions_with_one_photo_and_of_more_problems(tmp_path: Path, capsys) -> None:
    folder = clinic(tmp_path)
    main(["init", str(folder)])
    lines = (folder / "table.csv").read_text().splitlines(keepends=True)
    (folder / "table.csv").write_text("".join(lines[:-1]))
    main(["check", str(folder)])
    assert "note: lesions with one photo are packed by missing_view=mark only" in capsys.readouterr().out
    at = lines[0].split(";").index("AGE")
    cells = [line.split(";") for line in lines]
    (folder / "table.csv").write_text("".join(";".join([*row[:at], "x", *row[at + 1 :]]) for row in cells[1:25]))
    (folder / "table.csv").write_text(lines[0] + (folder / "table.csv").read_text())
    with pytest.raises(DataError, match=r"correct it, or list it under missing_words in task\.yaml"):
        main(["check", str(folder)])
    shown = capsys.readouterr().out
    assert shown.count("problem: ") == 10 and "14 more problems; triderm pack lists all" in shown


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("NV", "nv", "MEL"), ["NV", "MEL"]),
        (("1", "1.0", "2"), ["1", "2"]),
        (("unlabelled", "lesion_id", "x y", "X_Y"), ["LESION_ID_2", "UNLABELLED_2", "X_Y_2", "X_Y"]),
        (("x" * 70 + "a", "x" * 70 + "b"), ["X" * 40, "X" * 40 + "_2"]),
    ],
)
def test_init_takes_diagnoses_of_any_spelling(tmp_path: Path, words: tuple[str, ...], names: list[str]) -> None:
    rows = [
        {"photo": f"p{at}", "dx": words[at % len(words)], "kind": ("Derm", "derm", "nah")[at % 3], "lesion": at // 2,
         "a: b_x": at / 20, "a: b_y": at / 40, "huge": 1.5e308 if at == 3 else at}
        for at in range(12)
    ]  # fmt: skip
    folder = write(tmp_path / "folder", rows)
    main(["init", str(folder)])
    task = load_task(folder / "task.yaml")
    assert sorted(task.diagnosis_names) == sorted(names) and task.concepts.prefix == "a: b_"
    assert [view.words for view in task.views] == [("nah",), ("derm",)]
    labels = read_lesions(folder, replace(task, columns=replace(task.columns, lesion_id=None)), "mark").lesions
    assert all(lesion.label >= 0 for lesion in labels) and len(labels) == 12


def test_init_names_the_table_where_several_have_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = clinic(tmp_path)
    write(folder, rows_of_photos()[:1], [], "a.csv")
    main(["init", str(folder)])
    assert f"then: triderm task check {folder}/table.csv\n" in capsys.readouterr().out
    main(["check", f"{folder}/table.csv"])
