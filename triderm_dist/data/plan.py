"""The order of an epoch: a pure function of (samples, sampling, seed, epoch).

A plan knows no ranks and no workers. Global batch b is a slice of the order and every rank takes its part of that
slice, so the union over ranks is the plan for any world size, all ranks have the same number of batches, and the only
state a resumed run needs is one integer: the global batches already consumed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from triderm_dist.schema import DIAGNOSES, ConfigError


@dataclass(frozen=True)
class Samples:
    """What a plan needs to know of its samples: index rows (N,), labels (N,) and shard numbers (N,), all int64."""

    rows: np.ndarray
    labels: np.ndarray
    shards: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Sampling:
    """How an epoch is ordered.

    sequential: as they are. shuffle: each sample once. balanced: each sample of a diagnosis with share f of the samples
    exactly max(1, (threshold / f) ** power) times, the rule of LVIS (Gupta et al. 2019) for power 1/2; the fractional
    part is spread over the epochs by rotation, never by chance. `window` samples are shuffled together, in shuffled
    order of the shards, so that reads stay near-sequential; None shuffles everything.
    """

    kind: Literal["sequential", "shuffle", "balanced"] = "shuffle"
    threshold: float = 0.1
    power: float = 0.5
    window: int | None = None


@dataclass(frozen=True)
class PlannedBatch:
    """One rank's part of a global batch. rows, copies (n,) int64; valid (n,) bool, False where a row only fills up.

    count: valid lesions in the whole global batch. copies: how often the lesion came before in this epoch.
    """

    number: int
    rows: np.ndarray
    copies: np.ndarray
    valid: np.ndarray
    count: int


class EpochPlan:
    """The samples of one epoch in order.

    `order` (N,) int64 holds index rows; `copies` (N,) int64 tells a repeated lesion's turns apart, so that each
    draws its own augmentation. N is len(samples) but for balanced sampling, where it is the sum of the repeat
    counts.
    """

    def __init__(self, samples: Samples, sampling: Sampling, seed: int, epoch: int) -> None:
        self.samples, self.sampling, self.seed, self.epoch = samples, sampling, seed, epoch

    @property
    def order(self) -> np.ndarray:
        return self.samples.rows[self._arranged[0]]

    @property
    def copies(self) -> np.ndarray:
        return self._arranged[1]

    def __len__(self) -> int:
        return len(self.samples) if self.sampling.kind != "balanced" else int(self._repeats.sum())

    def num_batches(self, global_batch: int) -> int:
        """Global batches in the epoch; the last one may hold fewer lesions and is padded."""
        return -(-len(self) // global_batch)

    def batches(self, rank: int, world: int, global_batch: int, start: int = 0) -> RankBatches:
        """The rank's part of the global batches from number `start` on.

        Every part has global_batch / world rows; past the end of the order come lesions of the batch before,
        marked not valid. Raises ConfigError if the global batch does not split evenly.
        """
        if global_batch % world:
            raise ConfigError(f"global_batch {global_batch} does not split over {world} ranks; choose a multiple")
        return RankBatches(self, rank, world, global_batch, start)

    @functools.cached_property
    def _arranged(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions in `samples` and copy numbers, in order."""
        number = len(self.samples)
        if self.sampling.kind == "sequential":
            return np.arange(number), np.zeros(number, np.int64)
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, self.epoch], np.uint64)))
        repeats = self._repeats if self.sampling.kind == "balanced" else np.ones(number, np.int64)
        positions = np.repeat(np.arange(number), repeats)
        copies = np.arange(len(positions)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        # Each lesion draws one place on a circle and its copies stand at equal distances from there: never side by
        # side.
        places = (random.random(number)[positions] + copies / repeats[positions]) % 1.0
        if self.sampling.window is None:
            arranged = np.argsort(places, kind="stable")
        else:
            shard_rank = random.permutation(int(self.samples.shards.max(initial=0)) + 1)
            by_shard = np.argsort(shard_rank[self.samples.shards[positions]], kind="stable")
            window = np.empty(len(positions), np.int64)
            window[by_shard] = np.arange(len(positions)) // self.sampling.window
            arranged = np.lexsort((places, window))
        return positions[arranged], copies[arranged]

    @functools.cached_property
    def _repeats(self) -> np.ndarray:
        """How often each sample appears in this epoch, (N,) int64."""
        labels = self.samples.labels
        factors = repeat_factors(labels, self.sampling.threshold, self.sampling.power)
        repeats = np.ones(len(labels), np.int64)
        for diagnosis in np.unique(labels[labels >= 0]):
            members = np.flatnonzero(labels == diagnosis)
            whole = int(factors[diagnosis])
            repeats[members] = whole
            # The extra turns of all epochs form one endless round through the class, cut into epochs.
            extra = (factors[diagnosis] - whole) * len(members)
            turns = np.arange(int(self.epoch * extra), int((self.epoch + 1) * extra)) % len(members)
            lot = np.random.Generator(np.random.Philox(key=np.array([self.seed, diagnosis], np.uint64)))
            repeats[lot.permutation(members)[turns]] += 1
        return repeats


@dataclass(frozen=True)
class RankBatches:
    """One rank's part of the global batches of a plan from number `start` on; see `EpochPlan.batches`."""

    plan: EpochPlan
    rank: int
    world: int
    global_batch: int
    start: int

    def __iter__(self) -> Iterator[PlannedBatch]:
        part = self.global_batch // self.world
        order, copies = self.plan.order, self.plan.copies
        for number in range(self.start, self.plan.num_batches(self.global_batch)):
            at = number * self.global_batch + self.rank * part + np.arange(part)
            inside = self._inside(at)
            count = min(self.global_batch, len(order) - number * self.global_batch)
            yield PlannedBatch(number, order[inside], copies[inside], at < len(order), count)

    @property
    def ahead(self) -> np.ndarray:
        """Index rows that all ranks together will read, padding included, (n,) int64: remote shards are fetched in
        this order.
        """
        end = self.plan.num_batches(self.global_batch) * self.global_batch
        return self.plan.order[self._inside(np.arange(self.start * self.global_batch, end))]

    def _inside(self, at: np.ndarray) -> np.ndarray:
        """Places in the order. Those past its end are filled with other lesions, not one many times, since batch norms
        see them; with lesions of the batch before, since their shards are at hand.
        """
        number = len(self.plan.order)
        return np.where(at < number, at, at - self.global_batch) % max(number, 1)


def repeat_factors(labels: np.ndarray, threshold: float, power: float) -> np.ndarray:
    """max(1, (threshold / share) ** power) for each diagnosis, (C,) float; 1 for a diagnosis without samples."""
    counts = np.bincount(labels[labels >= 0], minlength=len(DIAGNOSES))
    share = counts / max(counts.sum(), 1)
    return np.maximum(1.0, (threshold / np.where(counts > 0, share, threshold)) ** power)
