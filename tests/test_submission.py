import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.synthetic_run import CLINIC
from triderm_dist import metrics
from triderm_dist.checksums import read_checked_parquet
from triderm_dist.schema import DIAGNOSES, DataError
from triderm_dist.submission import (
    Results,
    map_to_half,
    read_decisions,
    read_probabilities,
    read_submission,
    results_table,
    write_numbers,
    write_results,
    write_submission,
    write_table,
)
from triderm_dist.tasks import load_task

MILK10K = load_task("milk10k")
C = len(DIAGNOSES)
UNIT = st.floats(0, 1)


def groups_of(values: np.ndarray, decisions: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the indices of the decided and of the other values of each row and of each column."""
    number = np.arange(values.size).reshape(values.shape)
    for line, decided in [*zip(number, decisions, strict=True), *zip(number.T, decisions.T, strict=True)]:
        yield from (line[decided], line[~decided])


def assert_same_order(values: np.ndarray, probabilities: np.ndarray, decisions: np.ndarray, resolution: float) -> None:
    """Assert that values are ordered and tied as probabilities; differences below `resolution` may become ties."""
    values, flat = values.ravel(), probabilities.ravel()
    for group in groups_of(probabilities, decisions):
        difference = np.subtract.outer(flat[group], flat[group])
        mapped = np.subtract.outer(values[group], values[group])
        assert (mapped * difference >= 0).all()
        assert (mapped[difference == 0] == 0).all()
        assert (mapped[np.abs(difference) > resolution] != 0).all()


NEAR = st.sampled_from([0.0, 1e-9, 0.25, 0.25 + 1e-8, 0.5, 0.5 + 3e-9, 1.0])
"""Values that tie, or nearly."""


@settings(deadline=None)
@given(arrays(np.float64, (12, 3), elements=UNIT | NEAR), arrays(bool, (12, 3)))
def test_map_to_half_keeps_decisions_and_order(probabilities: np.ndarray, decisions: np.ndarray) -> None:
    mapped = map_to_half(probabilities, decisions)
    assert ((mapped >= 0) & (mapped <= 1)).all()
    np.testing.assert_array_equal(mapped > 0.5, decisions)
    assert_same_order(mapped, probabilities, decisions, 1e-15)


@settings(deadline=None)
@given(arrays(np.float64, (6, C), elements=UNIT | NEAR), arrays(bool, (6, C)))
def test_submission_file_keeps_decisions_and_order(tmp_path_factory, probabilities, decisions) -> None:
    folder = tmp_path_factory.mktemp("submission")
    write_results(folder, MILK10K, Results(list("abcdef"), probabilities, decisions))
    ids, read = read_submission(folder / "submission.csv")
    assert ids == list("abcdef")
    np.testing.assert_array_equal(read > 0.5, decisions)
    assert_same_order(read, probabilities, decisions, 2.1e-9)  # half of it is one step of 9 digits


def test_submission_ranks_as_the_probabilities_of_the_ensemble(tmp_path: Path) -> None:
    """State both losses by the scorer's formulas on a set like the demo's: 260 lesions, one diagnosis by argmax."""
    generator = np.random.default_rng(0)
    labels = np.concatenate([np.arange(C), generator.integers(0, C, 249)])
    logits = 3.2 * np.eye(C)[labels] + generator.normal(scale=1.2, size=(260, C))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    decisions = metrics.argmax_decisions(probabilities)
    ids = [f"IL_{row:07d}" for row in range(260)]
    write_results(tmp_path, MILK10K, Results(ids, probabilities, decisions))
    read = read_submission(tmp_path / "submission.csv")[1]
    assert metrics.official_macro_f1(read, labels) == metrics.macro_f1(decisions, labels)

    def auc_and_precision(table: np.ndarray) -> np.ndarray:
        measures = (metrics.mean_area_under_roc, metrics.mean_average_precision)
        return np.array([measure(table, labels, decisions) for measure in measures])

    losses = auc_and_precision(probabilities) - auc_and_precision(read)
    assert losses == pytest.approx([-0.0002, -0.0019], abs=5e-5)  # AUC, average precision: the decisions rank better
    # The decided values first, each part in the order of the probabilities: no other order has these decisions.
    np.testing.assert_array_equal(auc_and_precision(read), auc_and_precision(probabilities + decisions))


@settings(deadline=None)
@given(st.data())
def test_submission_file_reproduces_decisions_exactly(tmp_path_factory, data) -> None:
    thresholds = data.draw(arrays(np.float64, C, elements=st.floats(0.001, 0.999)))
    probabilities = data.draw(arrays(np.float64, (4, C), elements=UNIT))
    probabilities[1] = thresholds
    probabilities[2] = np.nextafter(thresholds, 1)
    probabilities[3] = np.nextafter(thresholds, 0)
    path = tmp_path_factory.mktemp("submission") / "submission.csv"
    write_submission(path, list("abcd"), probabilities, thresholds)
    ids, read = read_submission(path)
    assert ids == list("abcd")
    np.testing.assert_array_equal(read > 0.5, probabilities > thresholds)
    assert (read[2] > 0.5).all() and not (read[1] > 0.5).any() and not (read[3] > 0.5).any()


def write_cell_by_cell(path: Path, ids: Sequence[str], numbers: np.ndarray, decisions: Sequence[str] | None) -> None:
    """Write what `write_numbers` writes, by Python's formatting and csv.writer."""
    names = [f"d{column}" for column in range(numbers.shape[1])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["lesion_id", *names, *(["decision"] if decisions else [])])
        for row, lesion in enumerate(ids):
            cells = [f"{value:.9f}" for value in numbers[row].tolist()]
            writer.writerow([lesion, *cells, *([decisions[row]] if decisions else [])])


TIES = st.builds(lambda odd, step: (2 * odd + 1) / 1024 + step * 2.0**-40, st.integers(0, 511), st.integers(-3, 3))
"""Half a step of the ninth decimal, exactly or nearly: the even digit is written, or the nearer one."""
ODD = TIES | st.sampled_from([-0.0, 5e-324, 5e-10, 4.9999999999e-10, 0.9999999995, np.nan, np.inf, -0.5, 1.5, 12345.6])
CELLS = st.text(st.sampled_from('ab",;\r\n \t\x00\u2028ä🙂'), max_size=4)


@settings(deadline=None)
@given(arrays(np.float64, (5, 3), elements=UNIT | NEAR | ODD), st.lists(CELLS, min_size=10, max_size=10), st.booleans())
def test_csv_files_have_the_bytes_of_csv_writer(tmp_path_factory, numbers, cells, decided) -> None:
    folder = tmp_path_factory.mktemp("numbers")
    decisions = cells[5:] if decided else None
    write_numbers(folder / "blocks.csv", cells[:5], numbers, ["d0", "d1", "d2"], decisions)
    write_cell_by_cell(folder / "cells.csv", cells[:5], numbers, decisions)
    assert (folder / "blocks.csv").read_bytes() == (folder / "cells.csv").read_bytes()


def test_more_lesions_than_are_written_at_once(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    numbers = generator.dirichlet(np.ones(3) / 4, 40_000)
    ids = [f"L{row}" for row in range(len(numbers))]
    write_numbers(tmp_path / "blocks.csv", ids, numbers, ["d0", "d1", "d2"])
    write_cell_by_cell(tmp_path / "cells.csv", ids, numbers, None)
    assert (tmp_path / "blocks.csv").read_bytes() == (tmp_path / "cells.csv").read_bytes()


@pytest.mark.parametrize("cell", ["1", " 0.25", "1e-3", "+1", "1_0", "nan", "-inf", '"0.5"', "0.1234567890123456789"])
def test_numbers_are_read_as_python_reads_them(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(f'lesion_id,A\n"a\nb",{cell}\n')
    ids, numbers = read_submission(path, ["A"])
    assert ids == ["a\nb"]
    np.testing.assert_array_equal(numbers, [[float(cell.strip('"'))]])


def test_submission_file_format(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "submission.csv"
    write_submission(path, ["b", "a"], np.array([[0.0] * C, [1.0] * C]), np.full(C, 0.5), template=["a", "b"])
    lines = path.read_bytes().decode().split("\n")
    assert lines[0] == "lesion_id," + ",".join(DIAGNOSES)
    assert lines[1] == "a" + ",1.000000000" * C
    assert lines[2] == "b" + ",0.000000000" * C  # floats, since the scorer refuses integer columns
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": np.full((2, C), np.nan)}, "lesion a has nan for AKIEC"),
        ({"probabilities": np.full((2, C), 1.1)}, r"lesion a has 1.1"),
        ({"probabilities": np.zeros((2, C - 1))}, "shape"),
        ({"thresholds": np.zeros(3)}, "thresholds have shape"),
        ({"thresholds": np.full(C, np.nan)}, r"thresholds must lie in \[0, 1\]"),
        ({"lesion_ids": ["a", "a"]}, "lesion a occurs twice"),
        ({"lesion_ids": [], "probabilities": np.zeros((0, C))}, "no lesions"),
        ({"template": ["a", "b", "c"]}, "1 lesions of the template are not predicted, the first is c"),
        ({"template": ["a"]}, "1 lesions are not in the template, the first is b"),
        ({"template": ["a", "b", "b"]}, "twice in the template"),
    ],
)
def test_invalid_submissions_are_refused_without_a_file(tmp_path: Path, change: dict, message: str) -> None:
    good = {"lesion_ids": ["a", "b"], "probabilities": np.zeros((2, C)), "thresholds": np.full(C, 0.5)}
    with pytest.raises(DataError, match=message):
        write_submission(tmp_path / "submission.csv", **(good | change))
    assert list(tmp_path.iterdir()) == []


def test_unreadable_submissions_are_refused_by_file_name(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with pytest.raises(DataError, match="no such file"):
        read_submission(path)
    header = "lesion_id," + ",".join(DIAGNOSES)
    for text, message in (
        ("id,x\n", "header"),
        (f"{header}\na,1.0\n", "line 2"),
        (f"{header}\n\n", "line 2 has 0 fields"),
        (f"{header}\na{',x' * C}\n", "not a number"),
        (f"{header}\na{',' * C}\n", "not a number"),
        (f"{header}\na{',NULL' * C}\n", "not a number"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_submission(path)
    path.write_bytes(f"lesion_id,decision\nMüller,{DIAGNOSES[0]}\n".encode("latin-1"))  # as Excel may save it
    with pytest.raises(DataError, match=r"x\.csv: not a CSV file in UTF-8 \('utf-8' codec can't decode"):
        read_decisions(path, DIAGNOSES)


def test_written_submission_scores_equally_in_the_official_scorer(tmp_path: Path) -> None:
    scoring = pytest.importorskip("isic_challenge_scoring", reason="isic-challenge-scoring 5.8.0 is not installed")
    if not hasattr(scoring.ClassificationMetric, "DICE"):
        pytest.skip("this isic-challenge-scoring is older than 5.8.0 and has no dice")
    generator = np.random.default_rng(0)
    labels = np.concatenate([np.arange(C), generator.integers(0, C, 200)])
    probabilities = generator.random((len(labels), C)) ** 2 + 0.3 * np.eye(C)[labels]
    probabilities = np.round(np.minimum(probabilities, 1), 3)
    thresholds = np.round(generator.uniform(0.05, 0.9, C), 3)  # rounded, so that some scores equal their threshold
    ids = [f"MILK10k_{row:07d}" for row in range(len(labels))]
    truth = tmp_path / "truth.csv"
    rows = [
        f"{lesion}," + ",".join(f"{v:.1f}" for v in np.eye(C)[label]) for lesion, label in zip(ids, labels, strict=True)
    ]
    truth.write_text("\n".join(["lesion_id," + ",".join(DIAGNOSES), *rows]) + "\n")
    path = tmp_path / "submission.csv"
    write_submission(path, ids, probabilities, thresholds, template=sorted(ids, reverse=True))
    with truth.open() as truth_file, path.open() as prediction_file:
        score = scoring.ClassificationScore.from_stream(truth_file, prediction_file, scoring.ClassificationMetric.DICE)
    assert score.overall == pytest.approx(metrics.macro_f1(probabilities > thresholds, labels), abs=1e-12)


@pytest.mark.parametrize("decision", ["argmax", "fitted", "threshold"])
def test_results_of_a_task_without_a_challenge(tmp_path: Path, decision: str) -> None:
    task = replace(CLINIC, decision=decision)
    names = task.diagnosis_names
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(4), 30)
    thresholds = np.array([0.4, 0.3, 0.2, 0.6])
    decisions = probabilities > thresholds if decision == "threshold" else metrics.argmax_decisions(probabilities)
    results = Results([f"id-{row}" for row in range(30)][::-1], probabilities, decisions)
    template = sorted(results.lesion_ids)
    paths = write_results(tmp_path, task, results, template, prefix="oof_")
    assert (
        [path.name for path in paths]
        == ["oof_probabilities.csv", "oof_decisions.csv"]
        == sorted((path.name for path in tmp_path.iterdir()), reverse=True)
    )
    order = [results.lesion_ids.index(lesion) for lesion in template]
    ids, written = read_submission(paths[0], names)
    assert ids == template and paths[0].read_text("utf-8").startswith("lesion_id,MEL<em>1,Nävus,$x$,[wart]\n")
    ids, decisions = read_decisions(paths[1], names)
    assert ids == template
    np.testing.assert_array_equal(decisions, results.decisions[order])
    np.testing.assert_allclose(written, probabilities[order], atol=1e-9)
    if decision == "threshold":
        assert set(decisions.sum(axis=1)) >= {0, 1, 2}
        lines = paths[1].read_text("utf-8").splitlines()[1:]
        assert any(line.endswith(",") for line in lines) and any(line.count(";") == 1 for line in lines)
    else:
        np.testing.assert_array_equal(metrics.argmax_decisions(written), decisions)


def test_table_of_results_holds_decisions_and_members(tmp_path: Path) -> None:
    table = np.array([[0.7, 0.3, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    results = Results(["a", "b", "c"], table, table > 0.4)
    written = results_table(results, {"net": 1 - table}, CLINIC.diagnosis_names)
    write_table(tmp_path / "probabilities.parquet", written, {"members": ["net"]})
    read = read_checked_parquet(tmp_path / "probabilities.parquet")
    assert read["decision"].to_pylist() == ["MEL<em>1", "MEL<em>1;Nävus", ""]
    assert read.column_names == ["lesion_id", *CLINIC.diagnosis_names, "decision",
                                 *(f"net/{name}" for name in CLINIC.diagnosis_names)]  # fmt: skip
    np.testing.assert_array_equal(read["net/Nävus"], 1 - table[:, 1])
    header = json.loads(read.schema.metadata[b"triderm"])
    assert header == {"format": "triderm-probabilities", "version": 1, "members": ["net"]}


def test_results_are_read_back_together(tmp_path: Path) -> None:
    table = np.eye(4)[[0, 2]]
    write_results(tmp_path, CLINIC, Results(["a", "b"], table, table > 0.5))
    ids, probabilities, decisions = read_probabilities(tmp_path, CLINIC)
    assert ids == ["a", "b"]
    np.testing.assert_array_equal(probabilities, table)
    np.testing.assert_array_equal(decisions, table > 0.5)
    for text, message in (
        ("lesion_id,decision\na,MEL<em>1\n", "decisions.csv: holds other lesions than probabilities.csv"),
        ("lesion_id,decision\na,MEL<em>1\nb,MEL\n", "decisions.csv: line 3: 'MEL' is not a diagnosis of the task"),
    ):
        (tmp_path / "decisions.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            read_probabilities(tmp_path, CLINIC)


def test_results_with_invalid_numbers_are_refused_without_a_file(tmp_path: Path) -> None:
    table = np.full((2, 4), np.nan)
    with pytest.raises(DataError, match="lesion a has nan for MEL<em>1"):
        write_results(tmp_path, CLINIC, Results(["a", "b"], table, np.zeros((2, 4), bool)))
    assert list(tmp_path.iterdir()) == []
