"""Fast settings for stacking, and synthetic members and rows."""

from pathlib import Path

import numpy as np
import pytest

from tests.synthetic_run import write_run
from triderm_dist.checksums import read_checked_json, write_checked_json
from triderm_dist.config import EnsembleConfig, Experiment, StackConfig, load
from triderm_dist.ensemble.stack_inputs import base_columns, column_names
from triderm_dist.ensemble.stacker import TrainingRows
from triderm_dist.predictions import OofTable, read_oof
from triderm_dist.schema import DIAGNOSES

QUICK = EnsembleConfig(bootstrap=100, rounds=10)


def experiment(folder: Path, use: str = "ensemble", **change) -> Experiment:
    """Return an experiment with fast stacking. use: `ensemble.use`; `change` sets keys of `stack`."""
    quick = {"max_rounds": 14, "early_stopping": 4, "learning_rate": 0.4, "device": "cpu"}
    return load(Experiment).model_copy(
        update={
            "output": str(folder),
            "ensemble": EnsembleConfig(use=use, bootstrap=100, rounds=8),
            "stack": StackConfig(**(quick | change)),  # type: ignore[arg-type]
        }
    )


def without_file_hashes(run: Path) -> None:
    """Let other files of the fit replace those of a run, as in a run of a version that recorded no hashes of them."""
    path = run / "ensemble.json"
    write_checked_json(path, {key: value for key, value in read_checked_json(path).items() if key != "files"})


def members_of(labels: np.ndarray, skills: list[float], seed: int = 0) -> list[np.ndarray]:
    """Return probabilities (N, C) per member, from logits of `skill` at the label plus normal noise."""
    generator, C = np.random.default_rng(seed), len(DIAGNOSES)
    tables = []
    for skill in skills:
        logits = skill * np.eye(C)[labels] + generator.normal(size=(len(labels), C))
        tables.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    return tables


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> OofTable:
    """The out-of-fold table of a synthetic run: two models, three folds, 330 lesions."""
    folder = tmp_path_factory.mktemp("stack")
    write_run(folder, 330)
    return read_oof(folder / "oof.parquet")


def training_rows(table: OofTable, labels: np.ndarray | None = None, **change) -> TrainingRows:
    """Return the labeled rows of the table; `change` replaces fields."""
    labels = table.labels if labels is None else labels
    rows = TrainingRows(
        source=base_columns(table),
        indices=np.arange(len(table)),
        labels=labels,
        groups=table.groups,
        names=column_names(table),
        diagnoses=table.diagnoses,
    )
    return type(rows)(**(vars(rows) | change)).take(labels >= 0)
