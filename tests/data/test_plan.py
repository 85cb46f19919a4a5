"""The order of an epoch: exact, the same however it is split, resumable at any global batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triderm_dist.data.plan import EpochPlan, Samples, Sampling, repeat_factors
from triderm_dist.schema import ConfigError

KINDS = st.sampled_from(["sequential", "shuffle", "balanced"])


def make_samples(number: int, shards: int = 3) -> Samples:
    random = np.random.default_rng(number)
    labels = np.minimum(random.geometric(0.5, number) - 1, 5)
    return Samples(np.arange(number) * 2 + 1, labels, np.sort(random.integers(0, shards, number)))


@settings(max_examples=60, deadline=None)
@given(
    number=st.integers(1, 97),
    world=st.integers(1, 8),
    part=st.integers(1, 5),
    kind=KINDS,
    window=st.sampled_from([None, 1, 7, 50]),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 5),
    start=st.integers(0, 5),
)
def test_union_of_ranks_is_the_plan(number, world, part, kind, window, seed, epoch, start):
    plan = EpochPlan(make_samples(number), Sampling(kind, window=window), seed, epoch)
    global_batch = world * part
    ranks = [list(plan.batches(rank, world, global_batch, start)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {max(plan.num_batches(global_batch) - start, 0)}
    seen = [row for step in zip(*ranks, strict=True) for batch in step for row in batch.rows[batch.valid]]
    assert seen == plan.order[start * global_batch :].tolist()
    for step in zip(*ranks, strict=True):
        assert sum(batch.valid.sum() for batch in step) == step[0].count
        assert all(len(batch.rows) == part for batch in step)


@settings(max_examples=30, deadline=None)
@given(number=st.integers(1, 200), kind=st.sampled_from(["sequential", "shuffle"]), window=st.sampled_from([None, 10]))
def test_each_sample_once(number, kind, window):
    samples = make_samples(number)
    plan = EpochPlan(samples, Sampling(kind, window=window), seed=3, epoch=1)
    assert sorted(plan.order) == samples.rows.tolist()
    assert not plan.copies.any()


def test_order_depends_on_seed_and_epoch_alone():
    samples = make_samples(300)
    order = EpochPlan(samples, Sampling("shuffle"), 1, 0).order
    assert (order == EpochPlan(samples, Sampling("shuffle"), 1, 0).order).all()
    assert (order != EpochPlan(samples, Sampling("shuffle"), 1, 1).order).any()
    assert (order != EpochPlan(samples, Sampling("shuffle"), 2, 0).order).any()


def test_balanced_repeats_follow_the_formula_exactly_over_epochs():
    labels = np.repeat([0, 1, 2], [180, 16, 4])
    samples = Samples(np.arange(200), labels, np.zeros(200, np.int64))
    sampling = Sampling("balanced", threshold=0.2, power=0.5)
    factors = repeat_factors(labels, 0.2, 0.5)
    assert factors[0] == 1
    assert factors[1] == pytest.approx((0.2 / 0.08) ** 0.5)
    assert factors[2] == pytest.approx((0.2 / 0.02) ** 0.5)
    epochs = 50
    turns = np.zeros(200)
    for epoch in range(epochs):
        plan = EpochPlan(samples, sampling, 0, epoch)
        assert len(plan) == len(plan.order)
        counts = np.bincount(plan.order, minlength=200)
        for diagnosis in range(3):
            # within an epoch a lesion appears floor(r) or floor(r) + 1 times
            r = factors[diagnosis]
            assert set(counts[labels == diagnosis]) <= {int(r), int(r) + 1}
        turns += counts
    for diagnosis in range(3):
        mean = turns[labels == diagnosis] / epochs
        assert abs(mean - factors[diagnosis]).max() <= 1 / epochs + 1e-9  # exact up to one started round


def test_copies_are_kept_apart_and_numbered():
    labels = np.repeat([0, 1], [300, 3])
    plan = EpochPlan(Samples(np.arange(303), labels, np.zeros(303, np.int64)), Sampling("balanced", 0.5, 0.5), 0, 0)
    for row in (300, 301, 302):
        places = np.flatnonzero(plan.order == row)
        assert len(places) == int(repeat_factors(labels, 0.5, 0.5)[1])
        assert np.diff(places).min() > len(plan) / len(places) * 0.5
        assert sorted(plan.copies[places]) == list(range(len(places)))


def test_window_keeps_reads_near_sequential():
    samples = Samples(np.arange(400), np.zeros(400, np.int64), np.repeat(np.arange(40), 10))
    plan = EpochPlan(samples, Sampling("shuffle", window=20), 5, 0)
    shards = samples.shards[plan.order]
    for start in range(0, 400, 20):
        assert len(set(shards[start : start + 20])) == 2  # a window of 20 lesions is two whole shards of 10


def test_global_batch_must_split():
    with pytest.raises(ConfigError, match="does not split over 3 ranks"):
        list(EpochPlan(make_samples(10), Sampling(), 0, 0).batches(0, 3, 10))
