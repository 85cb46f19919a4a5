"""The order of an epoch: exact, independent of the world size, resumable at any global batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.order import COUNTS, gaps, guaranteed_gaps, measure, samples_of
from tests.data.shards.test_index_foreign import write_foreign
from triderm_dist.data.loader import Loader
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.plan import EpochPlan, PlannedBatch, Samples, Sampling, repeat_factors
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.index_foreign import index_shards
from triderm_dist.schema import ConfigError

GOLDEN = {
    "shuffle": [6, 7, 8, 4, 11, 0, 1, 5, 10, 3, 9, 2],
    "balanced": [0, 1, 3, 2, 6, 7, 4, 5, 8, 10, 11, 10, 9, 11],
}
KINDS = st.sampled_from(["sequential", "shuffle", "balanced"])
SAMPLINGS = st.builds(
    Sampling,
    kind=KINDS,
    threshold=st.sampled_from([0.02, 0.1, 0.5]),
    power=st.sampled_from([0.0, 0.5, 1.0]),
    window=st.sampled_from([None, 1, 7, 50]),
    last=st.sampled_from(["pad", "drop"]),
)


def make_samples(number: int, shards: int = 3) -> Samples:
    random = np.random.default_rng(number)
    labels = np.minimum(random.geometric(0.5, number) - 2, 5)  # some without a label
    return Samples(np.arange(number) * 2 + 1, labels, np.sort(random.integers(0, shards, number)))


def split(plan: EpochPlan, world: int, global_batch: int, start: int = 0) -> list[list[PlannedBatch]]:
    """Return the batches of each rank."""
    return [list(plan.batches(rank, world, global_batch, start)) for rank in range(world)]


def global_batches(ranks: list[list[PlannedBatch]]) -> list[list[tuple[int, int]]]:
    """Return the (row, copy) pairs of each global batch, over all ranks, without padding."""
    return [
        [
            (int(row), int(copy))
            for batch in step
            for row, copy in zip(batch.rows[batch.valid], batch.copies[batch.valid], strict=True)
        ]
        for step in zip(*ranks, strict=True)
    ]


@settings(max_examples=250)
@given(
    number=st.integers(1, 97),
    shards=st.integers(1, 9),
    world=st.integers(1, 8),
    global_batch=st.integers(1, 40),
    sampling=SAMPLINGS,
    seed=st.integers(-(2**32), 2**64),
    epoch=st.integers(0, 5),
    data=st.data(),
)
def test_union_of_ranks_is_the_plan(number, shards, world, global_batch, sampling, seed, epoch, data):
    """For any world size, also with fewer shards than ranks, and resumed at any batch with a different world size."""
    plan = EpochPlan(make_samples(number, shards), sampling, seed, epoch)
    if sampling.last == "drop" and len(plan) < global_batch:
        with pytest.raises(ConfigError, match="does not fill one global batch"):
            plan.num_batches(global_batch)
        return
    steps = plan.num_batches(global_batch)
    ranks = split(plan, world, global_batch)
    assert {len(batches) for batches in ranks} == {steps}
    assert {len(batch.rows) for batches in ranks for batch in batches} == {-(-global_batch // world)}
    seen = global_batches(ranks)
    samples = list(zip(plan.order.tolist(), plan.copies.tolist(), strict=True))
    kept = samples if sampling.last == "pad" else samples[: len(samples) // global_batch * global_batch]
    assert seen == [kept[start : start + global_batch] for start in range(0, len(kept), global_batch)]
    for step, batches in enumerate(zip(*ranks, strict=True)):
        assert {(batch.number, batch.count) for batch in batches} == {(step, len(seen[step]))}

    start, other = data.draw(st.integers(0, steps)), data.draw(st.integers(1, 8))
    again = EpochPlan(make_samples(number, shards), sampling, seed, epoch)
    assert global_batches(split(again, other, global_batch, start)) == seen[start:]


@settings(max_examples=100)
@given(number=st.integers(1, 97), world=st.integers(1, 8), global_batch=st.integers(1, 40), start=st.integers(0, 9))
def test_prefetched_rows_equal_those_read_by_the_ranks(number, world, global_batch, start):
    plan = EpochPlan(make_samples(number), Sampling(), 0, 0)
    ranks = split(plan, world, global_batch, start)
    read = {int(row) for batches in ranks for batch in batches for row in batch.rows}
    ahead = plan.batches(0, world, global_batch, start).rows_ahead.tolist()
    assert read <= set(ahead)
    valid = [row for step in zip(*ranks, strict=True) for batch in step for row in batch.rows[batch.valid]]
    assert ahead[: len(valid)] == valid


def loaded(index: ShardIndex, source: PhotoSource, sampling: Sampling, world: int, start: int, workers: int):
    """Return the lesions of each global batch as yielded by the loaders of all ranks, without padding."""
    samples = Samples(np.arange(len(index)), index.labels, index.shard)
    plans = [EpochPlan(samples, sampling, 3, 1) for _ in range(world)]
    loaders = [
        Loader(
            index,
            source,
            plan.batches(rank, world, 7, start),
            micro_batch=2,
            device=torch.device("cpu"),
            workers=workers,
            prefetch=3,
        )
        for rank, plan in enumerate(plans)
    ]
    return [
        [
            name
            for part in parts
            for batch in part.micro_batches
            for name, valid in zip(batch.lesion_ids, batch.valid.tolist(), strict=True)
            if valid
        ]
        for parts in zip(*loaders, strict=True)
    ]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """23 lesions in 3 shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_foreign(folder, lesions=23, shard_lesions=9)
    return index_shards(folder)


