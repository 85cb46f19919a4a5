"""A part of the fault matrix; `python -m tests.faults` runs all of it."""

import json
import shutil

import pytest

from tests.faults.compare import contents, differences
from tests.faults.matrix import FAULTS, Matrix, Outcome, Variant, spread
from tests.faults.report import BEGIN, END, markdown, write_into
from tests.faults.rows import ROWS, row_of

SMALL = [
    *(("pack", fault) for fault in ("SIGKILL", "SIGTERM", "disk full", "read-only", "damaged input")),
    *(("index", fault) for fault in ("SIGKILL", "disk full", "damaged input")),
    *(("crossval", fault) for fault in ("SIGKILL", "SIGTERM", "disk full", "lost rank", "server")),
    *(("embed", fault) for fault in ("SIGKILL", "disk full")),
    *(("stack", fault) for fault in ("SIGKILL", "disk full")),
    *(("predict", fault) for fault in ("SIGKILL", "disk full", "server")),
    *(("report", fault) for fault in ("SIGKILL", "disk full")),
    *(("refit", fault) for fault in ("SIGKILL",)),
    *(("predict input", fault) for fault in ("SIGKILL", "SIGTERM", "read-only")),
    *(("export zip", fault) for fault in ("SIGKILL", "disk full")),
]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize(("row", "fault"), SMALL, ids=[f"{row}-{fault}" for row, fault in SMALL])
def test_result_after_a_fault_is_that_of_an_undisturbed_run(matrix, row, fault):
    outcomes = [case() for case in matrix.cases(row_of(row), fault, moments=1)]
    assert outcomes
    assert {outcome.case: outcome.problems for outcome in outcomes if outcome.problems} == {}


def test_killed_packing_is_finished_by_the_same_command(matrix):
    pack = row_of("pack")
    (case,) = matrix.cases(pack, "SIGKILL", moments=1)
    outcome = case()
    assert outcome.status == -9 and outcome.problems == []
    (matrix.place / "train" / "left.part").touch()
    (matrix.place / "train" / "index.json").write_text("{}")
    found = matrix.run_again(pack, Variant(), Outcome("pack", "SIGKILL", "", status=0)).problems
    assert "left over: left over train/left.part" in found and "lost: different train/index.json" in found


def test_every_row_names_known_programs_and_rows():
    names = [row.name for row in ROWS]
    assert all(row.after in ("", *names[:number]) for number, row in enumerate(ROWS))
    assert {row for row, _ in SMALL} <= {*names} and {fault for _, fault in SMALL} <= {*FAULTS}


def test_moments_are_the_first_of_each_kind_of_change():
    changes = ["pack 0\topen a/1.h-1-0123abcd.part", "pack 0\topen a/22.h-22-f0123abc.part", "pack 0\tos.mkdir b"]
    changes += ["stack 0\topen a/1", "stack 0\topen a/33"]
    assert spread(changes, 0) == [1, 3, 4]
    assert spread(changes, 1) == [3]
    assert spread(changes, 2) == [1, 4]
    assert spread(changes, 5, {"stack"}) == [4]


def test_files_are_compared_without_times_only(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    (before / "fold.json").write_text(json.dumps({"loss": 0.5, "steps": [{"seconds": 3}]}))
    (before / "metrics.jsonl").write_text('{"loss": 1, "seconds": 3}\n')
    (before / "README.md").write_text("# Run\n| stack | 2026-11-26 10:47:55 | 3 |\n")
    (before / "log.txt").write_text("a")
    shutil.copytree(before, after)
    (after / "fold.json").write_text(json.dumps({"loss": 0.5, "steps": [{"seconds": 4}]}))
    (after / "metrics.jsonl").write_text('{"loss": 1, "seconds": 4}\n')
    (after / "README.md").write_text("# Run\n| stack | 2026-11-27 10:47:55 | 4 |\n")
    (after / "log.txt").write_text("b")
    assert differences(contents(before), contents(after)) == []
    (after / "metrics.jsonl").write_text('{"loss": 2, "seconds": 4}\n')
    (after / "fold.json").unlink()
    (after / "weights.123.part").touch()
    (after / "empty").mkdir()
    found = ["different metrics.jsonl", "left over empty/", "left over weights.123.part", "missing fold.json"]
    assert differences(contents(before), contents(after)) == found


def test_table_counts_faults_and_failures(tmp_path):
    outcomes = [
        Outcome("pack", "SIGKILL", "a", status=-9),
        Outcome("pack", "SIGKILL", "b", status=-9, problems=["lost: different a", "lost: missing b"]),
        Outcome("stack", "disk full", "c", status=2, problems=["silent: a traceback", "left over: c.part"]),
        Outcome("stack", "server", "d", status=0),
    ]
    text = markdown(outcomes)
    assert text.startswith("- faults tried: 4\n- lost or changed after running again: 1\n- silent")
    assert "| pack | 1 of 2 | – | – | – | – | – | – |\n| stack | – | – | 0 of 1 |" in text
    path = tmp_path / "page.md"
    path.write_text(f"# Page\n{BEGIN}\nold\n{END}\nend\n")
    write_into(path, text)
    assert path.read_text() == f"# Page\n{BEGIN}\n\n{text}\n\n{END}\nend\n"
