"""The epochs of a training: which lesions each of them draws, in which order, and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator

from triderm_dist.config import TrainConfig
from triderm_dist.data.lesions import Lesions
from triderm_dist.data.loader import Loader, LoaderFactory
from triderm_dist.data.mixing import Mixing
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.engine.checkpoint import TrainState
from triderm_dist.losses import DrawnLesions
from triderm_dist.monitoring.startup_report import LesionCounts


@dataclass(frozen=True)
class TrainingData:
    """The data of a training.

    training: loaders of a packed set, or of its union with extra sets.  train_rows: rows (n,) of it.
    loaders: of the packed set.  validation_rows: rows (n,) of it; empty for a training without validation.
    """

    training: LoaderFactory[Lesions]
    train_rows: np.ndarray
    loaders: LoaderFactory[ShardIndex]
    validation_rows: np.ndarray

    def counts(self) -> LesionCounts:
        """Count the lesions for the start-up report."""
        extra = int((self.train_rows >= len(self.loaders.index)).sum())
        return LesionCounts(len(self.train_rows), extra, len(self.validation_rows))


class Epochs:
    """The order of every epoch, and the loader of the current one."""

    def __init__(self, config: TrainConfig, data: TrainingData, seed: int) -> None:
        self.config, self.data, self.seed = config, data, seed
        self._samples = Samples.of(data.training.index, data.train_rows)
        self._sampling = Sampling(**config.sampling.model_dump())
        counts = self._samples.counts
        self.class_counts = np.pad(counts, (0, len(data.loaders.index.diagnoses) - len(counts)))
        self.steps = [self._plan(epoch).num_batches(config.global_batch) for epoch in range(config.epochs)]
        self.total_steps = sum(self.steps)
        self.rows = len(self._plan(0))
        """Rows of an epoch without those that fill up its last batch."""

    def drawn_lesions(self) -> DrawnLesions:
        """Return the lesions that an epoch draws on average."""
        lesions, labels = self.data.training.index.inputs(self.data.train_rows), self._samples.labels
        repeats = self._sampling.repeats(self.class_counts)
        if lesions.class_mask is None or lesions.weights is None:
            return DrawnLesions(np.ones((1, len(repeats)), bool), (self.class_counts * repeats)[None])
        masks, group, sizes = np.unique(lesions.class_mask, axis=0, return_inverse=True, return_counts=True)
        group = group.reshape(-1)
        weights = lesions.weights / (np.bincount(group, lesions.weights) / sizes)[group]
        totals = np.zeros(masks.shape)
        np.add.at(totals, (group, labels), weights * repeats[labels])
        return DrawnLesions(masks, totals)

    def loader(self, state: TrainState, accelerator: Accelerator) -> Loader:
        """Return a loader of this rank's part of the rest of the epoch."""
        config, data = self.config, self.data
        batches = self._plan(state.epoch).batches(
            accelerator.process_index, accelerator.num_processes, config.global_batch, start=state.batch
        )
        return data.training.create(
            batches, config.micro_batch, accelerator.device, augment=config.augment, seed=self.seed, epoch=state.epoch
        )

    def mixing(self, state: TrainState) -> Mixing | None:
        """Return the mixing of lesions in the current epoch; None without mixing."""
        augment, left = self.config.augment, self.config.epochs - state.epoch
        if not augment.mixes or left <= augment.unmixed_epochs:
            return None
        return Mixing(augment, self.data.loaders.index.signature)

    def done(self, state: TrainState) -> float:
        """Return the number of epochs done, with the fraction of the current one."""
        return state.epoch + state.batch / self.steps[state.epoch]

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(self._samples, self._sampling, self.seed, epoch)