@pytest.mark.parametrize("kind", ["sequential", "shuffle", "balanced"])
def test_loaders_of_all_ranks_yield_the_plan(index, kind):
    """On 1, 3 and 8 ranks (more ranks than shards), with 1 to 4 workers, resumed at every global batch."""
    sampling = Sampling(kind, threshold=0.3, window=10)
    source = PhotoSource(index, 24, (0.5,) * 3, (0.5,) * 3)
    samples = Samples(np.arange(len(index)), index.labels, index.shard)
    order = index.lesion_ids[EpochPlan(samples, sampling, 3, 1).order].tolist()
    expected = [order[start : start + 7] for start in range(0, len(order), 7)]
    for world, workers in itertools.product((1, 3, 8), (1, 4)):
        assert loaded(index, source, sampling, world, 0, workers) == expected
    for start in range(len(expected) + 1):
        assert loaded(index, source, sampling, 2, start, 3) == expected[start:]
    source.close()


# --- samples of an epoch ---------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(number=st.integers(1, 200), kind=st.sampled_from(["sequential", "shuffle"]), window=st.sampled_from([None, 10]))
def test_each_sample_occurs_once(number, kind, window):
    samples = make_samples(number)
    plan = EpochPlan(samples, Sampling(kind, window=window), seed=3, epoch=1)
    assert sorted(plan.order) == samples.rows.tolist()
    assert not plan.copies.any()


def test_order_depends_on_seed_and_epoch_only():
    samples = make_samples(300)
    order = EpochPlan(samples, Sampling("shuffle"), 1, 0).order
    assert (order == EpochPlan(samples, Sampling("shuffle"), 1, 0).order).all()
    assert (order != EpochPlan(samples, Sampling("shuffle"), 1, 1).order).any()
    assert (order != EpochPlan(samples, Sampling("shuffle"), 2, 0).order).any()


def test_order_is_the_same_on_every_machine():
    """Compared with recorded orders: a change would change the data order of every resumed run."""
    samples = Samples(np.arange(12), np.array([0] * 10 + [1] * 2), np.arange(12) // 4)
    assert EpochPlan(samples, Sampling("shuffle"), 7, 2).order.tolist() == GOLDEN["shuffle"]
    assert EpochPlan(samples, Sampling("balanced", 0.5, window=5), 7, 2).order.tolist() == GOLDEN["balanced"]


def test_shuffle_is_uniform():
    """Samples are uniformly distributed over positions: chi-squared test with 9 degrees of freedom, p = 1e-6."""
    samples = Samples(np.arange(10), np.zeros(10, np.int64), np.zeros(10, np.int64))
    counts = np.zeros((10, 10))
    for epoch in range(2000):
        counts[EpochPlan(samples, Sampling("shuffle"), 0, epoch).order, np.arange(10)] += 1
    assert (((counts - 200) ** 2 / 200).sum(1) < 45).all()


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=11),
    threshold=st.floats(0.01, 1.0),
    power=st.floats(0, 1),
    seed=st.integers(0, 99),
    window=st.sampled_from([None, 13]),
)
def test_balanced_repeats_follow_the_formula_exactly_over_epochs(counts, threshold, power, seed, window):
    """After any number of epochs every lesion has been sampled as often as by the formula, up to one."""
    labels = np.repeat(np.arange(len(counts)), counts)
    samples = Samples(np.arange(len(labels)), labels, np.zeros(len(labels), np.int64))
    taken = np.zeros(len(labels))
    for epoch in range(8):
        plan = EpochPlan(samples, Sampling("balanced", threshold, power, window), seed, epoch)
        assert len(plan) == len(plan.order)
        now = np.bincount(plan.order, minlength=len(labels))
        taken += now
        for diagnosis, count in enumerate(counts):
            r = max(1.0, (threshold / (count / len(labels))) ** power)
            assert set(now[labels == diagnosis]) <= {int(r), int(r) + 1}
            of_class = taken[labels == diagnosis]
            assert abs(of_class.sum() - r * count * (epoch + 1)) < 1 + 1e-6
            assert of_class.max() - of_class.min() <= 1


def test_repeat_factors_follow_the_formula():
    counts = Samples(np.arange(250), np.repeat([0, 1, 3, -1], [180, 16, 4, 50]), np.zeros(250, np.int64)).counts
    factors = repeat_factors(counts, 0.2, 0.5)
    assert factors == pytest.approx([1, (0.2 / 0.08) ** 0.5, 1, (0.2 / 0.02) ** 0.5])


