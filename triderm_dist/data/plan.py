"""The order of an epoch: a pure function of (samples, sampling, seed, epoch).

A plan knows no ranks and no workers. Global batch b is a slice of the order and every rank takes its part of that
slice, so the union over ranks is the plan for any world size, all ranks have the same number of batches, and the only
state a resumed run needs is one integer: the global batches already consumed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from triderm_dist.schema import DIAGNOSES, ConfigError

if TYPE_CHECKING:
    from triderm_dist.data.shards.index import ShardIndex


@dataclass(frozen=True)
class Samples:
    """What a plan needs to know of its samples: index rows (N,), labels (N,) and shard numbers (N,), all integers."""

    rows: np.ndarray
    labels: np.ndarray
    shards: np.ndarray

    @classmethod
    def of(cls, index: ShardIndex, rows: np.ndarray) -> Samples:
        """The samples that are these rows (N,) of a packed set."""
        return cls(rows, index.labels[rows], index.shard[rows])

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Sampling:
    """How an epoch is ordered.

    sequential: as they are. shuffle: each sample once. balanced: each sample of a diagnosis with share f of the
    labeled samples exactly r = max(1, (threshold / f) ** power) times, the rule of LVIS (Gupta et al. 2019) for power
    1/2: in any epoch floor(r) or floor(r) + 1 times, the fraction spread over the epochs by rotation, never by chance.
    Samples without a label come once.

    `window` samples are shuffled together, in shuffled order of the shards: a window is read from `window` samples'
    worth of whole shards and two cut ones, so reads stay near-sequential; None shuffles everything. `last` says what
    becomes of the samples that do not fill a global batch: padded with others, marked not valid, or dropped.
    """

    kind: Literal["sequential", "shuffle", "balanced"] = "shuffle"
    threshold: float = 0.1
    power: float = 0.5
    window: int | None = None
    last: Literal["pad", "drop"] = "pad"


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
        """Global batches in the epoch; the last one may hold fewer lesions and be padded.

        Raises ConfigError where dropping the last one leaves none.
        """
        if self.sampling.last == "pad":
            return -(-len(self) // global_batch)
        if len(self) < global_batch:
            raise ConfigError(
                f"an epoch of {len(self)} lesions is dropped whole, since it does not fill a global batch of "
                f"{global_batch}; choose a smaller global batch or last=pad"
            )
        return len(self) // global_batch

    def batches(self, rank: int, world: int, global_batch: int, start: int = 0) -> RankBatches:
        """The rank's part of the global batches from number `start` on.

        Every part has ceil(global_batch / world) rows, so that shapes are the same on all ranks and in all steps; rows
        past the end of the global batch or of the order hold other lesions, marked not valid.
        """
        return RankBatches(self, rank, world, global_batch, start)

    @functools.cached_property
    def _arranged(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions in `samples` and copy numbers, in order."""
        number = len(self.samples)
        if self.sampling.kind == "sequential":
            return np.arange(number), np.zeros(number, np.int64)
        random = _generator(self.seed, self.epoch)
        # Each lesion draws one place on a circle of 2^64, and its copies stand at equal distances from there: never
        # side by side.
        places = random.integers(0, 2**64, number, np.uint64)
        shards = self.samples.shards
        if self.sampling.kind == "shuffle":
            return self._sorted(places, shards, random), np.zeros(number, np.int32)
        # First every lesion's own turn, then the further ones: few beside them.
        repeated = np.flatnonzero(self._repeats > 1)
        more = self._repeats[repeated] - 1
        further = np.repeat(repeated, more)
        copies = np.arange(1, len(further) + 1) - np.repeat(np.cumsum(more) - more, more)
        steps = np.repeat(np.uint64(2**64 - 1) // (more + 1).astype(np.uint64), more)
        places = np.concatenate([places, places[further] + copies.astype(np.uint64) * steps])
        turns = self._sorted(places, np.concatenate([shards, shards[further]]), random)
        numbers = np.concatenate([np.zeros(number, np.int32), copies.astype(np.int32)])[turns]
        return np.concatenate([np.arange(number), further])[turns], numbers

    def _sorted(self, places: np.ndarray, shards: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The order of turns by window, then place; (T,) int64.

        Window, leading bits of the place and number of the turn share one 64-bit key: sorting keys is ten times faster
        than sorting indices by them, and no two are equal, so the order is the same on every machine.
        """
        if not len(places):
            return np.zeros(0, np.int64)
        number_bits = np.uint64(int(len(places) - 1).bit_length())
        keys = places
        if self.sampling.window is not None:
            windows = _windows(shards, self.sampling.window, random)
            window_bits = np.uint64(int(windows.max()).bit_length())
            keys >>= window_bits
            keys |= windows << (np.uint64(64) - window_bits) if window_bits else np.uint64(0)
        keys >>= number_bits
        keys <<= number_bits
        keys |= np.arange(len(keys), dtype=np.uint64)
        keys.sort()
        keys &= (np.uint64(1) << number_bits) - np.uint64(1)
        return keys.view(np.int64)

    @functools.cached_property
    def _repeats(self) -> np.ndarray:
        """How often each sample appears in this epoch, (N,) int64."""
        labels = self.samples.labels
        factors = repeat_factors(labels, self.sampling.threshold, self.sampling.power)
        repeats = np.ones(len(labels), np.int64)
        for diagnosis in np.flatnonzero(factors > 1):
            members = np.flatnonzero(labels == diagnosis)
            whole = int(factors[diagnosis])
            repeats[members] = whole
            # The extra turns of all epochs form one endless round through the class, cut into epochs.
            extra = (factors[diagnosis] - whole) * len(members)
            turns = np.arange(int(self.epoch * extra), int((self.epoch + 1) * extra)) % len(members)
            lot = _generator(self.seed, int(diagnosis))
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

    @property
    def part(self) -> int:
        """Rows of every part."""
        return -(-self.global_batch // self.world)

    def __iter__(self) -> Iterator[PlannedBatch]:
        order, copies = self.plan.order, self.plan.copies
        own = self.rank * self.part + np.arange(self.part)
        for number in range(self.start, self.plan.num_batches(self.global_batch)):
            at = number * self.global_batch + own
            count = min(self.global_batch, len(order) - number * self.global_batch)
            inside = at % len(order)  # other lesions, not one many times: batch norms see the padding
            yield PlannedBatch(number, order[inside], copies[inside], own < count, count)

    @property
    def rows_ahead(self) -> np.ndarray:
        """Index rows that all ranks together will read, padding included, (n,) int64: remote shards are fetched in
        this order.
        """
        order = self.plan.order
        padding = self.part * self.world - self.global_batch
        end = self.plan.num_batches(self.global_batch) * self.global_batch + padding
        return np.take(order, np.arange(self.start * self.global_batch, end), mode="wrap")


def _generator(seed: int, stream: int) -> np.random.Generator:
    """Philox (Salmon et al. 2011) with a key of its own for each pair."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, stream], np.uint64)))


def _windows(shards: np.ndarray, window: int, random: np.random.Generator) -> np.ndarray:
    """Window number of each turn, (T,) uint64: the shards in shuffled order, cut every `window` turns."""
    held = np.bincount(shards)
    shuffled = random.permutation(len(held))
    begin = np.empty_like(held)
    begin[shuffled] = np.cumsum(held[shuffled]) - held[shuffled]
    by_shard = np.argsort(shards, kind="stable")  # next to no work: an index lists its shards in order
    reading = np.empty(len(shards), np.int64)
    reading[by_shard] = np.arange(len(shards))
    reading += (begin - (np.cumsum(held) - held))[shards]
    return (reading // window).astype(np.uint64)


def repeat_factors(labels: np.ndarray, threshold: float, power: float) -> np.ndarray:
    """max(1, (threshold / share) ** power) for each diagnosis, (C,) float; 1 for a diagnosis without samples."""
    counts = np.bincount(labels[labels >= 0], minlength=len(DIAGNOSES))
    share = counts / max(counts.sum(), 1)
    return np.maximum(1.0, (threshold / np.where(counts > 0, share, threshold)) ** power)
