"""Resume in a folder that is not empty: matching checkpoints are used, results of other settings never deleted."""

import json
import os
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.processes import WORKERS, launch
from triderm_dist import cli
from triderm_dist.cli import Interrupted
from triderm_dist.config import Experiment, load, save
from triderm_dist.data.shards.index import read_index
from triderm_dist.engine.checkpoint import Checkpoint
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.network_files import read_info, read_tensors, save_weights
from triderm_dist.files import atomic_path, exclusive_lock, file_sha256
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.schema import Busy, ConfigError

from .conftest import TINY_TRIMODAL

SETTINGS = """
data: {folds: 2}
train:
  epochs: 3
  global_batch: 16
  micro_batch: 8
  log_every: 1
  trackers: []
  sampling: {kind: shuffle}
  optim: {lr: 1e-3, warmup_epochs: 1}
"""
SETTINGS += TINY_TRIMODAL


@pytest.fixture(scope="module")
def settings(packed, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "tiny.yaml").write_text(SETTINGS)
    return [str(folder / "tiny.yaml"), f"data.shards={packed}", f"tokens={folder / 'tokens'}"]


@pytest.fixture
def train(settings, tmp_path):
    """train(*overrides, stop=epoch or None): train fold 0 in tmp_path; return its folder."""

    def train(*overrides: str, stop: int | None = None) -> Path:
        experiment = load(Experiment, settings[0], [*settings[1:], f"output={tmp_path}", *overrides])
        stop_after = lambda epoch, scores: epoch == stop and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        save_config = partial(save, experiment, tmp_path / "config.yaml")
        run_folds(experiment, read_index(experiment.train_shards), ["tri"], [0], stop_after, save_config)
        return tmp_path / "tri" / "fold-0"

    return train


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    experiment = load(Experiment, settings[0], [*settings[1:], f"output={output}"])
    run_folds(experiment, read_index(experiment.train_shards), ["tri"], [0])
    return output / "tri" / "fold-0"


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


def weights_of(folder: Path) -> str:
    return json.loads((folder / "fold.json").read_text())["weights"]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_refused_command_changes_no_files(train, tmp_path):
    with pytest.raises(Interrupted):
        train(stop=1)
    before = files(tmp_path)
    unknown = [
        "train.trackers=[no_such_name]",
        "train.optim.name=no_such_name",
        "train.optim.schedule=no_such_name",
        "train.loss.terms={no_such_name: {weight: 1}}",
        "train.optim.settings={momentum: 0.9}",
    ]
    for bad in (*unknown, "train.optim.min_lr=1", "train.micro_batch=3"):
        with pytest.raises(ConfigError, match=r"no_such_name|momentum|min_lr|micro_batch"):
            train(bad, "models.tri.dropout=0.5")
        assert files(tmp_path) == before, bad


def test_different_training_is_moved_aside_and_can_be_resumed(train, uninterrupted, tmp_path, capsys):
    with pytest.raises(Interrupted):
        train(stop=1)
    other = train("models.tri.dropout=0.5")
    found = weights_of(other)
    assert found != weights_of(uninterrupted)
    capsys.readouterr()
    fold = train()
    assert "resuming the training of these settings" in " ".join(capsys.readouterr().out.split())
    assert weights_of(fold) == weights_of(uninterrupted) and losses(fold) == losses(uninterrupted)
    assert weights_of(train("models.tri.dropout=0.5")) == found
    assert "epoch" not in capsys.readouterr().out  # a finished training is not repeated
    assert weights_of(train()) == weights_of(uninterrupted)


def test_unfinished_training_with_dropout_by_micro_batch_resumes_and_says_so(train, tmp_path, capsys):
    with pytest.raises(Interrupted):
        train(stop=1)
    for file in tmp_path.rglob("state.json"):
        record = json.loads(file.read_text())
        del record["how"]["dropout"], record["files"], record["checksum"]  # as 0.1.0 wrote it
        file.write_text(json.dumps(record))
    fold = train()
    assert "changed settings (dropout: by micro-batch -> by lesion)" in " ".join(capsys.readouterr().out.split())
    changes = json.loads((fold / "fold.json").read_text())["changes"]
    assert changes == [{"step": 5, "dropout": ["by micro-batch", "by lesion"]}]


def test_execution_settings_may_change_on_resume(train, uninterrupted, capsys):
    with pytest.raises(Interrupted):
        train(stop=1)
    changed = [
        "train.precision=bf16",
        "train.micro_batch=4",
        "train.activation_checkpointing=true",
        "train.optim.lr=5e-4",
    ]
    fold = train(*changed)
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "tri fold 0: resuming from step 5 with changed settings (train.precision: fp32 -> bf16, train.micro_batch: 8 "
        "-> 4, train.optim.lr: 0.001 -> 0.0005); results will differ from an uninterrupted run"
    ) in output
    assert "start resumed at step 5 of 12" in output
    assert losses(fold)[:5] == losses(uninterrupted)[:5] and len(losses(fold)) == 12
    rates = [line["lr"] for line in read_metrics(fold / "metrics.jsonl") if line["kind"] == "train"]
    assert max(rates[5:]) < 5e-4 < rates[4]
    planned = [line["lr"] for line in read_metrics(uninterrupted / "metrics.jsonl") if line["kind"] == "train"]
    assert rates == pytest.approx([*planned[:5], *(rate / 2 for rate in planned[5:])], abs=1e-7)
    assert json.loads((fold / "fold.json").read_text())["changes"][0]["train.precision"] == ["fp32", "bf16"]


