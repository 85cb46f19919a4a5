"""The settings of the fine-tuning recipe change nothing with the split of the global batch, and resume bit for bit."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.processes import WORKERS, launch
from triderm_dist.monitoring.metrics_log import read_metrics

from .test_one_global_batch import CHECKPOINTED, COMPILED, assert_equal, steps

SETTINGS = """
data: {folds: 2}
train:
  epochs: 4
  global_batch: 24
  log_every: 1
  trackers: []
  swa_epochs: 2
  augment:
    aspect: 0.2
    clinical_strength: 1.5
    mixup: 0.4
    cutmix: 1.0
    unmixed_epochs: 1
    extra: {blur: {clinical: 1}, cutout: {dermoscopic: 0.4}, hue: {clinical: 20}, noise: {dermoscopic: 0.05}}
  loss: {label_smoothing: 0.05}
  optim: {lr: 4e-5, warmup_epochs: 1, head_lr_multiple: 2.5, unfreeze_epochs: 0.5}
models:
  tri:
    width: 32
    heads: 2
    tower:
      source: timm:test_vit
      pretrained: false
      image_size: 32
      freeze_clinical: 0
      freeze_dermoscopic: 2
      drop_path: 0.3
      frame: squash
"""


@pytest.fixture(scope="module")
def undivided(packed, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undivided") / "single"
    return steps(SETTINGS, folder, packed, "single", 1, [(24,), (6,)])


def test_micro_batch_changes_nothing(undivided):
    assert_equal(undivided[6,], undivided[24,], 6)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_ranks_and_strategy_change_nothing(undivided, packed, tmp_path, strategy):
    for split, result in steps(SETTINGS, tmp_path / "run", packed, strategy, 2, [(6,)]).items():
        assert_equal(result, undivided[24,], split)


@pytest.mark.slow
def test_compiled_and_checkpointed_blocks_draw_the_same(undivided, packed, tmp_path):
    splits = [(6, *COMPILED), (6, *CHECKPOINTED)]
    for split, result in steps(SETTINGS, tmp_path / "run", packed, "single", 1, splits).items():
        assert_equal(result, undivided[24,], split)


def test_resume_is_bit_for_bit(undivided, packed, tmp_path):
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    job = {
        "config": str(tmp_path / "settings.yaml"),
        "settings": [f"data.shards={packed}", f"output={tmp_path / 'run'}", "train.micro_batch=24"],
    }
    launch(str(WORKERS / "relay_worker.py"), str(tmp_path), json.dumps([{**job, "stop": 0}] * 4 + [job]), ranks=1)
    assert json.loads((tmp_path / "relay-0.json").read_text())[-1] == "done"
    losses, weights = undivided[24,]
    fold = Path(tmp_path / "run" / "tri" / "fold-0")
    lines = {line["step"]: line["loss"] for line in read_metrics(fold / "metrics.jsonl") if line["kind"] == "train"}
    assert [*lines.values()] == losses
    resumed = load_file(fold / "weights.safetensors")
    assert all(bool((resumed[name] == tensor).all()) for name, tensor in weights.items())
