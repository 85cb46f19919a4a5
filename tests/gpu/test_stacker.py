"""XGBoost on a GPU against XGBoost on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ensemble.conftest import training_rows
from tests.synthetic_run import write_run
from triderm_dist.config import StackConfig
from triderm_dist.ensemble.fitted_stacker import fit_stacker
from triderm_dist.ensemble.stack_inputs import base_columns
from triderm_dist.metrics import argmax_macro_f1
from triderm_dist.predictions import read_oof


def test_stackers_of_gpu_and_cpu_are_equivalent_and_memory_is_freed(tmp_path: Path) -> None:
    pytest.importorskip("xgboost", reason="needs the extra stack")
    write_run(tmp_path, 330)
    table = read_oof(tmp_path / "oof.parquet")
    rows, columns = training_rows(table).take(table.folds != 0), base_columns(table)
    held_out = table.folds == 0
    scores, free = {}, []
    for device in ("cuda", "cpu", "cuda"):  # the second fit on the GPU finds the context and library of the first
        settings = StackConfig(max_rounds=20, early_stopping=5, learning_rate=0.4, device=device)
        stacker = fit_stacker(rows, settings)
        assert stacker.model.device == device
        scores[device] = argmax_macro_f1(stacker.predict(columns[held_out]), table.labels[held_out])
        free.append(torch.cuda.mem_get_info()[0])
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=0.06)
    assert scores["cuda"] > 2 / 11
    assert abs(free[2] - free[0]) < 64 * 2**20


def test_predictions_without_xgboost_are_those_of_the_gpu(tmp_path: Path) -> None:
    xgboost = pytest.importorskip("xgboost", reason="needs the extra stack")
    write_run(tmp_path, 330)
    table = read_oof(tmp_path / "oof.parquet")
    columns = base_columns(table)
    settings = StackConfig(max_rounds=10, early_stopping=5, learning_rate=0.4, device="cuda")
    stacker = fit_stacker(training_rows(table), settings)
    booster = xgboost.Booster({"device": "cuda"}, model_file=bytearray(stacker.model.model))
    names = booster.feature_names
    matrix = xgboost.DMatrix(columns, missing=np.nan, feature_names=names)
    np.testing.assert_allclose(stacker.model.predict(columns), booster.predict(matrix), atol=1e-5)
