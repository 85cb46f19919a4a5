"""The order of an epoch: a pure function of (samples, sampling, seed, epoch).

A plan does not depend on ranks or workers. Global batch b is a slice of the order, and every rank takes its part of
that slice. So the union over ranks is the plan for any world size, all ranks have the same number of batches, and the
only state needed to resume is one integer: the number of global batches already consumed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from triderm_dist.schema import UNLABELED, ConfigError

if TYPE_CHECKING:
    from triderm_dist.data.lesions import Lesions

_BLOCK = 1 << 18
"""Samples of which something is computed at a time, so that it stays small."""


@dataclass(frozen=True)
class Samples:
    """The samples of a plan: index rows (N,), labels (N,) and shard numbers (N,), all integers."""

    rows: np.ndarray
    labels: np.ndarray
    shards: np.ndarray

    @classmethod
    def of(cls, index: Lesions, rows: np.ndarray) -> Samples:
        """Return the samples in these rows (N,) of a packed set, or of a union of several."""
        return cls(rows, index.labels[rows].astype(np.int16), index.shard[rows])

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """The number of samples of each label from 0 to the largest."""
        counts = np.zeros(int(self.labels.max(initial=UNLABELED)) + 1, np.int64)
        for start in range(0, len(self), _BLOCK):
            labels = self.labels[start : start + _BLOCK]
            counts += np.bincount(labels[labels >= 0], minlength=len(counts))
        return counts


@dataclass(frozen=True)
class Sampling:
    """The sampling strategy of an epoch.

    kind: "sequential" keeps the order of the samples. "shuffle" takes each sample once. "balanced" takes each sample of
    a diagnosis with share f of the labeled samples r = max(1, (threshold / f) ** power) times, for power 1/2 the rule
    of LVIS (Gupta et al. 2019): floor(r) or floor(r) + 1 times in one epoch, and exactly r times on average, since the
    additional repeats rotate through the class over the epochs. Samples without a label are taken once.

    Between two repeats of one sample there are at least s / (2 r) - 1 others in the order, s being the samples of the
    windows that its shard is read in (all samples without a window), r its repeats in the epoch.

    window: number of samples shuffled together, after the shards were shuffled. A window is read from complete shards
    and at most two partial ones, so that reads stay near-sequential; None shuffles all samples together.

    last: samples that do not fill a global batch are padded with others, which are marked as not valid, or dropped.
    """

    kind: Literal["sequential", "shuffle", "balanced"] = "shuffle"
    threshold: float = 0.1
    power: float = 0.5
    window: int | None = None
    last: Literal["pad", "drop"] = "pad"

    def repeats(self, counts: np.ndarray) -> np.ndarray:
        """Return how often an epoch takes a sample of each label on average, (C,), given the samples of each (C,)."""
        if self.kind != "balanced":
            return np.ones(len(counts))
        return repeat_factors(counts, self.threshold, self.power)


@dataclass(frozen=True)
class PlannedBatch:
    """One rank's part of a global batch.

    rows (n,) int64: index rows.  copies (n,) int64: earlier occurrences of the lesion in this epoch.  valid (n,) bool:
    False for padding.  count: valid lesions in the global batch of all ranks.
    """

    number: int
    rows: np.ndarray
    copies: np.ndarray
    valid: np.ndarray
    count: int


class EpochPlan:
    """The samples of one epoch in order.

    `order` (N,) int64 holds index rows; `copies` (N,) int64 numbers the repeats of a lesion from 0, so that each gets
    its own augmentation. N is len(samples), for balanced sampling the sum of the repeats.
    """

    def __init__(self, samples: Samples, sampling: Sampling, seed: int, epoch: int) -> None:
        self.samples, self.sampling, self.seed, self.epoch = samples, sampling, seed, epoch

    @property
    def order(self) -> np.ndarray:
        return self.rows_at(slice(None))

    def rows_at(self, positions: np.ndarray | slice) -> np.ndarray:
        """Return the part of `order` at these positions."""
        return self.samples.rows[self._arranged[0][positions]]

    @property
    def copies(self) -> np.ndarray:
        return self._arranged[1]

    def __len__(self) -> int:
        number = len(self.samples)
        if self.sampling.kind == "balanced":
            number += sum((each.integer - 1) * each.members + len(each.chosen) for each in self._repeated)
        return number

    def num_batches(self, global_batch: int) -> int:
        """Return the number of global batches; the last one may be padded.

        Raises ConfigError if dropping the last one leaves none.
        """
        if self.sampling.last == "pad":
            return -(-len(self) // global_batch)
        if len(self) < global_batch:
            raise ConfigError(
                f"an epoch of {len(self)} lesions does not fill one global batch of {global_batch}, and last=drop "
                "drops it; choose a smaller global batch or last=pad"
            )
        return len(self) // global_batch

    def batches(self, rank: int, world: int, global_batch: int, start: int = 0) -> RankBatches:
        """Return the rank's part of the global batches, from batch number `start` on.

        Every part has ceil(global_batch / world) rows, so that shapes are equal on all ranks and in all steps. Rows
        past the end of the global batch or of the order hold other lesions, marked as not valid.
        """
        return RankBatches(self, rank, world, global_batch, start)

    @functools.cached_property
    def _arranged(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions in `samples` and copy numbers, in the order of the epoch."""
        number = len(self.samples)
        once = np.broadcast_to(np.zeros(1, np.int32), number)
        if self.sampling.kind == "sequential":
            return np.arange(number), once
        random = _generator(self.seed, self.epoch)
        keys = random.integers(0, 2**64, number, np.uint64)
        window = self.sampling.window
        if window is not None and self.sampling.kind == "balanced":
            window = max(1, window * number // len(self))  # so many samples, and their repeats, are a window
        # Where the reading of each shard begins and ends, in samples; without windows, that of the epoch.
        begin, end = np.zeros(1, np.int64), np.full(1, number, np.int64)
        if window is not None:
            begin, end, windows = _windows(self.samples.shards, window, random)
            window_bits = np.uint64(int(windows.max(initial=0)).bit_length())
            keys >>= window_bits
            keys |= windows << (np.uint64(64) - window_bits) if window_bits else np.uint64(0)
            begin, end = begin // window * window, np.minimum(-(-end // window) * window, number)
        order = _argsort(keys)
        del keys
        if self.sampling.kind == "shuffle":
            return order, once
        return self._with_repeats(order, begin, end, random)

    def _with_repeats(
        self, order: np.ndarray, begin: np.ndarray, end: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add the repeats of samples to `order` (N,), which has each once; return samples and copy numbers, (T,).

        The positions begin to end (exclusive) of each shard, or of all, are a circle for its samples. A sample with r
        repeats cuts it into r stretches of equal length, which begin at its own position. Each further repeat is at a
        random position in the first half of its stretch. So two repeats are at least half a stretch apart, and samples
        that share a batch once do not share the next one too.
        """
        repeated, repeats = self._repeats
        position = np.empty(len(order), order.dtype)
        position[order] = np.arange(len(order), dtype=order.dtype)
        shard = np.zeros_like(repeated) if self.sampling.window is None else self.samples.shards[repeated]
        first, length = begin[shard], (end - begin)[shard]
        additional = repeats - 1
        copies = np.arange(1, additional.sum() + 1) - np.repeat(np.cumsum(additional) - additional, additional)
        at = copies + 0.5 * random.random(len(copies))
        at *= np.repeat(length / repeats, additional)
        at += np.repeat(position[repeated] - first, additional)
        np.mod(at, np.repeat(length, additional), out=at)
        at += np.repeat(first, additional)
        # Sort keys: the position, as a fixed-point number in the bits that the index leaves.
        index_bits = _index_bits(len(at))
        fraction_bits = min(24, 64 - int(_index_bits(len(order) + 1) + index_bits))
        by_position = _argsort((at * 2.0**fraction_bits).astype(np.uint64) << index_bits)
        into = np.minimum(at.astype(np.int64), len(order) - 1)[by_position] + np.arange(1, len(at) + 1)
        result, numbers = np.empty(len(order) + len(at), order.dtype), np.zeros(len(order) + len(at), np.int32)
        once = np.ones(len(result), bool)
        once[into] = False
        result[once], result[into] = order, np.repeat(repeated, additional)[by_position]
        numbers[into] = copies[by_position]
        return result, numbers

    @functools.cached_property
    def _repeated(self) -> list[_Repeated]:
        """The diagnoses whose samples are repeated."""
        found, counts = [], self.samples.counts
        factors = self.sampling.repeats(counts)
        for diagnosis in np.flatnonzero(factors > 1).tolist():
            members, integer = int(counts[diagnosis]), int(factors[diagnosis])
            # The additional repeats rotate through the class, in one sequence that is cut into epochs.
            extra = (factors[diagnosis] - integer) * members
            chosen = range(int(self.epoch * extra), int((self.epoch + 1) * extra))
            found.append(_Repeated(diagnosis, members, integer, chosen))
        return found

    @property
    def _repeats(self) -> tuple[np.ndarray, np.ndarray]:
        """The samples (n,) that are repeated in this epoch, in order, and their numbers of occurrences, (n,) int64."""
        repeats = np.ones(len(self.samples), np.int32)
        for each in self._repeated:
            members = np.flatnonzero(self.samples.labels == each.diagnosis)
            repeats[members] = each.integer
            random = _generator(self.seed, 2**63 + each.diagnosis)  # the epochs have the streams from 0
            repeats[random.permutation(members)[np.array(each.chosen, np.int64) % len(members)]] += 1
        repeated = np.flatnonzero(repeats > 1)
        return repeated, repeats[repeated].astype(np.int64)


@dataclass(frozen=True)
class _Repeated:
    """A diagnosis whose samples are repeated in an epoch: each of its `members` `integer` times, and one more time
    those at the positions `chosen` of a random order, modulo their number.
    """

    diagnosis: int
    members: int
    integer: int
    chosen: range


@dataclass(frozen=True)
class RankBatches:
    """One rank's part of the global batches of a plan; see `EpochPlan.batches`."""

    plan: EpochPlan
    rank: int
    world: int
    global_batch: int
    start: int

    @property
    def part(self) -> int:
        """Rows of the part, padding included."""
        return -(-self.global_batch // self.world)

    def __iter__(self) -> Iterator[PlannedBatch]:
        total, copies = len(self.plan), self.plan.copies
        own = self.rank * self.part + np.arange(self.part)
        for number in range(self.start, self.plan.num_batches(self.global_batch)):
            at = number * self.global_batch + own
            count = min(self.global_batch, total - number * self.global_batch)
            padded = at % total  # different lesions, since batch norms see the padding
            yield PlannedBatch(number, self.plan.rows_at(padded), copies[padded], own < count, count)

    @property
    def rows_ahead(self) -> np.ndarray:
        """Index rows (n,) int64 that all ranks together will read, padding included: the order in which remote shards
        are fetched.
        """
        padding = self.part * self.world - self.global_batch
        end = self.plan.num_batches(self.global_batch) * self.global_batch + padding
        return self.plan.rows_at(np.arange(self.start * self.global_batch, end) % len(self.plan))


def _generator(seed: int, stream: int) -> np.random.Generator:
    """Return Philox (Salmon et al. 2011) with the pair as its key."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, stream], np.uint64)))


def _index_bits(number: int) -> np.uint64:
    """Return the bits of the largest index below `number`."""
    return np.uint64(int(max(number - 1, 0)).bit_length())


def _argsort(keys: np.ndarray) -> np.ndarray:
    """Return the order (T,) by the leading bits of the keys (T,) uint64, then by index; overwrites the keys.

    The index takes the place of the last bits: sorting keys is ten times faster than an argsort, and no two keys are
    equal, so the order is the same on every machine.
    """
    bits = _index_bits(len(keys))
    keys >>= bits
    keys <<= bits
    for start in range(0, len(keys), _BLOCK):
        part = keys[start : start + _BLOCK]
        part |= np.arange(start, start + len(part), dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.astype(np.int32 if len(keys) < 2**31 else np.int64)


def _windows(shards: np.ndarray, window: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the shards in shuffled order, cut every `window` samples.

    Returns begin and end of each shard in the order of reading, in samples, int64, and the window of each sample, (T,)
    uint64.
    """
    sizes = np.bincount(shards)
    shuffled = random.permutation(len(sizes))
    begin = np.empty_like(sizes)
    begin[shuffled] = np.cumsum(sizes[shuffled]) - sizes[shuffled]
    by_shard = np.argsort(shards, kind="stable")  # fast: an index lists its shards in order
    read_order = np.empty(len(shards), np.int64)
    read_order[by_shard] = np.arange(len(shards))
    read_order += (begin - (np.cumsum(sizes) - sizes))[shards]
    return begin, begin + sizes, (read_order // window).astype(np.uint64)


def repeat_factors(counts: np.ndarray, threshold: float, power: float) -> np.ndarray:
    """Return max(1, (threshold / share) ** power) for each diagnosis, given its samples (C,); 1 without any."""
    share = counts / max(counts.sum(), 1)
    return np.maximum(1.0, (threshold / np.where(counts > 0, share, threshold)) ** power)
