"""Whole trainings on a GPU: losses as on a CPU, loss scaling, a killed training, and every stage of a run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.compare_losses import ACROSS_MACHINES, largest_difference, losses
from tests.gpu.training import batches, create_trainer, on_cpu, settings, take_steps, words_of
from tests.processes import ROOT, WORKERS, launch
from tests.trained_run import train_run
from triderm_dist.commands.predict import PredictRun
from triderm_dist.commands.predict import main as predict
from triderm_dist.config import Experiment, load
from triderm_dist.data.shards.index import read_index
from triderm_dist.distributed import parallel
from triderm_dist.engine.crossval import run_folds
from triderm_dist.predictions import read_predictions


@pytest.mark.usefixtures("exact_fp32")
@pytest.mark.parametrize("name", ["trimodal", "dual_cnn"])
def test_losses_are_those_of_a_cpu(name: str, shards: Path, tmp_path: Path) -> None:
    """The trainings of tests/golden_losses; the photos, and so the losses, depend on the version of Pillow."""

    def train(device: str, *words: str) -> dict[int, float]:
        words = ("train.precision=fp32", f"output={tmp_path / device}", *words)
        experiment = load(Experiment, ROOT / "tests" / "golden_losses" / f"{name}.yaml", words)
        run_folds(experiment, read_index(shards), ["golden"], [0])
        return losses(tmp_path / device / "golden" / "fold-0" / "metrics.jsonl")

    with on_cpu():
        expected = train("cpu")
    for graph in ("false", "true"):
        difference, step = largest_difference(train(f"gpu-{graph}", f"train.graph={graph}"), expected)
        assert difference < ACROSS_MACHINES, f"train.graph={graph}, step {step}"


def test_steps_at_too_large_a_loss_scale_are_skipped(shards: Path, tmp_path: Path) -> None:
    words = ("train.precision=fp16", "train.micro_batch=16", "train.graph=auto")
    trainer = create_trainer(settings("trimodal", *words), shards, tmp_path)
    scaler = trainer.accelerator.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**36})
    weights = [p for p in parallel.unwrap(trainer.training.wrapped).parameters() if p.requires_grad]
    first = [p.detach().clone() for p in weights]
    steps = batches(trainer)
    take_steps(trainer, steps, 2)
    assert scaler.get_scale() == 2.0**34
    assert all(torch.equal(before, p) for before, p in zip(first, weights, strict=True))
    after = take_steps(trainer, steps, 24)
    assert scaler.get_scale() < 2.0**30
    assert any(not torch.equal(before, p) for before, p in zip(first, weights, strict=True))
    assert all(torch.isfinite(p).all() for p in weights) and np.isfinite(after[-1])


def test_killed_training_resumes_within_rounding(shards: Path, tmp_path: Path) -> None:
    words = words_of("trimodal", "train.precision=fp32", "train.epochs=2", "data.folds=2", "train.save_every=2")
    words += ["train.log_every=1", f"data.shards={shards}"]
    job = {"config": None, "settings": [*words, f"output={tmp_path / 'killed'}"], "kill": ["rename", 2]}
    killed = launch(str(WORKERS / "kill_worker.py"), json.dumps([job]), fork=False)
    assert json.loads(killed.stdout.splitlines()[-1]) == [-signal.SIGKILL]
    assert not (tmp_path / "killed" / "net" / "fold-0" / "fold.json").exists()
    results = []
    for name in ("killed", "whole"):
        experiment = load(Experiment, None, [*words, f"output={tmp_path / name}"])
        run_folds(experiment, read_index(shards), ["net"], [0])
        folder = tmp_path / name / "net" / "fold-0"
        results.append((losses(folder / "metrics.jsonl"), read_predictions(folder / "predictions.parquet").logits))
    (resumed, first), (whole, second) = results
    assert largest_difference(resumed, whole)[0] < 1e-3
    np.testing.assert_allclose(first, second, atol=1e-2)


def test_every_stage_of_a_run_predicts_as_on_a_cpu(tmp_path: Path) -> None:
    """Two networks in two folds, stacker and ensemble; then photos are predicted on the GPU and on the CPU."""
    run = train_run(tmp_path)
    tables = []
    for device in ("cuda", "cpu"):
        words = [f"run={run.folder}", f"input={run.test.folder}", f"output={tmp_path / device}", "tta=2"]
        predict(load(PredictRun, None, [*words, f"device={device}"]))
        tables.append(pd.read_parquet(tmp_path / device / "probabilities.parquet"))
    names = [name for name in tables[0].columns if tables[0][name].dtype.kind == "f"]
    assert len(tables[0]) == 10 and len(names) > 11
    np.testing.assert_allclose(tables[0][names], tables[1][names], atol=0.02)
