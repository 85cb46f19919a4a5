import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.synthetic_run import CLINIC, CONCEPTS, FOLDS, MODELS, folds_of, labels_of, predictions_of, write_run
from triderm_dist.checksums import write_checked_parquet
from triderm_dist.predictions import (
    NO_FOLD,
    TEST,
    DataSplit,
    OofFile,
    OofTable,
    PredictionFile,
    average_test,
    files,
    find_predictions,
    gather,
    predictions_writer,
    read_oof,
    read_predictions,
    row_slice,
    rows_of,
    write_gathered,
    write_oof,
    write_predictions,
)
from triderm_dist.schema import DataError
from triderm_dist.tasks import milk10k_task

LESIONS = 120
COLUMNS = (
    "lesion_ids", "groups", "labels", "fold", "model", "model_hash", "head",
    "logits", "aux_clinical", "aux_dermoscopic", "features", "concepts", "metadata",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, list[str], np.ndarray, np.ndarray]:
    folder = tmp_path / "run"
    labels = write_run(folder, LESIONS)
    return folder, [f"lesion-{row:04d}" for row in range(LESIONS)], labels, folds_of(labels)


def rewrite(path: Path, **change) -> None:
    """Rewrite a file with changed fields (arrays, or functions of the old array)."""
    old = read_predictions(path)
    new = {name: value(getattr(old, name).copy()) if callable(value) else value for name, value in change.items()}
    write_predictions(path, replace(old, **new), split=new.get("split", old.split))


def test_rows_of_lesions_are_found_in_any_order() -> None:
    ids = np.array(["b", "ä", "a", "c"], object)
    for table in (ids, ids.tolist(), pa.array(ids, pa.large_string())):
        assert rows_of(np.array(["c", "x", "ä", "c"], object), table).tolist() == [3, -1, 1, 3]
        assert rows_of([], table).tolist() == [] and rows_of(["a"], table[:0]).tolist() == [-1]


