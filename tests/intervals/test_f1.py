"""F1, macro F1 and their differences."""

import numpy as np
import pytest
from scipy import stats

from triderm_dist import intervals, metrics
from triderm_dist.intervals import Interval
from triderm_dist.schema import UNLABELED, DataError


def simulated(sizes: list[int], recall: float = 0.7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return decisions and labels; a lesion has the decision of its diagnosis with `recall`, each other with 0.15."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    truth = np.eye(len(sizes))[labels] > 0
    return generator.random((len(labels), len(sizes))) < np.where(truth, recall, 0.15), labels


@pytest.mark.parametrize(("found", "low", "high"), [(0, 0.0, 0.40), (9, 0.85, 1.0)])
def test_a_rare_diagnosis_has_an_interval_at_none_and_all_found(found: int, low: float, high: float) -> None:
    labels = np.repeat([0, 1], [9, 91])
    decisions = np.eye(2)[labels] > 0
    decisions[found:9, 0] = False
    rare, common = intervals.f1_per_class(decisions, labels)
    assert rare.value == (found == 9)
    assert (rare.low, rare.high) == (pytest.approx(low, abs=0.05), pytest.approx(high, abs=0.05))
    assert common.value == 1.0 and 0.95 < common.low < 1.0
    score = intervals.macro_f1(decisions, labels)
    assert score.value == metrics.macro_f1(decisions, labels)
    assert score.low < score.high and score.low >= 0 and score.high <= 1


def test_one_diagnosis_has_the_beta_interval_of_its_intersection_over_union() -> None:
    decisions, labels = simulated([200, 40, 9])
    decisions, labels = np.concatenate([decisions, decisions[:3]]), np.append(labels, 3 * [UNLABELED])
    for label, interval in enumerate(intervals.f1_per_class(decisions, labels)):
        truth, predicted = labels == label, decisions[:, label] & (labels != UNLABELED)
        found, errors = (truth & predicted).sum(), (truth ^ predicted).sum()
        ends = stats.beta(found + 2 / 3, errors + 2 / 3).ppf([0.025, 0.975])
        assert interval.value == pytest.approx(metrics.f1_per_class(decisions, labels)[label])
        np.testing.assert_allclose([interval.low, interval.high], 2 * ends / (1 + ends))


def test_macro_f1_of_many_lesions_has_the_interval_of_a_bootstrap() -> None:
    decisions, labels = simulated([4000, 1500, 900])
    generator = np.random.default_rng(1)
    draws = []
    for _ in range(800):
        rows = generator.integers(0, len(labels), len(labels))
        draws.append(metrics.macro_f1(decisions[rows], labels[rows]))
    score = intervals.macro_f1(decisions, labels)
    np.testing.assert_allclose([score.low, score.high], np.quantile(draws, [0.025, 0.975]), atol=0.002)
    two = np.array([True, False, True])
    kept = intervals.macro_f1(decisions, labels, kept=two)
    assert kept.value == pytest.approx(metrics.f1_per_class(decisions, labels)[two].mean())


def test_macro_f1_difference_of_many_lesions_has_the_interval_of_a_bootstrap() -> None:
    first, labels = simulated([1500, 600, 300])
    second = first.copy()
    second[::9] ^= simulated([1500, 600, 300], seed=2)[0][::9]
    generator = np.random.default_rng(1)
    draws = []
    for _ in range(800):
        rows = generator.integers(0, len(labels), len(labels))
        draws.append(metrics.macro_f1(first[rows], labels[rows]) - metrics.macro_f1(second[rows], labels[rows]))
    difference = intervals.macro_f1_difference(first, second, labels)
    assert difference.value == metrics.macro_f1(first, labels) - metrics.macro_f1(second, labels)
    np.testing.assert_allclose([difference.low, difference.high], np.quantile(draws, [0.025, 0.975]), atol=0.003)
    assert intervals.macro_f1_difference(first, first, labels) == Interval(0.0, 0.0, 0.0)
    alone = intervals.macro_f1(first, labels)
    assert difference.high - difference.low < alone.high - alone.low
    assert difference.excludes_zero == (difference.low > 0 or difference.high < 0)


def test_copies_of_lesions_in_a_group_change_no_interval() -> None:
    decisions, labels = simulated([300, 90, 60])
    other = simulated([300, 90, 60], seed=1)[0]
    groups = np.array([f"patient-{row}" for row in range(len(labels))], object)
    tripled = [np.repeat(each, 3, axis=0) for each in (decisions, other, labels, groups)]
    once, thrice = (
        [
            *intervals.f1_per_class(first, truth, group),
            intervals.macro_f1(first, truth, group),
            intervals.macro_f1_difference(first, second, truth, group),
        ]
        for first, second, truth, group in ((decisions, other, labels, groups), tripled)
    )
    for one, three in zip(once, thrice, strict=True):
        np.testing.assert_allclose([three.value, three.low, three.high], [one.value, one.low, one.high], atol=0.02)
    ungrouped = intervals.macro_f1(tripled[0], tripled[2])
    assert ungrouped.high - ungrouped.low < 0.65 * (thrice[3].high - thrice[3].low)
    assert intervals.macro_f1(decisions, labels, groups).low == pytest.approx(
        intervals.macro_f1(decisions, labels).low, abs=1e-3
    )


def test_spread_is_that_of_test_sets_of_the_same_size() -> None:
    decisions, labels = simulated([2000, 700, 300])
    generator = np.random.default_rng(1)
    scores = []
    for _ in range(800):
        rows = generator.integers(0, len(labels), 200)
        scores.append(metrics.macro_f1(decisions[rows], labels[rows]))
    found = intervals.spread(decisions, labels, 200)
    np.testing.assert_allclose(
        [found.low, found.value, found.high], np.quantile(scores, [0.025, 0.5, 0.975]), atol=0.012
    )
    pairs = intervals.spread(decisions, labels, 200, np.arange(len(labels)) // 2)  # half as many groups
    assert pairs.high - pairs.low == pytest.approx(found.high - found.low, rel=0.25)


def test_invalid_tables_are_refused_and_absent_diagnoses_are_unknown() -> None:
    with pytest.raises(DataError, match=r"\(3, 2\).*\(4,\)"):
        intervals.macro_f1(np.ones((3, 2), bool), np.zeros(4, int))
    with pytest.raises(DataError, match="no lesion is labeled"):
        intervals.macro_f1(np.ones((3, 2), bool), np.full(3, UNLABELED))
    decisions, labels = simulated([50, 20])
    wide = np.concatenate([decisions, np.zeros((70, 40), bool)], axis=1)  # more decisions than fit one integer
    first, *absent = intervals.f1_per_class(wide, labels)[::2]
    assert first == intervals.f1_per_class(decisions, labels)[0]
    assert all(np.isnan(interval.value) for interval in absent)
    assert intervals.macro_f1(wide, labels) == intervals.macro_f1(decisions, labels)


def test_macro_f1_of_few_lesions_has_the_interval_of_its_formula() -> None:
    """Lesion by lesion, with the bias of F1 in the upper end."""
    decisions, labels = simulated([40, 12, 5], recall=0.6)
    each = intervals.f1_per_class(decisions, labels)
    f1, low, high = (np.array([getattr(one, end) for one in each]) for end in ("value", "low", "high"))
    truth = labels[:, None] == np.arange(3)
    found, total = (truth & decisions).sum(axis=0), truth.sum(axis=0) + decisions.sum(axis=0)
    influence = (2.0 * (truth & decisions) - f1 * (truth.astype(int) + decisions)) / total
    correlation = np.corrcoef(np.concatenate([influence, -influence]).T)  # around 0
    union = total - found
    j = (found + 0.5) / (union + 1)
    unbiased = f1 + 2 * j * (1 - j) / (1 + j) ** 3 / union
    below, above = f1 - low, high - unbiased
    score = intervals.macro_f1(decisions, labels)
    assert score.low == pytest.approx(f1.mean() - np.sqrt(below @ correlation @ below) / 3)
    assert score.high == pytest.approx(unbiased.mean() + np.sqrt(above @ correlation @ above) / 3)


def test_draws_of_a_difference_add_half_a_lesion_to_each_diagnosis() -> None:
    """As in loops over resamples: found by both, by one or by none in the mean proportions."""
    labels = np.repeat([0, 1, 2], [30, 4, 2])
    generator, truth = np.random.default_rng(0), labels[:, None] == np.arange(3)
    first, second = (generator.random(truth.shape) < np.where(truth, recall, 0.1) for recall in (1.0, 0.1))
    hits = [truth & table for table in (first, second)]
    shares = []
    for one, two in ((True, True), (True, False), (False, True), (False, False)):
        shares.append(
            np.mean([np.mean((hits[0] == one)[labels == c, c] & (hits[1] == two)[labels == c, c]) for c in range(3)])
        )
    draws = []
    for _ in range(3000):
        rows = generator.integers(0, len(labels), len(labels))
        both, only_first, only_second, none = generator.standard_gamma(0.5 * np.array(shares)[:, None], (4, 3))
        scores = []
        for table, hit, more in ((first, hits[0], both + only_first), (second, hits[1], both + only_second)):
            missed = both + only_first + only_second + none - more
            total = table[rows].sum(axis=0) + truth[rows].sum(axis=0)
            scores.append(np.mean(2 * (hit[rows].sum(axis=0) + more) / (total + 2 * more + missed)))
        draws.append(scores[0] - scores[1])
    own = intervals.macro_f1_difference_draws(first, second, labels, resamples=3000)
    np.testing.assert_allclose(
        np.quantile(own, [0.1, 0.3, 0.5, 0.7, 0.9]), np.quantile(draws, [0.1, 0.3, 0.5, 0.7, 0.9]), atol=0.02
    )
