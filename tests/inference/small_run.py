"""A run of 24 synthetic lesions: two models with small towers, two folds, stacker and ensemble, trained in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.inference.small_tower import SIZE
from tests.small_tasks import TASKS
from triderm_dist.config import CONFIG_FILE, Experiment, load, save
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.fold import assigned_folds
from triderm_dist.ensemble.fit import fit_ensemble
from triderm_dist.predictions import DataSplit, gather, write_oof
from triderm_dist.schema import Task

MODELS = (
    "models.trimodal={width: 16, heads: 2, tower: {source: 'small:', pretrained: false, frozen: true}}",
    "models.dual_cnn={kind: dual_cnn, width: 16, tower: {source: 'small:', pretrained: false}, head: sigmoid}",
)
QUICK = (
    "data.folds=2",
    "data.short_side=null",
    "train={epochs: 1, global_batch: 8, micro_batch: 4, trackers: [], precision: fp32}",
    "stack={max_rounds: 2, device: cpu}",
    "ensemble={use: ensemble, rounds: 1, bootstrap: 10}",
    "predict={transforms: 2, batch: 8}",
)


def train(
    folder: Path, models: Sequence[str] = MODELS, task: Task = TASKS["everything"], shards: str = "shards"
) -> Path:
    """Train a run in FOLDER/run on FOLDER/SHARDS and return its folder.

    `TOWER_SOURCES` must have `SMALL_TOWER` as `small`.
    """
    index = synthetic_shards(folder / shards, 24, 2 * SIZE, task)
    words = [*models, *QUICK, f"output={folder / 'run'}", f"data.shards={index.folder}"]
    run = load(Experiment, None, words)
    run_folds(run, index, list(run.models), range(2))
    save(run, run.folder / CONFIG_FILE)
    data = DataSplit(index.lesion_ids, index.labels, assigned_folds(index, run.data), index.task)
    write_oof(run.folder / "oof.parquet", gather(run.folder, tuple(run.models), data))
    fit_ensemble(run.folder, run)
    return run.folder
