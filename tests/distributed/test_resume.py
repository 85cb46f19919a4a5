"""A run killed at random moments and resumed equals an uninterrupted one bit for bit; golden losses are unchanged."""

import json
import random
import signal
from pathlib import Path

import pytest

from benchmarks.compare_losses import ACROSS_MACHINES, largest_difference, losses
from tests.processes import ROOT, WORKERS, launch
from triderm_dist.monitoring.metrics_log import read_metrics

from .conftest import TINY_TRIMODAL

GOLDEN = ROOT / "tests" / "golden_losses"
WORKER = str(WORKERS / "kill_worker.py")
SETTINGS = """
data: {folds: 2}
train:
  global_batch: 16
  micro_batch: 8
  log_every: 1
  save_every: 2
  select: last
  ema_decay: 0.9
  trackers: []
  sampling: {kind: shuffle}
  augment: {token_variants: 1}
  loss: {soft_f1_sums: previous}
  optim: {lr: 1e-3, warmup_epochs: 1}
"""
SETTINGS += TINY_TRIMODAL
MOMENTS = {"forward": 12, "write": 14, "rename": 4, "replace": 1}
"""Events at which a run is killed, and the latest occurrence: early enough that all kills precede the last epoch."""


def records(folder: Path) -> list[dict]:
    """Return the logged metrics of a run, without speed and memory."""
    varying = {"lesions_per_s", "data_wait", "memory_gib", "seconds", "seconds_left"}
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in varying} for line in lines]


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_run_killed_many_times_equals_uninterrupted_run(packed, tmp_path, kills):
    config = tmp_path / "tiny.yaml"
    config.write_text(SETTINGS)
    rng = random.Random(kills)
    events = [*MOMENTS, *(rng.choice([*MOMENTS]) for _ in range(kills - len(MOMENTS)))]
    moments = [None, *([event, rng.randint(1, MOMENTS[event])] for event in events), None]
    shared = [f"train.epochs={kills}", f"data.shards={packed}", f"tokens={tmp_path / 'tokens'}"]
    jobs = [
        {"config": str(config), "settings": [*shared, f"output={tmp_path / name}"], "kill": kill}
        for name, kill in zip(["uninterrupted", *["killed"] * (kills + 1)], moments, strict=True)
    ]
    done = launch(WORKER, json.dumps(jobs))
    assert json.loads(done.stdout.splitlines()[-1]) == [0, *[-signal.SIGKILL] * kills, 0]
    uninterrupted, killed = (tmp_path / name / "tri" / "fold-0" for name in ("uninterrupted", "killed"))
    assert len(records(uninterrupted)) == kills * 5  # four steps and one validation per epoch
    assert records(killed) == records(uninterrupted)
    weights = [json.loads((folder / "fold.json").read_text())["weights"] for folder in (uninterrupted, killed)]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "killed" / "tri").rglob("*.part"))


def test_golden_losses(packed, tmp_path):
    """Losses equal the recorded ones; after an intended change, record them with compare_losses keep=FILE."""
    names = sorted(path.stem for path in GOLDEN.glob("*.yaml"))
    jobs = [
        {"config": str(GOLDEN / f"{name}.yaml"), "settings": [f"data.shards={packed}", f"output={tmp_path / name}"]}
        for name in names
    ]
    launch(WORKER, json.dumps(jobs))
    assert {path.stem for path in GOLDEN.glob("*.jsonl")} == set(names)
    for name in names:
        got, golden = losses(tmp_path / name / "golden" / "fold-0" / "metrics.jsonl"), losses(GOLDEN / f"{name}.jsonl")
        difference, step = largest_difference(got, golden)
        assert difference <= ACROSS_MACHINES, f"{name}, step {step}: {got.get(step)} instead of {golden.get(step)}"
    # A difference in the third digit must be detected.
    assert largest_difference({**golden, 5: golden[5] * 1.003}, golden)[0] > ACROSS_MACHINES
