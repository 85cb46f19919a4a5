"""The XGBoost stacker: reproducible, on the requested device, in memory or from a file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.ensemble.conftest import training_rows
from tests.synthetic_run import CLINIC, write_run
from triderm_dist import metrics
from triderm_dist.config import StackConfig
from triderm_dist.ensemble import xgboost_stacker
from triderm_dist.ensemble.columns import ColumnFile
from triderm_dist.ensemble.fitted_stacker import FittedStacker, fit_stacker
from triderm_dist.ensemble.stack_inputs import base_columns
from triderm_dist.ensemble.stacker import TrainingRows
from triderm_dist.ensemble.xgboost_stacker import (
    GPU_CELLS,
    _row_weights,
    count_gpus,
    device_of,
    import_xgboost,
    threads_for,
)
from triderm_dist.predictions import OofTable, read_oof
from triderm_dist.schema import DIAGNOSES, DataError
from triderm_dist.tasks import milk10k_task

QUICK = StackConfig(max_rounds=20, early_stopping=5, learning_rate=0.4, device="cpu")
FEW_ROUNDS = QUICK.model_copy(update={"max_rounds": 6})


@pytest.mark.parametrize("booster", ["softprob", "multi_output"])
def test_fits_are_bit_identical_and_round_trip_through_files(table: OofTable, tmp_path: Path, booster: str) -> None:
    config = QUICK.model_copy(update={"booster": booster, "max_rounds": 12})
    first, second = (fit_stacker(training_rows(table), config) for _ in range(2))
    assert first == second
    first.save(tmp_path / "stack.json", milk10k_task())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stack.json", "stack.ubj"]
    loaded = FittedStacker.load(tmp_path / "stack.json")
    assert loaded == first
    probabilities = loaded.predict(base_columns(table))
    np.testing.assert_array_equal(probabilities, first.predict(base_columns(table)))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_missing_gpu_is_an_error_instead_of_a_cpu_fallback() -> None:
    assert device_of(StackConfig(device="cpu"), GPU_CELLS) == "cpu"
    if count_gpus():
        pytest.skip("this machine has a GPU")
    assert device_of(StackConfig(device="auto"), GPU_CELLS) == "cpu"
    with pytest.raises(DataError, match="no GPU"):
        device_of(StackConfig(device="cuda"), 1)


def test_auto_leaves_small_and_streamed_fits_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(xgboost_stacker, "count_gpus", lambda: 1)
    monkeypatch.setattr(import_xgboost(), "build_info", lambda: {"USE_CUDA": True})
    auto = StackConfig(device="auto")
    assert [device_of(auto, cells) for cells in (5_000 * 60, GPU_CELLS)] == ["cpu", "cuda"]
    assert device_of(auto, GPU_CELLS, in_memory=False) == "cpu"
    assert device_of(StackConfig(device="cuda"), 1, in_memory=False) == "cuda"


def test_columns_from_a_file_and_in_memory_give_equivalent_stackers(table: OofTable, tmp_path: Path) -> None:
    columns = base_columns(table)
    file = ColumnFile.write(tmp_path / "columns.parquet", np.array_split(columns, 7))
    train, held_out = table.folds != 0, np.flatnonzero(table.folds == 0)
    streamed, again = (fit_stacker(training_rows(table, source=file).take(train), QUICK) for _ in range(2))
    assert streamed == again
    in_memory = fit_stacker(training_rows(table).take(train), QUICK)
    from_file, from_memory = streamed.predict(file, held_out), in_memory.predict(columns, held_out)
    np.testing.assert_array_equal(streamed.predict(columns[held_out]), from_file)
    assert abs(streamed.model.rounds - in_memory.model.rounds) <= 5
    assert metrics.argmax_macro_f1(from_file, table.labels[held_out]) == pytest.approx(
        metrics.argmax_macro_f1(from_memory, table.labels[held_out]), abs=0.06
    )


@pytest.mark.parametrize("booster", ["softprob", "multi_output"])
def test_contributions_add_up_to_the_scores(table: OofTable, booster: str) -> None:
    columns = base_columns(table)
    stacker = fit_stacker(training_rows(table), FEW_ROUNDS.model_copy(update={"booster": booster}))
    values = stacker.model.contributions(columns)
    if values is None:
        assert booster == "multi_output"
        pytest.skip("this version of XGBoost has no contributions of multi-output trees")
    assert values.shape == (len(table), len(DIAGNOSES), columns.shape[1])
    # Equal up to a constant per row (softmax) and per diagnosis (its expected score).
    rest = np.log(stacker.predict(columns)) - values.sum(axis=2)
    rest = rest - rest.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(rest, np.broadcast_to(rest[:1], rest.shape), atol=1e-4)


def test_a_row_that_stands_for_many_lesions_weighs_as_much(table: OofTable) -> None:
    rows = training_rows(table)
    times = 1 + rows.labels % 3
    repeated = np.repeat(np.arange(len(rows)), times)
    alone = _row_weights(training_rows(table, weights=times.astype(float)), 0.5)
    copies = _row_weights(rows.take(repeated), 0.5)
    np.testing.assert_allclose(np.bincount(repeated, copies) / copies.sum(), alone / alone.sum())


def test_early_stopping_weighs_a_row_as_the_lesions_that_it_stands_for() -> None:
    """A row of weight n gives the number of rounds of n equal rows, which is another one than that of a single row."""
    generator = np.random.default_rng(3)
    labels = np.repeat(np.arange(3), 60)
    columns = (labels[:, None] + generator.integers(0, 5, (180, 4))).astype(np.float32)
    times = generator.choice([1, 9], 180)
    rows = TrainingRows(columns, np.arange(180), labels, np.arange(180), tuple("abcd"), tuple("ABC"))
    settings = QUICK.model_copy(
        update={"min_child_weight": 0, "reg_lambda": 0, "subsample": 1, "colsample_bytree": 1, "max_rounds": 60}
    )
    weighted, repeated = replace(rows, weights=times.astype(float)), rows.take(np.repeat(np.arange(180), times))
    rounds = [fit_stacker(each, settings).model.rounds for each in (rows, weighted, repeated)]
    assert rounds[0] != rounds[1] == rounds[2]


def test_fold_stackers_set_the_number_of_rounds(table: OofTable) -> None:
    fold_stackers = [
        fit_stacker(training_rows(table), QUICK.model_copy(update={"max_rounds": rounds})) for rounds in (1, 2, 6)
    ]
    rounds = [stacker.model.rounds for stacker in fold_stackers]
    assert fit_stacker(training_rows(table), QUICK, fold_stackers=fold_stackers).model.rounds == np.median(rounds)


@pytest.mark.parametrize(("lesions", "enough"), [(4, True), (2, True), (1, False)])
def test_early_stopping_has_lesions_to_validate_on_where_every_diagnosis_has_few(lesions: int, enough: bool) -> None:
    labels = np.repeat(np.arange(4), lesions)
    rows = TrainingRows(np.eye(4, dtype=np.float32)[labels], np.arange(len(labels)), labels, np.arange(len(labels)),
                        tuple("abcd"), tuple("ABCD"))  # fmt: skip
    stacker = fit_stacker(rows, StackConfig(device="cpu", min_child_weight=0, max_rounds=20))
    assert (stacker.model.rounds > 1) == enough


def test_threads_follow_the_size_of_the_fit() -> None:
    assert threads_for(5_000, 84, cores=16) == 1
    assert threads_for(5_000, 1_600, cores=16) == 2
    assert threads_for(1_000_000, 60, cores=16) == 15
    assert threads_for(1_000_000, 60, cores=2) == 2


def test_importance_has_the_names_of_columns_that_xgboost_refuses(tmp_path: Path) -> None:
    write_run(tmp_path, 120, task=CLINIC)
    table = read_oof(tmp_path / "oof.parquet")
    stacker = fit_stacker(training_rows(table), FEW_ROUNDS)
    assert stacker.predict(base_columns(table)).shape == (120, 4)
    _, importance = stacker.model.importance()
    assert set(importance) <= set(stacker.feature_names) and "trimodal/logit/MEL<em>1" in importance
