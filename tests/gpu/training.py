"""A training on the GPU, whose steps a test takes one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from triderm_dist.config import Experiment, load
from triderm_dist.data.loader import Step
from triderm_dist.data.shards.index import read_index
from triderm_dist.distributed import parallel
from triderm_dist.engine.epochs import TrainingData
from triderm_dist.engine.fold import add_trained_parts, new_network
from triderm_dist.engine.fold_folder import FoldFolder
from triderm_dist.engine.model_inputs import Notes, open_inputs
from triderm_dist.engine.model_tower import training_tower
from triderm_dist.engine.trainer import Trainer

SMALL = {
    "trimodal": [
        "models.NAME.kind=trimodal", "models.NAME.width=32", "models.NAME.heads=2", "models.NAME.dropout=0.2",
        "models.NAME.tower={source: 'timm:test_vit', pretrained: false, image_size: 32}",
        "models.NAME.tower.freeze_clinical=2", "models.NAME.tower.freeze_dermoscopic=1",
    ],
    "dual_cnn": [
        "models.NAME.kind=dual_cnn", "models.NAME.width=32",
        "models.NAME.tower={source: 'timm:test_efficientnet', pretrained: false, image_size: 64}",
        "models.NAME.tower.freeze_clinical=1", "models.NAME.tower.freeze_dermoscopic=1",
    ],
}  # fmt: skip
"""Settings of a small network of each kind; both have frozen blocks."""

TRAIN = ["train.global_batch=16", "train.micro_batch=8", "train.trackers=[]", "train.log_every=1000"]


def words_of(kind: str, *more: str) -> list[str]:
    """Return the settings of a small network of a kind, named "net", as words of a command."""
    return [*(word.replace("NAME", "net") for word in SMALL[kind]), *TRAIN, *more]


def settings(kind: str, *more: str) -> Experiment:
    """Return the settings of `words_of`."""
    return load(Experiment, None, words_of(kind, *more))


@contextmanager
def on_cpu() -> Iterator[None]:
    """Context in which this process trains on the CPU, as one without a GPU does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(True)
        yield
    AcceleratorState._reset_state(True)


def create_trainer(
    experiment: Experiment, shards: Path, folder: Path, accelerator: Accelerator | None = None
) -> Trainer:
    """Create the training of the model "net" on all lesions of the set; nothing is validated or written."""
    torch.cuda.empty_cache()
    model, index = experiment.models["net"], read_index(shards)
    accelerator = accelerator or parallel.start_training(model.train)
    tower = training_tower(experiment, model, index)
    data = open_inputs(experiment, model, index, accelerator, tower, note=Notes(quiet=True))
    torch.manual_seed(0)
    network = add_trained_parts(new_network(model, data), model, index.task).to(accelerator.device)
    rows = np.arange(len(index))
    return Trainer(
        name="net", network=network, config=model.train,
        data=TrainingData(data.loaders, rows, data.loaders, rows[:0]),
        folder=FoldFolder(folder, ["result"], ["resume"]), seed=0, accelerator=accelerator,
    )  # fmt: skip


def batches(trainer: Trainer) -> Iterator[Step]:
    """Yield the global batches of one epoch after the other."""
    state = trainer.training.state
    while True:
        yield from trainer.epochs.loader(state, trainer.accelerator)
        state.epoch, state.batch = state.epoch + 1, 0


def take_steps(trainer: Trainer, steps: Iterator[Step], count: int) -> list[float]:
    """Take `count` optimizer steps and return their losses, read after the last one."""
    trainer.training.wrapped.train()
    results = []
    for _ in range(count):
        batch = next(steps)
        result = trainer.step(batch, trainer.training.state.step, trainer.training.sums)
        trainer.training.advance(batch.number, result.sums)
        # A CUDA graph writes the sums of the next step to the same memory.
        results.append(({name: sums.clone() for name, sums in result.sums.items()}, result.count))
    trainer.guard.check()
    return [trainer.loss.values(sums, count)["loss"] for sums, count in results]