def test_prediction_file_round_trip(tmp_path: Path) -> None:
    labels = labels_of(110)
    written = predictions_of("trimodal", labels, 2, [f"l{row}" for row in range(110)], seed=0)
    write_predictions(tmp_path / "p.parquet", written, split=TEST, transforms=8)
    read = read_predictions(tmp_path / "p.parquet")
    for name in ("lesion_ids", "groups", "labels", "fold", "model", "model_hash", "head"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    for name in ("logits", "aux_clinical", "aux_dermoscopic", "features", "concepts", "metadata"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    assert (read.split, read.extra, read.concept_names) == ("test", {"transforms": 8}, CONCEPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of 7 rows, of 3 where a column has 34 numbers per row, and batches of 5 rows."""
    for name, value in {"GROUP_ROWS": 7, "GROUP_NUMBERS": 102, "READ_ROWS": 5}.items():
        monkeypatch.setattr(files, name, value)


def assert_equal_tables(one: OofTable, two: OofTable) -> None:
    assert (one.models, one.heads, one.task, one.concept_names) == (two.models, two.heads, two.task, two.concept_names)
    for name in ("lesion_ids", "groups", "labels", "folds", "concepts", "metadata"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    for name in ("logits", "aux_clinical", "aux_dermoscopic", "features", "hashes"):
        for model in one.models:
            np.testing.assert_array_equal(getattr(one, name)[model], getattr(two, name)[model])


def row_by_row(paths: list[Path], ids: list[str]) -> dict[tuple[str, str], tuple]:
    """Return the outputs of each lesion and model in prediction files: the obvious way."""
    found = {}
    for path in paths:
        part = read_predictions(path)
        columns = (part.logits, part.aux_clinical, part.aux_dermoscopic, part.features, part.model_hash)
        for lesion, model, *values in zip(part.lesion_ids, part.model, *columns, strict=True):
            found[lesion, model] = tuple(values)
    return found


def test_files_do_not_depend_on_the_size_of_chunks(run, tmp_path: Path, small_chunks: None) -> None:
    folder, *_ = run
    paths = find_predictions(folder)
    written = read_predictions(paths[0])
    rows = pq.ParquetFile(paths[0]).metadata.num_row_groups
    with predictions_writer(tmp_path / "parts.parquet", transforms=8) as write:
        for start in range(0, len(written), 2):
            write(row_slice(written, start, start + 2))
    write_predictions(tmp_path / "whole.parquet", written, transforms=8)
    assert (tmp_path / "parts.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert rows == 1 < pq.ParquetFile(tmp_path / "whole.parquet").metadata.num_row_groups
    chunks = list(PredictionFile(tmp_path / "whole.parquet").chunks())
    assert max(map(len, chunks)) == 5
    np.testing.assert_array_equal(np.concatenate([each.features for each in chunks]), written.features)


def test_gathering_in_chunks_equals_gathering_row_by_row(run, tmp_path: Path, small_chunks: None) -> None:
    folder, ids, labels, folds = run
    shutil.rmtree(folder / "dual_cnn" / "fold-1")
    paths = find_predictions(folder)
    for path in paths[:2]:  # in another order than the data
        rows = np.random.default_rng(0).permutation(len(read_predictions(path)))
        rewrite(path, **{name: lambda x, rows=rows: x[rows] for name in COLUMNS})
    expected = row_by_row(paths, ids)
    table = gather(paths, list(MODELS), DataSplit(ids, labels, folds))
    write_gathered(tmp_path / "gathered.parquet", paths, list(MODELS), DataSplit(ids, labels, folds))
    write_oof(tmp_path / "oof.parquet", table)
    assert (tmp_path / "gathered.parquet").read_bytes() == (tmp_path / "oof.parquet").read_bytes()
    read = read_oof(tmp_path / "gathered.parquet", features=True)
    assert_equal_tables(replace(read, groups=table.groups), table)
    for model in MODELS:
        columns = (table.logits, table.aux_clinical, table.aux_dermoscopic, table.features, table.hashes)
        for row, lesion in enumerate(ids):
            given = expected.get((lesion, model))
            for number, by_model in enumerate(columns):
                value = by_model[model][row]
                if given is None:
                    assert value == "" if number == 4 else np.isnan(value).all()
                else:
                    np.testing.assert_array_equal(value, given[number])
    some = [ids[7], ids[3], ids[90]]
    file = OofFile(tmp_path / "oof.parquet")
    assert_equal_tables(file.table(True, some), read.take(np.array([7, 3, 90])))
    assert_equal_tables(file.table(True), read)
    np.testing.assert_array_equal(file.table(logits_only=True).logits["trimodal"], read.logits["trimodal"])
    assert file.table(logits_only=True).aux_clinical["trimodal"].shape == (LESIONS, 0)
    assert read_oof(tmp_path / "oof.parquet").features["trimodal"].shape == (LESIONS, 0)
    with pytest.raises(DataError, match="has no lesion stranger"):
        file.table(lesion_ids=["stranger"])


def test_a_table_of_one_row_group_and_its_checksums_in_its_schema_is_read(run, tmp_path: Path) -> None:
    """Tables that were written whole have them there."""
    folder, *_ = run
    path = folder / "oof.parquet"
    expected, table = read_oof(path, features=True), pq.read_table(path)
    header = {b"triderm": table.schema.metadata[b"triderm"]}
    write_checked_parquet(tmp_path / "old.parquet", table, header)
    assert pq.ParquetFile(tmp_path / "old.parquet").metadata.num_row_groups == 1
    assert_equal_tables(read_oof(tmp_path / "old.parquet", features=True), expected)


def test_gather_is_independent_of_file_order_and_round_trips(run) -> None:
    folder, ids, labels, folds = run
    paths = find_predictions(folder)
    assert len(paths) == len(MODELS) * FOLDS
    forward, backward = (gather(order, list(MODELS), DataSplit(ids, labels, folds)) for order in (paths, paths[::-1]))
    read = read_oof(folder / "oof.parquet", features=True)
    assert read.models == tuple(MODELS)
    assert read.heads == {"trimodal": "softmax", "dual_cnn": "sigmoid"}
    for model in MODELS:
        for part in ("logits", "aux_clinical", "aux_dermoscopic", "features", "hashes"):
            np.testing.assert_array_equal(getattr(forward, part)[model], getattr(backward, part)[model])
            np.testing.assert_array_equal(getattr(forward, part)[model], getattr(read, part)[model])
    for part in ("lesion_ids", "groups", "labels", "folds"):
        np.testing.assert_array_equal(getattr(forward, part), getattr(read, part))
    assert forward.features["trimodal"].shape[1] != forward.features["dual_cnn"].shape[1]
    assert forward.complete().all()


def test_names_of_groups_have_no_effect(run) -> None:
    folder, *_, folds = run
    table = read_oof(folder / "oof.parquet", features=True)
    rows = np.flatnonzero(folds == 0)[::-1]
    number = np.arange(LESIONS)
    number[rows] = rows[np.arange(len(rows)) // 3 * 3]  # groups of three lesions of a fold
    read = []
    for prefix, last in (("patient-", 0), ("z", LESIONS)):
        groups = np.array([f"{prefix}{abs(last - each):04d}" for each in number], object)
        write_oof(folder / "named.parquet", replace(table, groups=groups))
        read.append(read_oof(folder / "named.parquet").groups)
    np.testing.assert_array_equal(read[0], read[1])
    assert read[0][rows[0]] == read[0][rows[2]] == table.lesion_ids[min(rows[:3])] != read[0][rows[3]]
    assert (read[0][folds != 0] == table.lesion_ids[folds != 0]).all()
    write_oof(folder / "named.parquet", replace(table, groups=groups).take(np.arange(LESIONS)[::-1]))
    np.testing.assert_array_equal(read_oof(folder / "named.parquet").groups, read[0][::-1])


def test_missing_fold_is_nan(run) -> None:
    folder, ids, labels, folds = run
    shutil.rmtree(folder / "dual_cnn" / "fold-1")
    write_oof(folder / "oof.parquet", gather(folder, None, DataSplit(ids, labels, folds)))
    table = read_oof(folder / "oof.parquet")
    missing = folds == 1
    assert np.isnan(table.logits["dual_cnn"][missing]).all() and np.isfinite(table.logits["dual_cnn"][~missing]).all()
    np.testing.assert_array_equal(table.complete(), ~missing)
    assert table.complete(["trimodal"]).all()
    assert (table.hashes["dual_cnn"][missing] == "").all()
    assert table.take(table.complete()).folds.tolist() == folds[~missing].tolist()


def test_outputs_that_are_not_finite_are_refused(run, tmp_path: Path) -> None:
    """By what writes them, and where files of earlier versions hold them."""
    folder, ids, labels, folds = run
    path = folder / "dual_cnn" / "fold-1" / "predictions.parquet"
    part, table = read_predictions(path), gather(folder, None, DataSplit(ids, labels, folds))
    first, others = part.lesion_ids[0], len(part) - 1
    advice = "delete dual_cnn/fold-1 in the run and train it again"
    line = f"outputs of dual_cnn for lesion {first} and {others} others are not finite; {advice}"
    broken = part.logits.copy()
    broken[:, 3] = np.inf
    with pytest.raises(DataError, match=line):
        replace(part, logits=broken)
    logits = {**table.logits, "dual_cnn": np.where((folds == 1)[:, None], np.nan, table.logits["dual_cnn"])}
    write_oof(tmp_path / "oof.parquet", replace(table, logits=logits))
    with pytest.raises(DataError, match=rf"oof\.parquet: {line}"):
        read_oof(tmp_path / "oof.parquet")
    write_oof(path, replace(table.take(folds == 1), models=("dual_cnn",), logits=logits | {"dual_cnn": broken}))
    with pytest.raises(DataError, match=rf"dual_cnn/fold-1/predictions\.parquet: {line}"):
        gather(folder, None, DataSplit(ids, labels, folds))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fold": 1}, "is predicted as fold 1 but belongs to fold 0: its model was trained on it"),
        ({"labels": lambda x: (x + 1) % 11}, "has label"),
        ({"lesion_ids": lambda x: np.array(["stranger", *x[1:]], object)}, "lesion stranger is not in the data"),
        ({"lesion_ids": lambda x: np.array([x[0], x[0], *x[2:]], object)}, r"occurs twice|has label"),
        ({"split": "test"}, "holds test predictions"),
        ({"head": "sigmoid"}, "head"),
        ({"concept_names": tuple(f"c{i}" for i in range(14))}, "is for other concepts than"),
        ({"task": replace(milk10k_task(), name="other")}, "is for another task than"),
        ({"model": "dual_cnn"}, "already predicted by model dual_cnn|head in another file"),
    ],
)
def test_files_of_different_data_are_refused_by_name(run, change: dict, message: str) -> None:
    folder, ids, labels, folds = run
    path = folder / "trimodal" / "fold-0" / "predictions.parquet"
    rewrite(path, **change)
    with pytest.raises(DataError, match=message) as error:
        gather(folder, None, DataSplit(ids, labels, folds))
    assert "predictions.parquet" in str(error.value) and "\n" not in str(error.value)


def test_prediction_of_a_training_lesion_is_refused(run) -> None:
    """A lesion of fold 1 predicted by weights of fold 0 was in their training set."""
    folder, ids, labels, folds = run
    weights = read_predictions(folder / "trimodal" / "fold-0" / "predictions.parquet").model_hash[0]
    rewrite(
        folder / "trimodal" / "fold-1" / "predictions.parquet", model_hash=lambda x: np.array([weights, *x[1:]], object)
    )
    with pytest.raises(DataError, match="predict folds 0 and 1: they were trained on one of them"):
        gather(folder, None, DataSplit(ids, labels, folds))


def test_group_in_two_folds_is_refused(run) -> None:
    folder, ids, labels, folds = run
    for fold in (0, 1):
        path = folder / "trimodal" / f"fold-{fold}" / "predictions.parquet"
        rewrite(path, groups=lambda x: np.array(["patient", *x[1:]], object))
    with pytest.raises(DataError, match="group patient is in folds 0 and 1"):
        gather(folder, None, DataSplit(ids, labels, folds))


def test_group_in_two_folds_of_one_file_is_refused(run) -> None:
    folder, *_ = run
    table = read_oof(folder / "oof.parquet")
    groups = table.groups.copy()
    groups[[np.argmax(table.folds == 0), np.argmax(table.folds == 1)]] = "patient"
    write_oof(folder / "oof.parquet", replace(table, groups=groups))
    with pytest.raises(DataError, match=r"oof\.parquet: group patient is in folds \d and \d: assign folds by group"):
        read_oof(folder / "oof.parquet")


def test_edited_table_is_refused(run) -> None:
    """oof.parquet with a duplicate row, or with a changed fold for one model."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, *_ = run
    path = folder / "oof.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(DataError, match="does not match its checksums; delete it"):
        read_oof(path)
    table = table.replace_schema_metadata({b"triderm": table.schema.metadata[b"triderm"]})
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), path)
    with pytest.raises(DataError, match="occurs twice"):
        read_oof(path)
    folds = table["fold"].to_numpy().copy()
    folds[-1] += 1
    changed = table.set_column(table.column_names.index("fold"), "fold", pa.array(folds))
    pq.write_table(changed, path)
    with pytest.raises(DataError, match="belongs to fold"):
        read_oof(path)
    pq.write_table(
        table.replace_schema_metadata({b"triderm": b'{"format": "triderm-predictions", "version": 2}'}), path
    )
    with pytest.raises(DataError, match="version 1"):
        read_oof(path)


def test_missing_and_foreign_files_are_refused_by_name(tmp_path: Path, run) -> None:
    folder, ids, labels, folds = run
    with pytest.raises(DataError, match="no such file"):
        read_oof(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(DataError, match="not a readable parquet"):
        read_predictions(tmp_path / "text.parquet")
    with pytest.raises(DataError, match="no MODEL/fold-K"):
        gather(tmp_path / "empty", None, DataSplit(ids, labels, folds))
    with pytest.raises(DataError, match="'absent'"):
        gather(folder, ["trimodal", "absent"], DataSplit(ids, labels, folds))


def test_average_test_is_the_mean_of_logits_over_folds(run) -> None:
    folder, *_ = run
    parts = [read_predictions(path) for path in sorted(folder.glob("*/fold-*/test.parquet"))]
    flipped = replace(
        parts[1],
        **{name: getattr(parts[1], name)[::-1] for name in COLUMNS},
    )
    table = average_test([parts[0], flipped, *parts[2:]])
    for model in MODELS:
        own = [part.logits for part in parts if part.model[0] == model]
        np.testing.assert_allclose(table.logits[model], np.mean(own, axis=0), atol=1e-6)
    assert (table.folds == NO_FOLD).all()
    with pytest.raises(DataError, match=r"two folds of .* have the same weights"):
        average_test([*parts, parts[0]])
    with pytest.raises(DataError, match="other lesions"):
        average_test([parts[0], replace(parts[1], lesion_ids=np.array([f"x{i}" for i in range(150)], object))])
    with pytest.raises(DataError, match="other lesions"):  # one more, at the end
        average_test([row_slice(parts[0], 0, 149), parts[1]])


def test_files_of_a_task_with_one_view_and_no_concepts_round_trip(tmp_path: Path) -> None:
    labels = write_run(tmp_path, LESIONS, task=CLINIC)
    ids = [f"lesion-{row:04d}" for row in range(LESIONS)]
    gathered = gather(tmp_path, None, DataSplit(ids, labels, folds_of(labels)))
    for table in (gathered, read_oof(tmp_path / "oof.parquet")):
        assert table.task == CLINIC and table.concepts.shape == (LESIONS, 0) and table.metadata.shape == (LESIONS, 3)
        assert table.diagnoses == CLINIC.diagnosis_names and table.complete().all()
        assert np.isnan(table.aux_dermoscopic["trimodal"]).all() and np.isfinite(table.aux_clinical["trimodal"]).all()
    tests = average_test(read_predictions(path) for path in sorted(tmp_path.glob("*/fold-*/test.parquet")))
    assert tests.task == CLINIC

    titled = replace(CLINIC, title="a new title", decision="fitted")
    assert gather(tmp_path, None, DataSplit(ids, labels, folds_of(labels), titled)).task == titled
    with pytest.raises(
        DataError, match=r"predictions\.parquet: is for task 'clinic', but the data are of task 'other'"
    ):
        gather(tmp_path, None, DataSplit(ids, labels, folds_of(labels), replace(CLINIC, name="other")))


def test_a_header_that_contradicts_its_task_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write_predictions(
        path, predictions_of("trimodal", labels_of(40, classes=4), 0, list(map(str, range(40))), 0, task=CLINIC)
    )
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"triderm"])
    for change, message in (
        ({"diagnoses": ["a", "b", "c", "d"]}, "its diagnoses or metadata fields are not those of task 'clinic'"),
        (
            {"task": {**header["task"], "decision": "vote"}},
            r"p.parquet: task: decision: unknown value 'vote'.*crossval",
        ),
    ):
        pq.write_table(table.replace_schema_metadata({b"triderm": json.dumps(header | change)}), path)
        with pytest.raises(DataError, match=message):
            read_predictions(path)