@settings(max_examples=100)
@given(
    rare=st.integers(1, 6),
    common=st.integers(100, 300),
    shards=st.integers(1, 4),
    window=st.sampled_from([None, 25, 50, 400]),
    power=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_copies_are_numbered_and_a_guaranteed_distance_apart(rare, common, shards, window, power, seed):
    number = common + rare
    labels = np.repeat([0, 1], [common, rare])
    of_row = np.random.default_rng(seed).permutation(np.arange(number) % shards)
    samples = Samples(np.arange(number), labels, of_row)
    plan = EpochPlan(samples, Sampling("balanced", 0.5, power, window), seed, 0)
    guaranteed, least = guaranteed_gaps(plan), gaps(plan.order)
    assert (least >= guaranteed).all()
    for row in range(common, number):
        positions = np.flatnonzero(plan.order == row)
        assert sorted(plan.copies[positions]) == list(range(len(positions)))
    if window is None:
        assert guaranteed[common:].min() == number // (2 * np.bincount(plan.order).max())


def test_copies_stay_in_the_windows_of_their_shard():
    """A window of 40 of 400 lesions in shards of 10 holds the copies of its shards' lesions only."""
    of_row = np.repeat(np.arange(40), 10)
    labels = (np.arange(400) % 50 == 0).astype(int)
    plan = EpochPlan(Samples(np.arange(400), labels, of_row), Sampling("balanced", 0.2, 1.0, 40), 5, 0)
    read = of_row[plan.order]
    assert len(read) > 450
    for shard in range(40):
        places = np.flatnonzero(read == shard)
        assert places[-1] - places[0] < 3 * 40


def test_balanced_order_is_as_random_as_a_shuffle():
    """Statistics of benchmarks.order with the class counts of MILK10k, beside a random order of the same samples."""
    found = measure(samples_of(sum(COUNTS)), Sampling("balanced"), 32, epochs=2)
    assert found["company"] < found["company_random"] + 0.01
    assert found["same_batch"] == 0 < found["same_batch_random"]
    assert found["least_gap"] >= found["guaranteed"] > 300
    assert found["variance"] == pytest.approx(1, abs=0.15)
    assert found["correlation"] < 0.1


def test_lesions_of_a_class_are_not_chosen_with_the_random_numbers_of_an_epoch():
    """Philox keys are used once: those of diagnoses differ from those of epochs."""
    labels = np.array([0] * 30 + [1] * 10)
    plan = EpochPlan(Samples(np.arange(40), labels, np.zeros(40, np.int64)), Sampling("balanced", 0.5, 0.5), 3, 0)
    extra = 30 + np.flatnonzero(np.bincount(plan.order)[30:] == 2)
    generator = np.random.Generator(np.random.Philox(key=np.array([3, 1], np.uint64)))
    assert 2 <= len(extra) <= 8
    assert set(extra) != set(generator.permutation(np.arange(30, 40))[: len(extra)])


@settings(max_examples=40)
@given(shards=st.integers(2, 40), per_shard=st.integers(1, 12), window=st.integers(1, 60), epoch=st.integers(0, 3))
def test_window_keeps_reads_near_sequential(shards, per_shard, window, epoch):
    """A window reads complete shards and at most two partial ones; a shard is read in adjacent windows only."""
    of_row = np.repeat(np.arange(shards), per_shard)
    samples = Samples(np.arange(len(of_row)), np.zeros(len(of_row), np.int64), of_row)
    read = of_row[EpochPlan(samples, Sampling("shuffle", window=window), 5, epoch).order]
    for start in range(0, len(read), window):
        assert len(set(read[start : start + window])) <= window // per_shard + 2
    for shard in range(shards):
        windows = np.unique(np.flatnonzero(read == shard) // window)
        assert len(windows) == windows[-1] - windows[0] + 1 <= per_shard // window + 2


def test_shards_may_be_in_any_order():
    """For rows in any order, as in a fold, windows still consist of complete shards."""
    of_row = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 10))
    samples = Samples(np.arange(100), np.zeros(100, np.int64), of_row)
    read = of_row[EpochPlan(samples, Sampling("shuffle", window=20), 5, 0).order]
    assert [len(set(read[start : start + 20])) for start in range(0, 100, 20)] == [2] * 5


@pytest.mark.parametrize("kind", ["shuffle", "balanced"])
def test_plan_of_a_million_rows_uses_little_memory(kind):
    """The limit is exceeded with one Python object per row; a benchmark measures ten million rows."""
    import tracemalloc

    labels = np.random.default_rng(0).choice(11, 10**6, p=np.arange(1, 12) / 66)
    samples = Samples(np.arange(10**6), labels, np.arange(10**6) // 512)
    tracemalloc.start()
    plan = EpochPlan(samples, Sampling(kind, window=4096), 0, 0)
    first = next(iter(plan.batches(0, 8, 96)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(first.rows) == 12 and peak < 120e6
