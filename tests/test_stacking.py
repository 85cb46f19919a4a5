from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.oof_table import write_run
from triderm_dist import metrics, oof, stacking
from triderm_dist.config import StackConfig
from triderm_dist.schema import DIAGNOSES, DataError

QUICK = StackConfig(max_rounds=60, early_stopping=8, learning_rate=0.3, device="cpu")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> oof.OofTable:
    folder = tmp_path_factory.mktemp("stack")
    write_run(folder, 330)
    return oof.read_oof(folder / "oof.parquet")


def fit(table: oof.OofTable, labels: np.ndarray | None = None, config: StackConfig = QUICK, **more) -> stacking.Stacker:
    features, names = stacking.stack_features(table)
    labels = table.labels if labels is None else labels
    known = labels >= 0
    return stacking.fit_stacker(
        features[known], labels[known], table.groups[known], names, table.diagnoses, config, **more
    )


def test_columns_mean_the_same_in_every_row(table: oof.OofTable) -> None:
    features, names = stacking.stack_features(table)
    assert features.shape == (len(table), len(names)) and len(set(names)) == len(names) == 2 * 3 * 11 + 14 + 4
    assert not any("feature" in name for name in names)
    column = features[:, names.index("trimodal/logit/MEL")]
    logits = table.logits["trimodal"].astype(float)
    log_p = logits[:, 7] - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(column, log_p, rtol=1e-4)
    assert np.isnan(features).sum() == np.isnan(table.concepts).sum() + np.isnan(table.metadata).sum()
    shifted = table.logits | {"trimodal": table.logits["trimodal"] + 3.0}
    other, _ = stacking.stack_features(replace(table, logits=shifted))
    np.testing.assert_allclose(other, features, atol=1e-5)  # an offset on all logits of a softmax says nothing


@pytest.mark.parametrize("booster", ["softprob", "multi_output"])
def test_a_fit_is_bit_identical_and_survives_its_file(table: oof.OofTable, tmp_path: Path, booster: str) -> None:
    config = QUICK.model_copy(update={"booster": booster, "max_rounds": 12})
    first, second = fit(table, config=config), fit(table, config=config)
    assert first.model == second.model and first.rounds == second.rounds
    first.save(tmp_path / "stack.ubj")
    loaded = stacking.Stacker.load(tmp_path / "stack.ubj")
    assert loaded == first
    features, _ = stacking.stack_features(table)
    probabilities = loaded.predict(features)
    np.testing.assert_array_equal(probabilities, first.predict(features))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stack.json", "stack.ubj"]


def test_it_learns_from_the_columns(table: oof.OofTable) -> None:
    features, names = stacking.stack_features(table)
    stacked = stacking.nested_stack(
        features, table.labels, table.groups, table.folds, names, table.diagnoses, QUICK
    ).out_of_fold
    assert metrics.argmax_macro_f1(stacked, table.labels) > 0.6


def test_absent_diagnoses_are_named_and_have_no_probability(table: oof.OofTable) -> None:
    labels = np.where(np.isin(table.labels, [2, 6]), -1, table.labels)
    stacker = fit(table, labels)
    assert stacker.absent == ("BEN_OTH", "MAL_OTH")
    features, _ = stacking.stack_features(table)
    probabilities = stacker.predict(features)
    assert (probabilities[:, [2, 6]] == 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    with pytest.raises(DataError, match="two diagnoses"):
        fit(table, np.where(table.labels == 1, 1, -1))


def test_no_label_of_a_fold_reaches_what_is_fitted_without_it(table: oof.OofTable) -> None:
    """Change the labels of fold 0: everything that claims not to know fold 0 stays as it was, bit for bit."""
    features, names = stacking.stack_features(table)

    def nested(labels: np.ndarray) -> stacking.NestedStack:
        return stacking.nested_stack(features, labels, table.groups, table.folds, names, table.diagnoses, QUICK)

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


def test_two_folds_are_enough(table: oof.OofTable) -> None:
    two = table.take(table.folds != 2)
    features, names = stacking.stack_features(two)
    nested = stacking.nested_stack(features, two.labels, two.groups, two.folds, names, two.diagnoses, QUICK)
    assert np.isfinite(nested.out_of_fold).all() and np.isfinite(nested.without[0]).all()


def test_parts_keep_groups_whole_and_diagnoses_even() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [90, 40, 9, 2])
    groups = np.array([f"g{i}" for i in range(len(labels))], object)
    groups[generator.choice(90, 20, replace=False)] = "patient"
    parts = stacking.split_parts(labels, groups, 5, seed=0)
    assert len(np.unique(parts[groups == "patient"])) == 1
    for label, least, most in ((1, 8, 8), (2, 1, 2), (3, 0, 1)):
        counts = np.bincount(parts[labels == label], minlength=5)
        assert least <= counts.min() and counts.max() <= most
    assert not (parts[labels == 3] == 0).any()  # too rare to be watched: it is needed for training


def test_a_gpu_that_is_not_there_is_refused_and_not_silently_a_cpu() -> None:
    import torch

    assert stacking.device_of(StackConfig(device="cpu")) == "cpu"
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert stacking.device_of(StackConfig(device="auto")) == "cpu"
    with pytest.raises(DataError, match="no GPU"):
        stacking.device_of(StackConfig(device="cuda"))


def test_a_stacker_of_other_columns_is_refused(table: oof.OofTable, tmp_path: Path) -> None:
    stacker = fit(table, rounds=2)
    assert stacker.rounds == 2
    with pytest.raises(DataError, match="84 columns, here are 3"):
        stacker.predict(np.zeros((2, 3), np.float32))
    with pytest.raises(DataError, match="no such file"):
        stacking.Stacker.load(tmp_path / "stack.ubj")
    assert stacker.diagnoses == DIAGNOSES