def test_checkpoints_by_time_and_weights_of_the_last_epoch(train, uninterrupted, tmp_path):
    settings, fold = ["train.save_every_seconds=1000", "train.keep_checkpoints=true"], tmp_path / "tri" / "fold-0"
    with pytest.raises(Interrupted):
        train(*settings, stop=1)
    assert [path.name for path in fold.glob("checkpoints/*")] == ["epoch-0001-step-00000005"]  # of the stop
    assert not (fold / "weights.safetensors").exists()
    train(*settings)
    assert sorted(path.name[:10] for path in fold.glob("checkpoints/*")) == ["epoch-0001", "epoch-0003"]
    assert weights_of(fold) == weights_of(uninterrupted)


BEST = ("train.select=best", "train.keep_last=9", "train.keep_checkpoints=true")


@pytest.mark.parametrize("torn", [False, True])
def test_selected_weights_belong_to_the_training_that_is_resumed(train, tmp_path, capsys, torn):
    """A process killed after it wrote the weights of a better epoch, before the checkpoint of that epoch."""
    with pytest.raises(Interrupted):
        train(*BEST, stop=1)
    selected = tmp_path / "tri" / "fold-0" / "weights"
    first = selected.with_suffix(".json").read_bytes()
    lost = {name: tensor + 1 for name, tensor in read_tensors(selected.with_suffix(".safetensors")).items()}
    digest = save_weights(selected, lost, epoch=2, validation_macro_f1=1.0)
    if torn:  # killed between the two files
        selected.with_suffix(".json").write_bytes(first)
    fold = train(*BEST, "train.optim.lr=1e-9", "train.optim.min_lr=0")
    assert "weights of the best epoch, 1, are lost" in " ".join(capsys.readouterr().out.split())
    scores = {
        line["epoch"]: line["macro_f1"]
        for line in read_metrics(fold / "metrics.jsonl")
        if line["kind"] == "validation" and line["epoch"] > 1
    }
    info = read_info(selected)
    assert (info["epoch"], info["validation_macro_f1"]) == (max(scores, key=scores.get), max(scores.values()))
    assert weights_of(fold) == info["sha256"] == file_sha256(selected.with_suffix(".safetensors")) != digest


def test_first_of_equal_epochs_is_selected(train):
    fold = train(*BEST, "train.keep_last=1", "train.optim.lr=1e-12", "train.optim.min_lr=0")
    lines = [line for line in read_metrics(fold / "metrics.jsonl") if line["kind"] == "validation"]
    assert len(lines) == 3 and len({line["macro_f1"] for line in lines}) == 1
    assert read_info(fold / "weights")["epoch"] == 1
    assert [path.name[:10] for path in fold.glob("checkpoints/epoch-*")] == ["epoch-0003"]


def test_unchanged_training_selects_the_same_epoch_again_after_a_kill(train, capsys):
    fold = train(*BEST)
    found, info = weights_of(fold), read_info(fold / "weights")
    for checkpoint in sorted(fold.glob("checkpoints/epoch-*"))[info["epoch"] - 1 :]:
        shutil.rmtree(checkpoint)
    (fold / "fold.json").unlink()
    train(*BEST)
    assert "start resumed" in " ".join(capsys.readouterr().out.split()) or info["epoch"] == 1
    assert read_info(fold / "weights") == info and weights_of(fold) == found


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("change", ["train.optim.lr=5e-4", "train.epochs=4"])
def test_finished_training_starts_from_the_beginning_with_other_settings(train, tmp_path, capsys, keep, change):
    fold = train(f"train.keep_checkpoints={str(keep).lower()}")
    assert len(list(fold.glob("checkpoints/*"))) == (2 if keep else 0)
    finished = weights_of(fold)
    train(change)
    aside, *_ = (tmp_path / "tri" / "other-settings").iterdir()
    output = " ".join(capsys.readouterr().out.split())
    assert f"{fold}: holds a training of other settings or data, moved to {aside}; starting from the beg" in output
    assert "resum" not in output
    assert losses(fold)[0][0] == 1 and weights_of(fold) != finished == weights_of(aside)
    train()  # as before
    assert weights_of(fold) == finished


def test_finished_training_without_predictions_is_predicted_again(train, tmp_path):
    fold = train()
    (fold / "predictions.parquet").unlink()
    before = files(fold)
    train()
    assert (fold / "predictions.parquet").exists()
    assert {path: content for path, content in files(fold).items() if path in before} == before


