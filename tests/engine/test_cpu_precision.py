"""The precision of a training on a CPU: measured once, kept in the run, and used by the training alone."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from triderm_dist.checksums import write_checked_json
from triderm_dist.config import Experiment, ModelConfig, load
from triderm_dist.engine import cpu_precision
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.cpu_precision import FILE, choose, measure
from triderm_dist.engine.crossval import run_folds
from triderm_dist.models import build_network
from triderm_dist.models.network import Network
from triderm_dist.models.towers import TokenShape
from triderm_dist.predictions import read_predictions
from triderm_dist.schema import CheckpointError
from triderm_dist.tasks import milk10k_task


def network(width: int = 16) -> Network:
    torch.manual_seed(0)
    model = ModelConfig(kind="trimodal", width=width, heads=2)
    return build_network(model, milk10k_task().signature(("dermoscopic/veil",)), TokenShape(4, 24))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network is measured, on any CPU, as shortly as possible."""
    monkeypatch.setattr(cpu_precision, "has_bf16", lambda: True)
    monkeypatch.setattr(cpu_precision, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(cpu_precision, "SECONDS", 0.0)


def test_precision_is_measured_once_and_kept(measured: None, tmp_path: Path) -> None:
    precision, why = choose(network(), 4, tmp_path)
    kept = json.loads((tmp_path / FILE).read_text())
    assert precision == kept["precision"] and f"{kept['reason']}; kept in {FILE}" == why
    gain = kept["seconds"]["fp32"] / kept["seconds"]["bf16"]
    assert precision == ("bf16" if gain >= cpu_precision.LEAST_GAIN else "fp32")
    other = "fp32" if precision == "bf16" else "bf16"
    write_checked_json(tmp_path / FILE, {**kept, "precision": other})
    assert choose(network(), 4, tmp_path)[0] == other
    write_checked_json(tmp_path / FILE, {**kept, "parameters": [1, 2]})  # of other settings of the model
    choose(network(), 4, tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["parameters"] == kept["parameters"]
    (tmp_path / FILE).write_text("{")
    with pytest.raises(CheckpointError, match=FILE):
        choose(network(), 4, tmp_path)


def test_measuring_changes_neither_the_network_nor_random_numbers(measured: None) -> None:
    measuring = network()
    before, state = {name: each.clone() for name, each in measuring.state_dict().items()}, torch.get_rng_state()
    names = [type(module) for module in measuring.modules()]
    assert set(measure(measuring, 4)) == {"fp32", "bf16"}
    assert all(torch.equal(each, before[name]) for name, each in measuring.state_dict().items())
    assert all(each.grad is None for each in measuring.parameters())
    assert [type(module) for module in measuring.modules()] == names
    assert torch.equal(torch.get_rng_state(), state)


def test_short_steps_other_cpus_and_earlier_trainings_are_fp32(
    measured: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_precision, "LEAST_SECONDS", 1e3)
    reason = "no GPU, and steps are too short to gain from bf16"
    assert choose(network(), 4, tmp_path / "short") == ("fp32", f"{reason}; kept in {FILE}")
    monkeypatch.setattr(cpu_precision, "LEAST_SECONDS", 0.0)
    assert choose(network(), 4, tmp_path / "short") == ("fp32", f"{reason}; kept in {FILE}")
    (tmp_path / "fold-0").mkdir()
    (tmp_path / "fold-0" / "fold.json").write_text("{}")
    assert choose(network(), 4, tmp_path)[0] == "fp32"
    monkeypatch.setattr(cpu_precision, "has_bf16", lambda: False)
    assert choose(network(), 4, tmp_path / "other")[0] == "fp32"
    assert [path.parent.name for path in tmp_path.rglob(FILE)] == ["short"]


def test_trainings_that_begin_together_take_the_choice_of_the_first(measured: None, tmp_path: Path) -> None:
    measurements = []

    def slow(*arguments: Any) -> dict[str, float]:
        measurements.append(threading.current_thread())
        time.sleep(0.1)  # the others arrive meanwhile
        return {"fp32": 1.0, "bf16": 0.5 if len(measurements) == 1 else 1.0}

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(cpu_precision, "measure", slow)
        choices = list(pool.map(lambda _: choose(network(), 4, tmp_path)[0], range(3)))
    assert choices == ["bf16"] * 3 and len(measurements) == 1


def test_training_takes_the_kept_precision_and_predictions_are_fp32(tmp_path: Path) -> None:
    index = synthetic_shards(tmp_path / "shards", 24, 40)
    tower = "{source: 'timm:test_efficientnet', pretrained: false, image_size: 32, frozen: true}"

    def train(name: str, precision: str) -> Path:
        words = [
            f"output={tmp_path / name}", "data.folds=2", f"models.cnn={{kind: dual_cnn, width: 16, tower: {tower}}}",
            f"train={{epochs: 1, global_batch: 8, micro_batch: 8, trackers: [], precision: {precision}, log_every: 1}}",
        ]  # fmt: skip
        experiment = load(Experiment, None, words)
        if precision == "auto":
            trained = build_network(experiment.models["cnn"], index.signature, TokenShape(1, 256))
            size = sum(each.numel() for each in trained.parameters())
            kept = {"precision": "bf16", "reason": "measured", "parameters": [size, size]}
            (tmp_path / name / "cnn").mkdir(parents=True)
            write_checked_json(tmp_path / name / "cnn" / FILE, kept)
        run_folds(experiment, index, ["cnn"], [0])
        return tmp_path / name / "cnn" / "fold-0"

    losses = {}
    for precision in ("auto", "bf16", "fp32"):
        lines = map(json.loads, (train(precision, precision) / "metrics.jsonl").read_text().splitlines())
        losses[precision] = [line["loss"] for line in lines if "loss" in line]
    assert losses["auto"] == losses["bf16"] != losses["fp32"]
    in_fp32, in_bf16 = (
        read_predictions(tmp_path / name / "cnn" / "fold-0" / "predictions.parquet").logits for name in ("auto", "bf16")
    )
    assert (in_fp32 != in_bf16).any()
    assert abs(in_fp32 - in_bf16).max() < 0.05
