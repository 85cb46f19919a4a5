"""Models of XGBoost are read and evaluated without it."""

import subprocess
import sys

import numpy as np
import pytest

from tests.ensemble.conftest import training_rows
from tests.processes import HANG_SECONDS, ROOT
from triderm_dist.config import StackConfig
from triderm_dist.ensemble.boosted_trees import BoostedTrees
from triderm_dist.ensemble.xgboost_stacker import XGBoostStacker, import_xgboost
from triderm_dist.schema import DataError


def fitted(table, **settings) -> XGBoostStacker:
    quick = {"max_rounds": 20, "early_stopping": 5, "learning_rate": 0.4, "device": "cpu"} | settings
    return XGBoostStacker.fit(training_rows(table), StackConfig(**quick), seed=0)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_margins_are_those_of_xgboost_bit_for_bit(table, depth):
    stacker = fitted(table, max_depth=depth)
    trees = BoostedTrees.read(stacker.model)
    assert trees is not None and trees.depth <= depth
    generator = np.random.default_rng(0)
    columns = training_rows(table).columns()
    columns = np.concatenate([columns, generator.normal(size=columns.shape, scale=4).astype(np.float32)])
    columns[generator.random(columns.shape) < 0.2] = np.nan
    booster = import_xgboost().Booster({"nthread": 1}, model_file=bytearray(stacker.model))
    margins = booster.inplace_predict(columns, predict_type="margin", validate_features=False)
    assert np.array_equal(trees._margins(columns), margins)
    expected = booster.inplace_predict(columns, validate_features=False)
    np.testing.assert_allclose(trees.predict(columns), expected, atol=2e-7)
    np.testing.assert_allclose(stacker.predict(columns), expected, atol=2e-7)
    assert trees.predict(columns[:0]).shape == (0, 11)


def test_rows_are_evaluated_in_parts(table, monkeypatch):
    trees, columns = BoostedTrees.read(fitted(table).model), training_rows(table).columns()
    assert trees is not None
    whole = trees.predict(columns)
    monkeypatch.setattr("triderm_dist.ensemble.boosted_trees.CELLS", 7 * len(trees.first))
    assert np.array_equal(trees.predict(columns), whole)


def test_other_kinds_of_models_are_left_to_xgboost(table):
    stacker = fitted(table, booster="multi_output")
    assert BoostedTrees.read(stacker.model) is None and stacker.needed() == ("xgboost",)
    assert stacker.predict(training_rows(table).columns()).shape == (len(table), 11)
    assert fitted(table).needed() == ()


def test_other_bytes_are_refused(table):
    model = fitted(table).model
    for wrong in (b"", b"{", b"no model", model[:100], model[: len(model) // 2], b"{}", b"[i\x01i\x02]"):
        with pytest.raises(DataError, match="not a model of XGBoost"):
            BoostedTrees.read(wrong)


def test_predicting_does_not_import_xgboost(table, tmp_path):
    model = tmp_path / "stack.ubj"
    model.write_bytes(fitted(table).model)
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from triderm_dist.ensemble.xgboost_stacker import XGBoostStacker\n"
        "sys.modules['xgboost'] = None\n"
        "stacker = XGBoostStacker.load(Path(sys.argv[1]), {'rounds': 1, 'device': 'cpu', 'gain': {}})\n"
        f"assert stacker.predict(np.zeros((2, {training_rows(table).width}))).shape == (2, 11)\n"
        "assert not {'sklearn', 'pandas'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(model)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