def newest_checkpoint(train, tmp_path) -> Path:
    """Interrupt a training after it has written two checkpoints and return the newer one."""
    with pytest.raises(Interrupted):
        train(stop=2)
    _, newest = sorted((tmp_path / "tri" / "fold-0" / "checkpoints").iterdir())
    return newest


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors"])
def test_checkpoint_with_changed_bytes_is_skipped(train, uninterrupted, tmp_path, capsys, file):
    fold, newest = tmp_path / "tri" / "fold-0", newest_checkpoint(train, tmp_path)
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[:-2000] + bytes(2000))  # of the right length: a copy with a hole
    capsys.readouterr()
    train("train.keep_checkpoints=true")
    skipped = f"{newest}: damaged checkpoint ({file} does not match its checksum); skipping it"
    assert skipped in capsys.readouterr().out
    assert weights_of(fold) == weights_of(uninterrupted) and losses(fold) == losses(uninterrupted)
    kept = sorted((fold / "checkpoints").iterdir())
    assert len(kept) == 2 and newest not in kept
    for checkpoint in kept:
        Checkpoint(checkpoint).verify()


def test_checkpoint_without_checksums_must_hold_weights_that_a_training_reaches(train, tmp_path, capsys):
    newest = newest_checkpoint(train, tmp_path)
    record = json.loads((newest / "state.json").read_text())
    del record["files"], record["checksum"]  # as 0.1.0 wrote it
    (newest / "state.json").write_text(json.dumps(record))
    Checkpoint(newest).verify()
    weights = load_file(newest / "weights.safetensors")
    weights["head.linear.bias"][3] = 2.8e37
    save_file(weights, newest / "weights.safetensors")
    capsys.readouterr()
    train()
    assert f"{newest}: damaged checkpoint (weights.safetensors: head.linear.bias holds" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["weights.safetensors", "state.json"])
def test_damaged_checkpoint_is_skipped(train, uninterrupted, tmp_path, capsys, file):
    fold, newest = tmp_path / "tri" / "fold-0", newest_checkpoint(train, tmp_path)
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    train()
    assert f"{newest}" in (output := capsys.readouterr().out) and "skipping it" in output
    assert weights_of(fold) == weights_of(uninterrupted) and losses(fold) == losses(uninterrupted)


def test_errors_on_rank_0_are_raised_on_all_ranks(settings, uninterrupted, tmp_path):
    """Errors: a fold locked by another run, an output path that is a file, a full disk (a limit on the file size)."""
    (tmp_path / "file").touch()
    for name in ("locked", "full"):  # the weights of the frozen tower are larger than the limit
        shutil.copytree(uninterrupted.parents[1] / "towers", tmp_path / name / "towers")
    jobs = [
        {"config": settings[0], "settings": [*settings[1:], f"output={tmp_path / name}"]}
        for name in ("locked", "file", "full")
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        with exclusive_lock(tmp_path / "locked" / "tri" / ".fold-0.lock", "locked"):
            launch(str(WORKERS / "relay_worker.py"), str(tmp_path), json.dumps(jobs), ranks=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    results = [json.loads((tmp_path / f"relay-{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    locked, file, full = results[0]
    assert locked.startswith(f"Busy: {tmp_path / 'locked' / 'tri' / 'fold-0'}: another run is training this fold")
    assert file.startswith("FileExistsError: ") and str(tmp_path / "file") in file
    assert "OSError: " in full and str(tmp_path / "full" / "tri" / "fold-0") in full and "too large" in full
    assert not list((tmp_path / "full").rglob("*.part"))


def test_unwritable_file_gives_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").touch()

    def main(settings: Experiment) -> None:
        with atomic_path(tmp_path / "file" / "table.json") as temporary:
            temporary.touch()

    with pytest.raises(SystemExit) as stop:
        cli.run(Experiment, main, None, [])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {tmp_path / 'file'}") and error.count("\n") == 1


def test_lock_is_released_when_its_holder_dies(tmp_path):
    lock = partial(exclusive_lock, tmp_path / "lock", "locked")
    with lock(), pytest.raises(Busy, match="locked"), lock():
        pass
    with lock():
        pass


def test_checkpoints_of_earlier_versions_resume(train, uninterrupted, tmp_path):
    with pytest.raises(Interrupted):
        train("train.micro_batch=4", "train.loss.soft_f1_sums=previous", stop=1)
    for path in tmp_path.rglob("state.json"):
        record = json.loads(path.read_text())
        record["sums"] = record["sums"]["soft_f1"]
        del record["optimizer_values"], record["optimizer_groups"]
        path.write_text(json.dumps(record))
    fold = train("train.micro_batch=4", "train.loss.soft_f1_sums=previous")
    assert [step for step, _ in losses(fold)] == [step for step, _ in losses(uninterrupted)]
