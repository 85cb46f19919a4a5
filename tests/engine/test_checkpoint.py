"""Checkpoints and selected weights are written by a thread while the training continues."""

import threading

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from tests.processes import HANG_SECONDS
from triderm_dist.engine import checkpoint
from triderm_dist.engine.checkpoint import Checkpoints, Training, TrainState, readable_checkpoints
from triderm_dist.engine.network_files import read_info
from triderm_dist.files import file_sha256


@pytest.fixture
def training() -> Training:
    network = nn.Linear(300, 5)
    optimizer = torch.optim.AdamW(network.parameters())
    return Training(
        network, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), None, TrainState(), {}
    )


def take_step(training: Training) -> None:
    training.wrapped(torch.ones(2, 300)).sum().backward()
    training.optimizer.step()
    training.advance(training.state.batch, {"focal": torch.ones(2)})


def contents(training: Training) -> list[torch.Tensor]:
    moments = [state[key] for state in training.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return [tensor.detach().clone() for tensor in (*training.wrapped.parameters(), *moments)]


def saved(folder, number: int) -> list[torch.Tensor]:
    weights, moments = (
        load_file(readable_checkpoints(folder / "checkpoints")[number].folder / f"{name}.safetensors")
        for name in ("weights", "optimizer")
    )
    names = ("weight", "bias")
    return [weights[name] for name in names] + [
        moments[f"{key}/{name}"] for name in names for key in ("exp_avg", "exp_avg_sq")
    ]


def test_files_hold_the_training_as_it_was_when_they_were_asked_for(training, tmp_path, monkeypatch):
    """Although it continues before the first byte is written."""
    may_write, write = threading.Event(), checkpoint.write_tensors

    def write_later(path, tensors):
        may_write.wait(HANG_SECONDS)
        return write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", write_later)
    accelerator, expected = Accelerator(cpu=True), []
    with Checkpoints(tmp_path, ["hash"], keep_last=2) as checkpoints:
        for _ in range(2):
            may_write.clear()
            take_step(training)
            expected.append(contents(training))
            checkpoints.save(accelerator, training)
            state = dict(vars(training.state))
            take_step(training)
            may_write.set()
            checkpoints.wait()
        assert readable_checkpoints(tmp_path / "checkpoints")[-1].record["state"] == state
        may_write.clear()
        expected.append(contents(training))
        checkpoints.keep_weights(accelerator, training, epoch=7)
        take_step(training)
        may_write.set()
    for number in (0, 1):
        readable_checkpoints(tmp_path / "checkpoints")[number].verify()
        for before, after in zip(expected[number], saved(tmp_path, number), strict=True):
            assert torch.equal(before, after)
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["weight"], expected[2][0])
    info = read_info(tmp_path / "weights")
    assert info["epoch"] == 7 and info["sha256"] == file_sha256(tmp_path / "weights.safetensors")


def test_full_disk_is_raised_by_the_next_save_and_at_the_end(training, tmp_path):
    accelerator, checkpoints = Accelerator(cpu=True), Checkpoints(tmp_path, ["hash"], keep_last=2)
    take_step(training)
    (tmp_path / "checkpoints").write_text("in the way of the folder")
    checkpoints.save(accelerator, training)
    with pytest.raises(OSError, match="checkpoints"):
        checkpoints.save(accelerator, training)
    (tmp_path / "checkpoints").unlink()
    checkpoints.save(accelerator, training)
    checkpoints.wait()
    assert len(readable_checkpoints(tmp_path / "checkpoints")) == 1

    for own_error in (None, ValueError("of the training")):
        training.state.step += 1
        (tmp_path / "checkpoints").rename(tmp_path / "aside")
        (tmp_path / "checkpoints").write_text("in the way of the folder")
        with pytest.raises(type(own_error) if own_error else OSError), checkpoints:
            checkpoints.save(accelerator, training)
            if own_error:
                raise own_error
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "aside").rename(tmp_path / "checkpoints")


def test_saves_are_due_by_time(training, tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, ["hash"], keep_last=2)
    now += 59
    assert checkpoints.is_due(59) and not checkpoints.is_due(60)
    take_step(training)
    checkpoints.save(Accelerator(cpu=True), training)
    assert not checkpoints.is_due(1)
    checkpoints.wait()
    now += 60
    assert checkpoints.is_due(60)


def test_first_step_after_a_resume_has_the_rate_of_the_current_settings(training, tmp_path):
    accelerator = Accelerator(cpu=True)
    take_step(training)
    with Checkpoints(tmp_path, ["hash"], keep_last=1) as checkpoints:
        checkpoints.save(accelerator, training)
    (saved_one,) = readable_checkpoints(tmp_path / "checkpoints")
    training.scheduler.base_lrs = [0.5]
    saved_one.load_training(accelerator, training)
    factor = training.scheduler.lr_lambdas[0](training.state.step)
    assert training.optimizer.param_groups[0]["lr"] == training.scheduler.get_last_lr()[0] == 0.5 * factor
