"""Damaged tables: refused in one line, or read with the same label of every lesion that is returned."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.conftest import draw_photo, write_challenge
from tests.fuzz.checks import assert_same_labels, cases, fuzz, labels_of, result_or_refusal
from tests.fuzz.mutations import edited_bytes, edited_csv, edited_rows
from tests.small_tasks import TASKS
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.describe import describe_folder
from triderm_dist.data.readers.lesions_csv import read_labels, read_lesions
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.readers.milk10k import read_labels as read_truth
from triderm_dist.data.readers.table import read_table
from triderm_dist.schema import Task

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about damage


@pytest.fixture(scope="module")
def challenge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_challenge(tmp_path_factory.mktemp("challenge"), lesions=11, prefix="MILK10k_Training")


@pytest.fixture(scope="module", params=["everything", "dermoscopic only"])
def clinic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Task]:
    """Return a folder with table.csv, one row per photo, and its task."""
    task, folder = TASKS[request.param], tmp_path_factory.mktemp("clinic")
    diagnoses, views = [*task.diagnosis_names], [*task.view_names]
    rows = [["lesion", "photo", "kind", "age", "limb", "veil", "dots", "dx"]]
    for lesion in range(9):
        for view in views:
            photo = f"P{lesion}{view[0]}"
            draw_photo(lesion).save(folder / f"{photo}.jpg")
            limb = ("yes", "no")[lesion % 2]
            rows.append([f"L{lesion}", photo, view, str(20 + lesion), limb, "0.5", "1", diagnoses[lesion % 3]])
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder, task


def rows_of(data: bytes) -> list[list[str]]:
    return [*csv.reader(io.StringIO(data.decode()))]


def check_labels(read: Callable[[], Dataset], folder: Path, original: dict[str, str | None]) -> None:
    dataset = result_or_refusal(read, folder)
    if dataset is None:
        return
    found = labels_of(dataset.lesions, dataset.task.diagnosis_names)
    unlabeled = {lesion for lesion, label in found.items() if label is None and original.get(lesion)}
    told = any("diagnosis" in note or "has one" in note for note in dataset.notes)
    assert told or not unlabeled, f"labels lost without a note: {unlabeled}"
    assert_same_labels({lesion: label for lesion, label in found.items() if lesion not in unlabeled}, original)


@cases(6, 150)
@pytest.mark.parametrize("table", ["metadata_path", "truth_path"])
def test_a_damaged_table_of_a_challenge(challenge: Any, table: str, cases: int) -> None:
    path: Path = getattr(challenge, table)
    before = path.read_bytes()
    dataset = read_challenge(challenge.folder)
    original = labels_of(dataset.lesions, dataset.task.diagnosis_names)

    def check(damaged: bytes, options: dict[str, Any]) -> None:
        path.write_bytes(damaged)
        check_labels(lambda: read_challenge(challenge.folder, **options), challenge.folder, original)

    try:
        fuzz(lambda case: check(*case), st.tuples(edited_csv(rows_of(before)), OPTIONS), cases)
    finally:
        path.write_bytes(before)


OPTIONS = st.fixed_dictionaries(
    {"missing_view": st.sampled_from(("refuse", "mark")), "invalid": st.sampled_from(("refuse", "drop", "drop"))}
)


@cases(5, 130)
def test_a_damaged_table_of_a_task(clinic: tuple[Path, Task], cases: int) -> None:
    folder, task = clinic
    path = folder / "table.csv"
    before = path.read_bytes()
    original = labels_of(read_lesions(folder, task).lesions, task.diagnosis_names)

    def check(damaged: bytes, options: dict[str, Any]) -> None:
        path.write_bytes(damaged)
        check_labels(lambda: read_lesions(folder, task, **options), folder, original)

    try:
        fuzz(lambda case: check(*case), st.tuples(edited_csv(rows_of(before)), OPTIONS), cases)
    finally:
        path.write_bytes(before)


@cases(3, 60)
def test_describing_a_folder_with_a_damaged_table(clinic: tuple[Path, Task], cases: int) -> None:
    folder, _ = clinic
    path = folder / "table.csv"
    before = path.read_bytes()

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        result_or_refusal(lambda: describe_folder(folder), folder)

    try:
        fuzz(check, edited_csv(rows_of(before)), cases)
    finally:
        path.write_bytes(before)


@cases(4, 100)
def test_a_damaged_table_of_the_truth(challenge: Any, tmp_path: Path, cases: int) -> None:
    before = rows_of(challenge.truth_path.read_bytes())
    original, path = read_truth(challenge.truth_path), tmp_path / "truth.csv"

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        found = result_or_refusal(lambda: read_truth(path), path)
        assert_same_labels(found or {}, original)  # type: ignore[arg-type]

    fuzz(check, edited_csv(before), cases)


# --- workbooks -------------------------------------------------------------------------------------------------------


def workbook(rows: list[list[str]]) -> bytes:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append([float(cell) if re.fullmatch(r"\d+\.?\d*", cell) else cell for cell in row])
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa">' + b"".join(
    b'<!ENTITY %c "%s">' % (name + 1, b"&%c;" % name * 20) for name in range(ord("a"), ord("h"))
)
SWAPS = (
    (rb'r="[A-Z]+(\d+)"', rb'r="XFD\1"'), (rb'<row r="\d+"', b'<row r="1048576"'), (rb"<v>\d+</v>", b"<v>99999999</v>"),
    (rb"<v>\d+</v>", b"<v>1e400</v>"), (rb"<v>\d+</v>", b"<v>nan</v>"), (rb"<v>\d+</v>", b"<v></v>"),
    (rb't="s"', b't="d"'), (rb't="s"', b't="e"'), (rb't="n"', b't="b"'), (rb"<sheetData>", b"<sheetData><row/>"),
    (rb'ref="[^"]*"', b'ref="A1:XFD1048576"'), (rb'r="[A-Z]+\d+"', b'r="A0"'), (rb'r="[A-Z]+\d+"', b'r="?"'),
    (rb"<worksheet", BOMB + b"]><worksheet"), (rb"<sheet ", b'<sheet state="hidden" '), (rb"rId1", b"rId9"),
    (rb"<v>(\d+)</v>", rb"<f>A1+1</f><v>\1</v>"), (rb"</sheetData>", b""), (rb"utf-8", b"utf-7"),
    (rb"<v>\d+</v>", b"<v>" + b"9" * 5000 + b"</v>"),
)  # fmt: skip


@st.composite
def edited_workbook(draw: st.DrawFn, rows: list[list[str]]) -> bytes:
    """Damage the cells of a workbook, its XML, the members of its zip, or the bytes of the file."""
    kind = draw(st.sampled_from(("rows", "xml", "xml", "members", "inside")))
    if kind == "rows":
        table = [[cell for cell in row if "\x00" not in cell and "\x1b" not in cell] for row in draw(edited_rows(rows))]
        return workbook(table or rows)
    members = unzipped(workbook(rows))
    name = draw(st.sampled_from(sorted(members)))
    if kind == "xml":
        name = draw(st.sampled_from(("xl/worksheets/sheet1.xml", "xl/workbook.xml", name)))
        old, new = draw(st.sampled_from(SWAPS))
        members[name] = re.sub(old, new, members[name], count=draw(st.sampled_from((0, 1))))
    elif kind == "members":
        other = draw(st.sampled_from(sorted(members)))
        members[other] = members.pop(name)
    else:
        members[name] = draw(edited_bytes(members[name]))
    return zipped(members)


@cases(3, 90)
def test_a_damaged_workbook(tmp_path: Path, clinic: tuple[Path, Task], cases: int) -> None:
    path = tmp_path / "table.xlsx"

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        result_or_refusal(lambda: read_table(path), path)

    fuzz(check, edited_workbook(rows_of((clinic[0] / "table.csv").read_bytes())), cases)


@cases(3, 90)
def test_changed_bytes_of_a_workbook(tmp_path: Path, clinic: tuple[Path, Task], cases: int) -> None:
    path, task = tmp_path / "table.xlsx", clinic[1]
    before = workbook(rows_of((clinic[0] / "table.csv").read_bytes()))
    path.write_bytes(before)
    original: Any = read_labels(path, task)

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        assert_same_labels(result_or_refusal(lambda: read_labels(path, task), path) or {}, original)

    fuzz(check, edited_bytes(before, 1), cases)
