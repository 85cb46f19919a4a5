from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.synthetic_run import write_run
from triderm_dist import metrics
from triderm_dist.config import StackConfig
from triderm_dist.ensemble.columns import ColumnFile
from triderm_dist.ensemble.stack_inputs import stack_features
from triderm_dist.ensemble.stacker import (
    NestedStack,
    Stacker,
    device_of,
    fit_stacker,
    gpus,
    keep_what_gains,
    nested_stack,
    threads_for,
)
from triderm_dist.predictions import OofTable, read_oof
from triderm_dist.schema import DIAGNOSES, DataError

QUICK = StackConfig(max_rounds=20, early_stopping=5, learning_rate=0.4, device="cpu")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> OofTable:
    folder = tmp_path_factory.mktemp("stack")
    write_run(folder, 330)
    return read_oof(folder / "oof.parquet")


def fit(table: OofTable, labels: np.ndarray | None = None, config: StackConfig = QUICK, **more) -> Stacker:
    features, names = stack_features(table)
    labels = table.labels if labels is None else labels
    known = labels >= 0
    return fit_stacker(features[known], labels[known], table.groups[known], names, table.diagnoses, config, **more)


def test_columns_mean_the_same_in_every_row(table: OofTable) -> None:
    features, names = stack_features(table)
    assert features.shape == (len(table), len(names)) and len(set(names)) == len(names) == 2 * 3 * 11 + 14 + 4
    assert not any("feature" in name for name in names)
    column = features[:, names.index("trimodal/logit/MEL")]
    logits = table.logits["trimodal"].astype(float)
    log_p = logits[:, 7] - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(column, log_p, rtol=1e-4)
    assert np.isnan(features).sum() == np.isnan(table.concepts).sum() + np.isnan(table.metadata).sum()
    shifted = table.logits | {"trimodal": table.logits["trimodal"] + 3.0}
    other, _ = stack_features(replace(table, logits=shifted))
    np.testing.assert_allclose(other, features, atol=1e-5)  # an offset on all logits of a softmax says nothing


@pytest.mark.parametrize("booster", ["softprob", "multi_output"])
def test_a_fit_is_bit_identical_and_survives_its_file(table: OofTable, tmp_path: Path, booster: str) -> None:
    config = QUICK.model_copy(update={"booster": booster, "max_rounds": 12})
    first, second = fit(table, config=config), fit(table, config=config)
    assert first.model == second.model and first.rounds == second.rounds
    first.save(tmp_path / "stack.ubj")
    loaded = Stacker.load(tmp_path / "stack.ubj")
    assert loaded == first
    features, _ = stack_features(table)
    probabilities = loaded.predict(features)
    np.testing.assert_array_equal(probabilities, first.predict(features))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stack.json", "stack.ubj"]


def test_it_learns_from_the_columns(table: OofTable) -> None:
    features, names = stack_features(table)
    stacked = nested_stack(features, table.labels, table.groups, table.folds, names, table.diagnoses, QUICK).out_of_fold
    assert metrics.argmax_macro_f1(stacked, table.labels) > 0.6


