"""Two stacked runs of synthetic predictions with their reports. Tests that change one copy it first."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.browser import browser  # noqa: F401
from tests.ensemble.conftest import experiment
from tests.synthetic_run import CLINIC, write_run
from triderm_dist.config import save
from triderm_dist.ensemble.fit import fit_ensemble
from triderm_dist.predictions import read_oof, write_oof
from triderm_dist.report import write_report


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run of MILK10k's diagnoses, with settings, learning curves and a scored test set."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    config = experiment(folder)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"source": str(folder / "data" / "train")})}
    )
    fit_ensemble(folder, config)
    save(config, folder / "config.yaml")
    for fold in range(3):
        lines = [
            {"kind": "train", "epoch": 0.5, "step": 5, "loss": 2.0 - fold / 10, "lr": 1e-3, "grad_norm": 1.0},
            {"kind": "validation", "epoch": 1, "step": 10, "macro_f1": 0.3, "official": 0.2},
        ]
        text = "\n".join(json.dumps(line) for line in lines)
        truncated = '\n{"kind": "tra'  # as left by a process killed while writing
        (folder / "trimodal" / f"fold-{fold}" / "metrics.jsonl").write_text(text + truncated)
    held_out = {"macro_f1": 0.4321, "interval": [0.4, 0.47], "argmax": 0.43, "n": 150, "absent": ["INF"]}
    (folder / "heldout.json").write_text(json.dumps(held_out))
    write_report(folder)
    return folder


@pytest.fixture(scope="session")
def clinic(tmp_path_factory) -> Path:
    """A run of a task with one view and no concepts, whose names need escaping; some lesions share a group."""
    folder = tmp_path_factory.mktemp("clinic")
    write_run(folder, 260, task=CLINIC)
    fit_ensemble(folder, experiment(folder))
    table = read_oof(folder / "oof.parquet")
    groups = np.where(table.folds == 0, "patient-0", table.groups)
    write_oof(folder / "oof.parquet", replace(table, groups=groups))
    write_report(folder)
    return folder
