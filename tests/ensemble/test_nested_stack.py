"""Nested out-of-fold probabilities of the stacker, without leakage of labels between folds."""

import numpy as np

from tests.ensemble.conftest import training_rows
from triderm_dist import metrics
from triderm_dist.config import StackConfig
from triderm_dist.ensemble.fitted_stacker import fit_stacker
from triderm_dist.ensemble.nested_stack import NestedStack, choose_columns, nested_stack
from triderm_dist.predictions import OofTable

QUICK = StackConfig(max_rounds=20, early_stopping=5, learning_rate=0.4, device="cpu")


def test_nested_stack_learns(table: OofTable) -> None:
    stacked = nested_stack(training_rows(table), table.folds, QUICK).out_of_fold
    assert metrics.argmax_macro_f1(stacked, table.labels) > 0.6


def test_labels_of_a_fold_do_not_affect_fits_without_it(table: OofTable) -> None:
    """With changed labels in fold 0, everything fitted without fold 0 is bit-identical."""
    inside = table.folds == 0
    poisoned = table.labels.copy()
    poisoned[inside] = np.roll(poisoned[inside], 1)
    before, after = (
        nested_stack(training_rows(table, labels), table.folds, QUICK) for labels in (table.labels, poisoned)
    )
    np.testing.assert_array_equal(before.without[0], after.without[0])
    np.testing.assert_array_equal(before.out_of_fold[inside], after.out_of_fold[inside])
    assert (before.out_of_fold[~inside] != after.out_of_fold[~inside]).any()
    for fold in range(3):
        rows = table.folds == fold
        np.testing.assert_array_equal(before.without[fold][rows], before.out_of_fold[rows])
        assert np.isfinite(before.without[fold]).all()


def test_nested_stack_equals_one_fit_after_the_other(table: OofTable) -> None:
    table = table.take(np.arange(150))
    rows, nested = training_rows(table), nested_stack(training_rows(table), table.folds, QUICK, seed=3)
    for fold in range(3):
        others = table.folds != fold
        own = fit_stacker(rows.take(others), QUICK, seed=3)
        expected = own.predict(rows.source)
        np.testing.assert_array_equal(nested.out_of_fold[~others], expected[~others])
        assert nested.stackers[fold].model.model == own.model.model  # type: ignore[attr-defined]
        for other in {0, 1, 2} - {fold}:
            inside = table.folds == other
            expected[inside] = fit_stacker(rows.take(others & ~inside), QUICK, seed=3).predict(rows.source)[inside]
        np.testing.assert_array_equal(nested.without[fold], expected)


def test_two_folds_suffice(table: OofTable) -> None:
    two = table.take(table.folds != 2)
    nested = nested_stack(training_rows(two), two.folds, QUICK)
    assert np.isfinite(nested.out_of_fold).all() and np.isfinite(nested.without[0]).all()


def test_extra_columns_are_kept_only_if_they_improve_the_score() -> None:
    labels, folds = np.tile(np.arange(11), 6), np.repeat(np.arange(3), 22)

    def nested(accuracy: float, seed: int) -> NestedStack:
        """Return probabilities that are right for a share `accuracy` of the lesions, and random for the others."""
        generator = np.random.default_rng(seed)
        right = generator.random((66, 1)) < accuracy
        table = np.where(right, np.eye(11)[labels], generator.random((66, 11)) / 11)
        return NestedStack(table, dict.fromkeys(range(3), table), dict.fromkeys(range(3), f"stacker {seed}"))

    plain, worse, better = nested(0.5, 1), nested(0.2, 2), nested(0.9, 3)
    variants = {"plain": plain, "worse": worse, "better": better}
    name, kept, scores = choose_columns(variants, labels, folds)
    assert name == "better" and scores["worse"] < scores["plain"] < scores["better"]
    np.testing.assert_array_equal(kept.out_of_fold, better.out_of_fold)
    assert kept.stackers == better.stackers
    assert choose_columns({"plain": plain, "twin": plain}, labels, folds)[0] == "plain"
    # An improvement on fold 0 only is not selected for fold 0, whose labels are not used for its selection.
    inside = folds == 0
    table = plain.out_of_fold.copy()
    table[inside] = np.eye(11)[labels[inside]]
    table[~inside] = worse.out_of_fold[~inside]
    lucky = NestedStack(table, dict.fromkeys(range(3), table), dict.fromkeys(range(3), "stacker 4"))
    name, kept, _ = choose_columns({"plain": plain, "lucky": lucky}, labels, folds)
    np.testing.assert_array_equal(kept.out_of_fold[inside], plain.out_of_fold[inside])
    assert name == "plain" and kept.stackers == plain.stackers
