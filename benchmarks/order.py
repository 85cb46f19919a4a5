"""Measure how well the epoch plan shuffles, beside a random order of the same samples.

python -m benchmarks.order

A row is one setting of `train.sampling`, with the class counts of MILK10k (5,240 lesions), mean over epochs:

    company      of the pairs of repeated lesions that share a batch, the share that shares another one in the epoch
    same batch   of the repeated lesions, the share with two copies in one batch
    least gap    between two copies of a lesion, in samples; and what `Sampling` guarantees
    variance     of the lesions of a diagnosis in a batch, divided by that of a random order; mean over diagnoses
    correlation  of the places of a lesion in this epoch and in the next one

At the end: seconds and peak memory of the plan of ten million lesions. The last line is one JSON object.
"""

from __future__ import annotations

import json
import resource
import time
from collections import Counter
from itertools import combinations

import numpy as np
from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.settings import Section

COUNTS = (303, 2522, 44, 544, 52, 50, 9, 450, 749, 473, 44)
"""Lesions of each diagnosis in MILK10k."""
SHARD = 256


class Settings(Section):
    epochs: int = Field(8, ge=2, description="epochs to average over")
    batches: tuple[int, ...] = Field((32, 96), description="global batch sizes")
    lesions: int = Field(10_000_000, ge=1, description="lesions of the large plan")


SAMPLINGS = {
    "defaults": Sampling("balanced"),
    "power 1": Sampling("balanced", power=1.0),
    "window 500": Sampling("balanced", window=500),
    "window 200": Sampling("balanced", window=200),
    "window 500, power 1": Sampling("balanced", power=1.0, window=500),
}


def samples_of(lesions: int, seed: int = 0) -> Samples:
    """Return lesions with the class shares of MILK10k, in random order, in shards of `SHARD`."""
    shares = np.array(COUNTS) / sum(COUNTS)
    random = np.random.default_rng(seed)
    if lesions == sum(COUNTS):
        labels = random.permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
    else:
        labels = random.choice(len(COUNTS), lesions, p=shares)
    return Samples(np.arange(lesions), labels, np.arange(lesions) // SHARD)


def company(order: np.ndarray, batch: int) -> tuple[float, float]:
    """Return the share of pairs of repeated samples with a batch in common that have another one in common, and the
    share of repeated samples with two copies in one batch.
    """
    repeats = np.bincount(order)
    together: Counter[tuple[int, int]] = Counter()
    doubled = set()
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        part = part[repeats[part] > 1]
        distinct, counts = np.unique(part, return_counts=True)
        doubled.update(distinct[counts > 1].tolist())
        together.update(combinations(distinct.tolist(), 2))
    pairs = np.array(list(together.values()))
    return float((pairs > 1).mean()), len(doubled) / max(1, int((repeats > 1).sum()))


def gaps(order: np.ndarray) -> np.ndarray:
    """Return the least gap between two copies of each sample, in samples; the length of the order where there is one
    copy.
    """
    by_sample = np.argsort(order, kind="stable")
    same = order[by_sample][1:] == order[by_sample][:-1]
    least = np.full(order.max() + 1, len(order))
    np.minimum.at(least, order[by_sample][1:][same], np.diff(by_sample)[same])
    return least


def guaranteed_gaps(plan: EpochPlan) -> np.ndarray:
    """Return the gap that `Sampling` guarantees to each sample of a plan whose shards are read in complete windows.

    A lower bound: the samples of a shard's windows are at least those of the shard, and of one window.
    """
    number, window = len(plan.samples), plan.sampling.window
    repeats = np.bincount(plan.order, minlength=number)
    span = np.full(number, number)
    if window is not None:
        own = max(1, window * number // len(plan))
        sizes = np.bincount(plan.samples.shards)[plan.samples.shards]
        # The last window may be smaller, so that a bound for all shards does not count it.
        span = np.minimum(np.maximum(sizes, min(own, number % own or own)), number)
    return span // (2 * repeats)


def variance(order: np.ndarray, labels: np.ndarray, batch: int) -> np.ndarray:
    """Return the variance over full batches of the number of samples of each diagnosis, (C,)."""
    full = len(order) // batch * batch
    batches = labels[order[:full]].reshape(-1, batch)
    return np.stack([(batches == label).sum(1) for label in range(labels.max() + 1)]).var(1)


def correlation(order: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of the places of the first copies in two orders."""
    first, second = (np.unique(each, return_index=True)[1] for each in (order, other))
    return float(np.corrcoef(first, second)[0, 1])


def measure(samples: Samples, sampling: Sampling, batch: int, epochs: int) -> dict[str, float]:
    """Return the statistics of the plan and of a random order of the same samples, by name."""
    rows = []
    for epoch in range(epochs):
        plan = EpochPlan(samples, sampling, 1, epoch)
        order, random = plan.order, np.random.default_rng(epoch)
        shuffled, following = random.permutation(order), EpochPlan(samples, sampling, 1, epoch + 1).order
        (together, doubled), (random_together, random_doubled) = company(order, batch), company(shuffled, batch)
        least = gaps(order)
        rows.append(
            {
                "company": together, "company_random": random_together,
                "same_batch": doubled, "same_batch_random": random_doubled,
                "least_gap": least.min(), "guaranteed": guaranteed_gaps(plan).min(),
                "least_gap_random": gaps(shuffled).min(),
                "variance": (variance(order, samples.labels, batch) / variance(shuffled, samples.labels, batch)).mean(),
                "correlation": abs(correlation(order, following)),
                "correlation_random": abs(correlation(shuffled, random.permutation(following))),
            }
        )  # fmt: skip
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def main(settings: Settings) -> None:
    samples = samples_of(sum(COUNTS))
    result: dict[str, object] = {}
    print(
        f"{'sampling':<19}{'batch':>5}{'company':>18}{'same batch':>18}{'least gap (guaranteed)':>26}"
        f"{'variance':>10}{'correlation':>18}\n{'':<24}" + f"{'plan / random':>18}" * 2 + f"{'plan / random':>26}"
        f"{'ratio':>10}{'plan / random':>18}"
    )
    for name, sampling in SAMPLINGS.items():
        for batch in settings.batches:
            found = measure(samples, sampling, batch, settings.epochs)
            result[f"{name}, batch {batch}"] = {key: round(value, 4) for key, value in found.items()}
            print(
                f"{name:<20}{batch:>4}{found['company']:>9.1%} /{found['company_random']:>7.1%}"
                f"{found['same_batch']:>9.1%} /{found['same_batch_random']:>7.1%}"
                f"{found['least_gap']:>11.0f} ({found['guaranteed']:.0f}) /{found['least_gap_random']:>5.0f}"
                f"{found['variance']:>12.2f}{found['correlation']:>10.3f} /{found['correlation_random']:>6.3f}"
            )
    large = samples_of(settings.lesions)
    for name, sampling in {"large": Sampling("balanced"), "large, window": Sampling("balanced", window=65_536)}.items():
        started, cpu = time.perf_counter(), time.process_time()
        order = EpochPlan(large, sampling, 0, 0).order
        seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        result[name] = {"order": len(order), **{key: round(value, 2) for key, value in seconds.items()}}
        print(
            f"{name}: {settings.lesions:,} lesions, {len(order):,} in the order: {seconds['cpu_seconds']:.1f} s of CPU "
            f"time, peak memory of the process {peak:.2f} GiB"
        )
        del order
    result["peak_gib"] = round(peak, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    run(Settings, main, __doc__)