def test_absent_diagnoses_are_named_and_have_no_probability(table: OofTable) -> None:
    labels = np.where(np.isin(table.labels, [2, 6]), -1, table.labels)
    stacker = fit(table, labels)
    assert stacker.absent == ("BEN_OTH", "MAL_OTH")
    features, _ = stack_features(table)
    probabilities = stacker.predict(features)
    assert (probabilities[:, [2, 6]] == 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    with pytest.raises(DataError, match="two diagnoses"):
        fit(table, np.where(table.labels == 1, 1, -1))


def test_no_label_of_a_fold_reaches_what_is_fitted_without_it(table: OofTable) -> None:
    """Change the labels of fold 0: everything that claims not to know fold 0 stays as it was, bit for bit."""
    features, names = stack_features(table)

    def nested(labels: np.ndarray) -> NestedStack:
        return nested_stack(features, labels, table.groups, table.folds, names, table.diagnoses, QUICK)

    inside = table.folds == 0
    poisoned = table.labels.copy()
    poisoned[inside] = np.roll(poisoned[inside], 1)
    before, after = nested(table.labels), nested(poisoned)
    np.testing.assert_array_equal(before.without[0], after.without[0])
    np.testing.assert_array_equal(before.out_of_fold[inside], after.out_of_fold[inside])
    assert (before.out_of_fold[~inside] != after.out_of_fold[~inside]).any()
    for fold in range(3):
        rows = table.folds == fold
        np.testing.assert_array_equal(before.without[fold][rows], before.out_of_fold[rows])
        assert np.isfinite(before.without[fold]).all()


def test_two_folds_are_enough(table: OofTable) -> None:
    two = table.take(table.folds != 2)
    features, names = stack_features(two)
    nested = nested_stack(features, two.labels, two.groups, two.folds, names, two.diagnoses, QUICK)
    assert np.isfinite(nested.out_of_fold).all() and np.isfinite(nested.without[0]).all()


def test_a_gpu_that_is_not_there_is_refused_and_not_silently_a_cpu() -> None:
    assert device_of(StackConfig(device="cpu")) == "cpu"
    if gpus():
        pytest.skip("this machine has a GPU")
    assert device_of(StackConfig(device="auto")) == "cpu"
    with pytest.raises(DataError, match="no GPU"):
        device_of(StackConfig(device="cuda"))


def test_a_stacker_of_other_columns_is_refused(table: OofTable, tmp_path: Path) -> None:
    stacker = fit(table, rounds=2)
    assert stacker.rounds == 2
    with pytest.raises(DataError, match="84 columns, here are 3"):
        stacker.predict(np.zeros((2, 3), np.float32))
    with pytest.raises(DataError, match="no such file"):
        Stacker.load(tmp_path / "stack.ubj")
    assert stacker.diagnoses == DIAGNOSES


def test_columns_from_a_file_give_the_forest_that_columns_in_memory_give(table: OofTable, tmp_path: Path) -> None:
    """Same cuts, same draws: what the trees say agrees, though each batch is seen on its own."""
    features, names = stack_features(table)
    file = ColumnFile.write(tmp_path / "columns.parquet", np.array_split(features, 7))
    assert file.shape == features.shape
    back = np.concatenate([batch for _, batch in file.batches()])
    np.testing.assert_array_equal(back, features)
    rows = np.flatnonzero(table.folds != 0)
    given = (table.labels, table.groups, names, table.diagnoses, QUICK)
    streamed = fit_stacker(file, *given, rows=rows)
    again = fit_stacker(file, *given, rows=rows)
    assert streamed.model == again.model
    held = fit_stacker(features, *given, rows=rows)
    others = np.flatnonzero(table.folds == 0)
    said = [each.predict(source, others) for each, source in ((streamed, file), (held, features))]
    np.testing.assert_array_equal(streamed.predict(features[others]), said[0])
    assert abs(streamed.rounds - held.rounds) <= 5
    assert metrics.argmax_macro_f1(said[0], table.labels[others]) == pytest.approx(
        metrics.argmax_macro_f1(said[1], table.labels[others]), abs=0.06
    )
    (tmp_path / "other.parquet").write_text("hello")
    with pytest.raises(DataError, match=r"other\.parquet: not a file of the stacker's columns"):
        ColumnFile(tmp_path / "other.parquet")


def test_shap_values_add_up_to_the_scores(table: OofTable) -> None:
    features, names = stack_features(table)
    stacker = fit(table, rounds=6)
    values = stacker.contributions(features)
    assert values is not None and values.shape == (len(table), len(DIAGNOSES), len(names))
    scores = np.log(stacker.predict(features))
    # Scores are known up to a constant a row (the softmax) and an expected score a diagnosis.
    rest = scores - values.sum(axis=2)
    rest = rest - rest.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(rest, np.broadcast_to(rest[:1], rest.shape), atol=1e-4)
    assert (
        fit(table, rounds=2, config=QUICK.model_copy(update={"booster": "multi_output"})).contributions(features)
        is None
    )


def test_wide_columns_are_reduced_inside_the_fit(table: OofTable, tmp_path: Path) -> None:
    """Axes come from the training rows: what other rows hold changes nothing; the file brings them back."""
    features, names = stack_features(table)
    generator = np.random.default_rng(0)
    told = 3 * np.eye(40)[:11][table.labels] + generator.normal(size=(len(table), 40))
    both = np.concatenate([features, told.astype(np.float32)], axis=1)
    rows = np.flatnonzero(table.folds != 0)
    config = QUICK.model_copy(update={"components": 12})

    def fit_wide(values: np.ndarray) -> Stacker:
        return fit_stacker(
            values,
            table.labels,
            table.groups,
            names,
            table.diagnoses,
            config,
            rows=rows,
            rounds=5,
            extra="tower",
            wide=40,
        )

    stacker = fit_wide(both)
    assert len(stacker.feature_names) == len(names) + 12
    other = both.copy()
    other[table.folds == 0, -40:] = 99.0
    assert fit_wide(other).model == stacker.model
    stacker.save(tmp_path / "stack.ubj")
    loaded = Stacker.load(tmp_path / "stack.ubj")
    np.testing.assert_array_equal(loaded.predict(both), stacker.predict(both))
    fit(table, rounds=2).save(tmp_path / "stack.ubj")
    assert not (tmp_path / "stack.safetensors").exists()


def test_extra_columns_are_kept_only_where_they_gain() -> None:
    labels, folds = np.tile(np.arange(11), 6), np.repeat(np.arange(3), 22)

    def nested(right: float, seed: int) -> NestedStack:
        """Probabilities that know the diagnosis of so many of the lesions."""
        generator = np.random.default_rng(seed)
        told = np.where(generator.random((66, 1)) < right, np.eye(11)[labels], generator.random((66, 11)) / 11)
        return NestedStack(told, dict.fromkeys(range(3), told), dict.fromkeys(range(3), seed))

    plain, worse, better = nested(0.5, 1), nested(0.2, 2), nested(0.9, 3)
    variants = {"plain": plain, "worse": worse, "better": better}
    name, kept, scores = keep_what_gains(variants, labels, folds)
    assert name == "better" and scores["worse"] < scores["plain"] < scores["better"]
    np.testing.assert_array_equal(kept.out_of_fold, better.out_of_fold)
    assert kept.rounds == {0: 3, 1: 3, 2: 3}
    assert keep_what_gains({"plain": plain, "twin": plain}, labels, folds)[0] == "plain"
    # What is better on fold 0 alone is not chosen for fold 0: its labels have no say there.
    inside = folds == 0
    lucky = plain.out_of_fold.copy()
    lucky[inside] = np.eye(11)[labels[inside]]
    lucky[~inside] = worse.out_of_fold[~inside]
    other = NestedStack(lucky, dict.fromkeys(range(3), lucky), plain.rounds)
    _, kept, _ = keep_what_gains({"plain": plain, "lucky": other}, labels, folds)
    np.testing.assert_array_equal(kept.out_of_fold[inside], plain.out_of_fold[inside])


def test_threads_follow_the_work_and_the_cores(monkeypatch) -> None:
    monkeypatch.setattr("triderm_dist.ensemble.stacker.openmp_threads", lambda: 16)
    assert threads_for(5_000, 84) == 1
    assert threads_for(5_000, 1_600) == 2
    assert threads_for(1_000_000, 60) == 15
    assert threads_for(1_000_000, 60, side_by_side=8) == 2
