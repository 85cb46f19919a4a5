"""Steps that the loss scaler of fp16 skips, on a CPU: the same scaler, with networks in fp32."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tests.conftest import write_challenge
from tests.gpu.training import batches, create_trainer, settings, take_steps
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.distributed import parallel


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    assert accelerator.scaler is None  # Accelerate scales on a GPU only
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    yield accelerator
    AcceleratorState._reset_state(True)


def test_a_skipped_step_changes_nothing_but_the_position(accelerator, tmp_path):
    """The batch is done and the schedule advances, but weights, moments and average are those before."""
    dataset = read_challenge(write_challenge(tmp_path / "source", lesions=44).folder)
    shards = tmp_path / "shards"
    pack_shards(dataset, shards, short_side=None)
    words = ("train.micro_batch=16", "train.epochs=8", "train.ema_decay=0.5", "train.optim.warmup_epochs=0")
    trainer = create_trainer(settings("dual_cnn", *words), shards, tmp_path / "run", accelerator)
    training, scaler = trainer.training, accelerator.scaler
    weights = [each for each in parallel.unwrap(training.wrapped).parameters() if each.requires_grad]
    before, steps = [each.detach().clone() for each in weights], batches(trainer)

    def unchanged() -> bool:
        return all(torch.equal(one, other) for one, other in zip(before, weights, strict=True))

    def steps_taken() -> set[int]:
        """Return the steps that the optimizer has counted, of all weights."""
        return {int(each["step"]) for each in training.optimizer.state.values()}

    take_steps(trainer, steps, 2)
    assert scaler.get_scale() == 2.0**125 and unchanged() and steps_taken() == {0}
    assert training.state.step == training.scheduler.last_epoch == 2
    with training.average.swapped_in():
        assert unchanged()
    taken = 12
    while unchanged():
        take_steps(trainer, steps, 1)
    skipped = training.state.step - 1
    take_steps(trainer, steps, taken - 1)
    assert steps_taken() == {taken}
    assert training.state.step == training.scheduler.last_epoch == skipped + taken
    assert scaler.get_scale() == 2.0 ** (127 - skipped)
