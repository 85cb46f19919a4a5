"""launch.train in one process and on two DDP ranks, stopped and resumed; test_strategies.py has other strategies."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.processes import WORKERS, finish, interrupt_read, launch, start
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.predictions import read_predictions

SIGNAL_WORKER = str(WORKERS / "signal_worker.py")
SETTINGS = """
data: {folds: 2}
train:
  epochs: 2
  global_batch: 16
  micro_batch: 8
  log_every: 1
  save_every: 2
  optim: {lr: 1e-3, warmup_epochs: 1}
models:
  tri:
    width: 32
    heads: 2
    tower: {source: "timm:test_vit", pretrained: false, image_size: 32, freeze_clinical: 1, freeze_dermoscopic: 0}
"""


@pytest.fixture(scope="module")
def settings(packed, tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    file.write_text(SETTINGS)
    return ["--config", str(file), f"data.shards={packed}"]


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> Path:
    """Fold folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    launch("launch.train", *settings, f"output={folder}", fork=False)
    return folder / "tri" / "fold-0"


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def weights_of(folder: Path) -> str:
    return json.loads((folder / "fold.json").read_text())["weights"]


def test_run_writes_all_output_files(uninterrupted):
    predictions = read_predictions(uninterrupted / "predictions.parquet")
    assert len(predictions) == 50
    assert set(predictions.fold) == {0}
    assert set(predictions.model_hash) == {weights_of(uninterrupted)}
    steps = [step for step, _ in losses(uninterrupted)]
    assert steps == list(range(1, len(steps) + 1))
    assert not (uninterrupted / "checkpoints").exists()  # nothing resumes from those of a finished fold
    assert (uninterrupted / "config.yaml").exists()


def test_finished_fold_is_not_trained_again(uninterrupted, settings):
    before = (uninterrupted / "weights.safetensors").stat().st_mtime_ns
    launch("launch.train", *settings, f"output={uninterrupted.parents[1]}")
    assert (uninterrupted / "weights.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_stopped_and_resumed_run_equals_uninterrupted_run(uninterrupted, settings, tmp_path, number):
    # Forward 14 is in step 4, the last of the first epoch: step 3 is logged, the checkpoint is of step 2. A step has
    # two micro-batches, each with a forward for the soft F1 sums and one for the gradient. The choice of a precision
    # would add some.
    settings = [*settings, "train.precision=fp32"]
    stopped = launch(SIGNAL_WORKER, number.name, "14", *settings, f"output={tmp_path}", check=False)
    assert stopped.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 3), stopped.stderr
    folder = tmp_path / "tri" / "fold-0"
    saved = max(int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").iterdir())
    assert (saved, losses(folder)[-1][0]) == ((2, 3) if number == signal.SIGKILL else (4, 4))
    assert not (folder / "fold.json").exists()
    launch("launch.train", *settings, f"output={tmp_path}")
    assert losses(folder) == losses(uninterrupted)
    assert weights_of(folder) == weights_of(uninterrupted)
    a, b = (read_predictions(f / "predictions.parquet") for f in (folder, uninterrupted))
    assert (a.logits == b.logits).all()


def test_signal_before_training_exits_with_3(settings, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    process = start("launch.train", "--config", str(tmp_path / "pipe.yaml"), *settings[2:], f"output={tmp_path}/run")
    with (tmp_path / "pipe.yaml").open("w"):  # opens once the program reads the file, and blocks it until closed
        interrupt_read(process, signal.SIGUSR1)
        assert finish(process).returncode == 3
    assert not (tmp_path / "run").exists()


def test_signal_at_the_end_of_a_fold_stops_before_the_next(settings, tmp_path):
    ranks = 2
    job = {"config": settings[1], "settings": [*settings[2:], f"output={tmp_path}", "train.epochs=1"], "folds": [0, 1]}
    stopped = {**job, "stop": ranks - 1}  # requested after the last step of fold 0, then after that of fold 1
    jobs = json.dumps([stopped, stopped, job])
    launch(str(WORKERS / "relay_worker.py"), str(tmp_path), jobs, ranks=ranks)
    for rank in range(ranks):
        results = json.loads((tmp_path / f"relay-{rank}.json").read_text())
        assert [result.split(":")[0] for result in results] == ["Interrupted", "Interrupted", "done"]


def test_checkpoints_of_different_settings_are_not_resumed(uninterrupted, settings, tmp_path):
    first = launch("launch.train", *settings, f"output={tmp_path}", "train.epochs=1")
    second = launch("launch.train", *settings, f"output={tmp_path}")
    assert "other settings" not in first.stdout
    printed = " ".join(second.stdout.split())  # in lines of 80 columns
    assert "holds a training of other settings or data, moved to" in printed
    assert "starting from the beginning" in printed
    assert weights_of(tmp_path / "tri" / "fold-0") == weights_of(uninterrupted)


@pytest.mark.parametrize(
    "fork", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["forks", "as started by users"]
)
def test_two_ranks_equal_one_rank(uninterrupted, settings, tmp_path, fork):
    ddp = "accelerate_configs/ddp.yaml"
    done = launch("launch.train", *settings, f"output={tmp_path}", ranks=2, config=ddp, fork=fork)
    assert "2 ranks on " in done.stdout
    assert "global batch 16 = 2 x 8 x 1" in done.stdout
    folder = tmp_path / "tri" / "fold-0"
    assert np.allclose(losses(folder), losses(uninterrupted), atol=1e-4)
    a, b = (read_predictions(f / "predictions.parquet") for f in (folder, uninterrupted))
    assert a.lesion_ids.tolist() == b.lesion_ids.tolist()
    assert np.abs(a.logits - b.logits).max() < 1e-2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "unknown setting 'train.epoch'; did you mean 'train.epochs'?"),
        ("fold=2", "fold=2: data.folds is 2"),
        ("model=duo", "model=duo: the settings have the models tri"),
        ("train.micro_batch=3", "global_batch 16 is not a multiple of 1 ranks x micro_batch 3"),
        ("train.precision=fp16", "precision: fp16 needs a GPU"),
        ("data.shards=nowhere", "nowhere"),
    ],
)
def test_invalid_input_gives_one_line_and_exit_code_2(settings, tmp_path, override, message):
    done = launch("launch.train", *settings, f"output={tmp_path}/run", override, check=False)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.rglob("*.safetensors"))
