"""A training with dropout is the same however its global batch is split, under every strategy."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.processes import WORKERS, launch
from triderm_dist.monitoring.metrics_log import read_metrics

WORKER = str(WORKERS / "relay_worker.py")
SETTINGS = """
data: {folds: 2}
train:
  epochs: 2
  global_batch: 24
  log_every: 1
  trackers: []
  optim: {lr: 1e-4, warmup_epochs: 1}
models:
  tri:
    width: 32
    heads: 2
    dropout: 0.1
    tower: {source: "timm:test_vit", pretrained: false, image_size: 32, freeze_clinical: 0, freeze_dermoscopic: 2}
"""
CHECKPOINTED = ("train.activation_checkpointing=true",)
COMPILED = ("train.compile=true",)
PREVIOUS = ("train.loss.soft_f1_sums=previous",)
AVERAGED = ("train.ema_decay=0.9", "train.save_every_seconds=1e9")


def steps(settings: str, folder: Path, packed: Path, strategy: str, ranks: int, splits: list[tuple]) -> dict:
    """Train once for each split (micro-batch, *settings); return losses and weights by split."""
    folder.mkdir()
    (folder / "settings.yaml").write_text(settings)
    jobs = [
        {
            "config": str(folder / "settings.yaml"),
            "settings": [
                f"data.shards={packed}",
                f"output={folder / str(number)}",
                f"train.micro_batch={micro}",
                *more,
            ],
            "stop": None,
        }
        for number, (micro, *more) in enumerate(splits)
    ]
    config = None if strategy == "single" else f"accelerate_configs/{strategy}.yaml"
    launch(WORKER, str(folder), json.dumps(jobs), ranks=ranks, config=config)
    result = {}
    for number, split in enumerate(splits):
        fold = folder / str(number) / "tri" / "fold-0"
        lines = read_metrics(fold / "metrics.jsonl")
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        result[split] = losses, load_file(fold / "weights.safetensors")
    return result


def assert_equal(got: tuple, expected: tuple, split: object) -> None:
    (losses, weights), (expected_losses, expected_weights) = got, expected
    assert len(losses) == len(expected_losses) >= 6
    assert losses == pytest.approx(expected_losses, abs=1e-6), split
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        difference = (tensor - expected_weights[name]).abs().max().item()
        assert difference <= 1e-5, f"{split}: {name} differs by {difference}"


@pytest.fixture(scope="module")
def undivided(packed, tmp_path_factory) -> dict:
    """One process: the batch as a whole and in parts, with and without activation checkpointing."""
    folder = tmp_path_factory.mktemp("undivided") / "single"
    splits = [(24,), (6,), (1,), (6, *CHECKPOINTED), (24, "models.tri.dropout=0")]
    splits += [(24, *PREVIOUS), (6, *PREVIOUS), (24, *AVERAGED)]
    return steps(SETTINGS, folder, packed, "single", 1, splits)


def test_micro_batch_and_checkpointing_change_nothing(undivided):
    for split in [(6,), (1,), (6, *CHECKPOINTED)]:
        assert_equal(undivided[split], undivided[24,], split)
    assert undivided[24, "models.tri.dropout=0"][0] != pytest.approx(undivided[24,][0], abs=1e-3)


@pytest.mark.parametrize(
    "strategy, ranks",
    [
        ("ddp", 2),
        pytest.param("ddp", 4, marks=pytest.mark.slow),
        ("fsdp2", 2),
        pytest.param("fsdp2", 4, marks=pytest.mark.slow),
        pytest.param("deepspeed_zero2", 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_and_strategy_change_nothing(undivided, packed, tmp_path, strategy, ranks):
    micro = 24 // ranks
    splits = [(micro,), (micro // 2, *CHECKPOINTED)]
    if strategy == "ddp":  # the others gather the weights for each micro-batch, which takes long
        splits += [(1,), (micro, *PREVIOUS)]
    if strategy == "fsdp2":  # gathered weights must not stay those of the average after a validation without a save
        splits.append((micro, *AVERAGED))
    for split, result in steps(SETTINGS, tmp_path / "run", packed, strategy, ranks, splits).items():
        assert_equal(result, undivided[24, *split[1:]] if split[1:] in (PREVIOUS, AVERAGED) else undivided[24,], split)


def test_previous_sums_are_those_of_the_step_before_with_one_micro_batch_too(undivided):
    assert_equal(undivided[6, *PREVIOUS], undivided[24, *PREVIOUS], PREVIOUS)
    assert undivided[24, *PREVIOUS][0] != pytest.approx(undivided[24,][0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy, ranks", [("single", 1), ("ddp", 2), ("fsdp2", 2), ("deepspeed_zero2", 2)])
def test_compiled_blocks_draw_the_same(undivided, packed, tmp_path, strategy, ranks):
    splits = [(12, *COMPILED), (6, *COMPILED, *CHECKPOINTED)]  # the same for all, which share compiled kernels
    for split, result in steps(SETTINGS, tmp_path / "run", packed, strategy, ranks, splits).items():
        assert_equal(result, undivided[24,], split)
