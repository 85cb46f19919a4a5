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


def test_paired_difference_of_many_lesions_has_the_interval_of_a_bootstrap() -> None:
    first, labels = simulated([1500, 600, 300])
    second = first.copy()
    second[::9] ^= simulated([1500, 600, 300], seed=2)[0][::9]
    generator = np.random.default_rng(1)
    draws = []
    for _ in range(800):
        rows = generator.integers(0, len(labels), len(labels))
        draws.append(metrics.macro_f1(first[rows], labels[rows]) - metrics.macro_f1(second[rows], labels[rows]))
    difference = intervals.paired_difference(first, second, labels)
    assert difference.value == metrics.macro_f1(first, labels) - metrics.macro_f1(second, labels)
    np.testing.assert_allclose([difference.low, difference.high], np.quantile(draws, [0.025, 0.975]), atol=0.003)
    assert intervals.paired_difference(first, first, labels) == Interval(0.0, 0.0, 0.0)
    alone = intervals.macro_f1(first, labels)
    assert difference.high - difference.low < alone.high - alone.low
    assert difference.excludes_zero == (difference.low > 0 or difference.high < 0)


def test_resamples_of_few_units_are_those_of_one_multinomial_draw() -> None:
    generator = np.random.default_rng(0)
    units, frequency = generator.integers(0, 4, (500, 6)).astype(float), generator.integers(1, 9, 500)
    sums = intervals._resampled(units, frequency, 2000, 150, np.random.default_rng(3))
    counts = np.random.default_rng(3).multinomial(2000, frequency / frequency.sum(), size=150)
    np.testing.assert_array_equal(sums, counts @ units)


def test_resamples_of_many_units_have_their_mean_and_covariance() -> None:
    generator = np.random.default_rng(0)
    frequency = np.append(generator.geometric(0.5, 21_000), [20_000, 300, 40])
    drawn, columns = int(frequency.sum()), generator.integers(0, 4, (len(frequency), 3)).astype(float)
    columns[:, 1] *= frequency == 1
    columns[:, 2] *= frequency > intervals._SEVERAL
    sums = intervals._resampled(np.column_stack([np.ones(len(frequency)), columns]), frequency, drawn, 600, generator)
    assert (sums[:, 0] == drawn).all()
    share = frequency / drawn
    mean, covariance = drawn * share @ columns, drawn * np.cov(columns.T, aweights=share, ddof=0)
    deviation = np.sqrt(np.diag(covariance))
    assert (np.abs(sums[:, 1:].mean(axis=0) - mean) < 3 * deviation / np.sqrt(600)).all()
    scaled = (np.cov(sums[:, 1:].T) - covariance) / np.outer(deviation, deviation)
    assert np.abs(scaled).max() < 0.15


def test_groups_are_numbered_in_the_order_of_their_names() -> None:
    generator = np.random.default_rng(0)
    for values in (np.array(["b", "ä", "Z", "🙂", "", "\uffff", "a b"], object), np.array([3, -1, 10**12], object)):
        groups = generator.choice(values, 50)
        numbers = intervals.group_numbers(groups)
        np.testing.assert_array_equal(numbers, np.unique(groups, return_inverse=True)[1])
        np.testing.assert_array_equal(
            numbers, intervals.group_numbers(groups.astype(str) if values[0] == "b" else groups.astype(int))
        )


def test_copies_of_lesions_in_a_group_change_no_interval() -> None:
    decisions, labels = simulated([300, 90, 60])
    other = simulated([300, 90, 60], seed=1)[0]
    groups = np.array([f"patient-{row}" for row in range(len(labels))], object)
    tripled = [np.repeat(each, 3, axis=0) for each in (decisions, other, labels, groups)]
    once, thrice = (
        [
            *intervals.f1_per_class(first, truth, group),
            intervals.macro_f1(first, truth, group),
            intervals.paired_difference(first, second, truth, group),
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


def test_correction_for_many_comparisons_is_that_of_holm() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(intervals.holm(p), [0.03, 0.06, 0.06, 0.02])  # Holm (1979), by hand
    assert intervals.holm(np.array([0.7])) == [0.7] and intervals.holm(np.array([0.6, 0.7])).max() == 1


def test_metrics_have_intervals_over_lesions_or_groups() -> None:
    decisions, labels = simulated([200, 40, 9])
    probabilities = decisions * 0.5 + 0.1
    functions = {
        "macro_f1": metrics.Metric("", lambda p, y, d: metrics.macro_f1(d, y)),
        "positives": metrics.Metric("", lambda p, y, d: float((y == 2).sum())),
    }
    values = intervals.of_metrics(functions, probabilities, labels, decisions, None, 400)
    assert values["macro_f1"].value == metrics.macro_f1(decisions, labels)
    expected = intervals.macro_f1(decisions, labels)
    assert values["macro_f1"].low == pytest.approx(expected.low, abs=0.04)
    assert values["positives"].low < 9 < values["positives"].high  # not stratified
    grouped = intervals.of_metrics(functions, probabilities, labels, decisions, np.where(labels == 2, -1, labels), 200)
    assert set(np.unique([grouped["positives"].low, grouped["positives"].high])) <= set(np.arange(0.0, 30, 4.5))


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


def test_student_interval_of_seeds() -> None:
    values = [0.45, 0.41, 0.47]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = intervals.of_mean(values)
    np.testing.assert_allclose([found.value, found.low, found.high], [np.mean(values), low, high])
    assert np.isnan(intervals.of_mean([0.4]).low)


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


@pytest.mark.parametrize(
    ("ends", "texts"),
    [
        ((0.042, 0.031, 0.053), ("+0.042", "+0.031", "+0.053")),
        ((0.0, 0.0, 0.0), ("+0.000", "+0.000", "+0.000")),
        ((0.0002, 0.0001, 0.0004), ("+0.0002", "+0.0001", "+0.0004")),
        ((-0.0006, -0.0009, -0.0003), ("-0.0006", "-0.0009", "-0.0003")),  # with three decimals, -0.001 to -0.000
        ((0.0001, -0.0002, 0.0004), ("+0.0001", "-0.0002", "+0.0004")),
        ((0.03, 0.00004, 0.06), ("+0.03000", "+0.00004", "+0.06000")),  # beyond the noise: no end looks like 0
        ((0.03, 0.0, 0.06), ("+0.030", "+0.000", "+0.060")),
        ((2e-9, 1e-9, 3e-9), ("+0.000000", "+0.000000", "+0.000000")),
        ((0.1, np.nan, np.nan), ("+0.100", "+nan", "+nan")),
    ],
)
def test_a_difference_has_the_decimals_that_its_interval_needs(ends: tuple[float, ...], texts: tuple[str, ...]) -> None:
    assert Interval(*ends).signed() == texts


def test_interval_over_lesions_and_seeds() -> None:
    same = intervals.over_seeds([Interval(0.02, 0.01, 0.04)] * 3)
    np.testing.assert_allclose([same.value, same.low, same.high], [0.02, 0.01, 0.04])
    differing = [Interval(value, value - 0.01, value + 0.02) for value in (0.0, 0.02, 0.04)]
    half = stats.t.ppf(0.975, 2) * 0.02 / np.sqrt(3)
    found = intervals.over_seeds(differing)
    np.testing.assert_allclose([found.low, found.high], [0.02 - np.hypot(0.01, half), 0.02 + np.hypot(0.02, half)])
    assert np.isnan(intervals.over_seeds(differing[:1]).low)


def ranked(positives: int, negatives: int, gap: float = 1.0, seed: int = 0) -> metrics.Ranking:
    generator = np.random.default_rng(seed)
    positive = np.repeat([True, False], [positives, negatives])
    return metrics.Ranking.of(np.round(generator.normal(size=len(positive)) + gap * positive, 1), positive)


@pytest.mark.parametrize("measure", ["area_under_roc", "average_precision"])
def test_a_ranking_has_the_interval_of_a_bootstrap_and_of_a_jackknife(measure: str) -> None:
    ranking = ranked(400, 1600)
    scores, positive = ranking.thresholds[ranking.rank], ranking.positive
    interval = getattr(intervals, measure)(ranking)
    assert interval.value == getattr(ranking, measure)
    generator, draws = np.random.default_rng(1), []
    for _ in range(500):
        rows = generator.integers(0, len(scores), len(scores))
        draws.append(getattr(metrics.Ranking.of(scores[rows], positive[rows]), measure))
    np.testing.assert_allclose([interval.low, interval.high], np.quantile(draws, [0.025, 0.975]), atol=0.006)


def test_influence_on_average_precision_is_that_of_leaving_a_lesion_out() -> None:
    ranking = ranked(300, 700)
    influence = intervals._average_precision_influence(ranking)
    assert influence.mean() == pytest.approx(0, abs=1e-12)
    scores, kept = ranking.thresholds[ranking.rank], np.ones(1000, bool)
    for row in range(0, 1000, 97):
        kept[row] = False
        without = metrics.Ranking.of(scores[kept], ranking.positive[kept]).average_precision
        kept[row] = True
        assert influence[row] == pytest.approx(999 * (ranking.average_precision - without), abs=0.02)


@pytest.mark.parametrize("gap", [-20.0, 1.0, 20.0])
def test_a_ranking_of_few_lesions_has_an_interval(gap: float) -> None:
    for interval in (intervals.area_under_roc(ranked(5, 200, gap)), intervals.average_precision(ranked(5, 200, gap))):
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        assert interval.low < interval.high - 0.05
    perfect = intervals.average_precision(ranked(5, 200, 20.0))
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    for none in (intervals.area_under_roc(ranked(0, 9)), intervals.average_precision(ranked(0, 9))):
        assert np.isnan([none.value, none.low, none.high]).all()


def test_rates_have_beta_intervals() -> None:
    decisions, labels = simulated([60, 30, 5])
    counts = metrics.class_counts(decisions, labels)
    unlabeled = np.ones((3, 3), bool), 3 * [UNLABELED]
    assert intervals.rates_per_class(decisions, labels) == intervals.rates_per_class(
        np.concatenate([decisions, unlabeled[0]]), np.append(labels, unlabeled[1])
    )
    for label, rates in enumerate(intervals.rates_per_class(decisions, labels)):
        found, predicted, positives = (
            each[label] for each in (counts.true_positives, counts.predicted, counts.positives)
        )
        passed = 95 - predicted - positives + found
        for interval, part, whole in (
            (rates.sensitivity, found, positives),
            (rates.specificity, passed, 95 - positives),
            (rates.positive_predictive_value, found, predicted),
            (rates.negative_predictive_value, passed, 95 - predicted),
        ):
            ends = stats.beta(part + 2 / 3, whole - part + 2 / 3).ppf([0.025, 0.975])
            assert interval.value == pytest.approx(part / whole)
            np.testing.assert_allclose([interval.low, interval.high], ends)
    one = intervals.rates(decisions[:, 0], labels == 0)
    for name in ("sensitivity", "specificity", "positive_predictive_value", "negative_predictive_value"):
        assert getattr(one, name) == getattr(intervals.rates_per_class(decisions, labels)[0], name)


def test_copies_of_lesions_in_a_group_change_no_interval_of_rates_and_rankings() -> None:
    decisions, labels = simulated([300, 90, 60])
    ranking = ranked(300, 150)
    scores, groups = ranking.thresholds[ranking.rank], np.arange(450)
    thrice = [np.repeat(each, 3, axis=0) for each in (decisions, labels, scores, ranking.positive, groups)]
    found = []
    for table, label, score, positive, group in ((decisions, labels, scores, ranking.positive, groups), thrice):
        sorted_scores = metrics.Ranking.of(score, positive)
        rates = intervals.rates_per_class(table, label, group)
        found.append(
            [
                *vars(rates[0]).values(),
                *vars(rates[2]).values(),
                intervals.area_under_roc(sorted_scores, group),
                intervals.average_precision(sorted_scores, group),
                intervals.mean(score, group),
            ]
        )
    for one, three in zip(*found, strict=True):
        np.testing.assert_allclose([three.value, three.low, three.high], [one.value, one.low, one.high], atol=0.01)


def test_predictive_values_at_the_own_prevalence_have_nearly_the_interval_of_the_share() -> None:
    generator = np.random.default_rng(0)
    positive = np.repeat([True, False], [400, 1600])
    decided = generator.random(2000) < np.where(positive, 0.85, 0.1)
    rates = intervals.rates(decided, positive)
    at_own, at_rare = zip(*intervals.predictive_values(decided, positive, [0.2, 0.01]), strict=True)
    for value, own in zip(at_own, (rates.positive_predictive_value, rates.negative_predictive_value), strict=True):
        assert value.value == pytest.approx(own.value, abs=1e-12)
        assert (value.low, value.high) == (pytest.approx(own.low, abs=0.01), pytest.approx(own.high, abs=0.01))
    assert at_rare[0].high < 0.15 and at_rare[1].low > 0.99
    called_none = intervals.predictive_values(np.zeros(2000, bool), positive, [0.2])
    assert np.isnan(called_none[0][0].value) and called_none[1][0].value == pytest.approx(0.8)


def test_mean_of_lesions_has_the_normal_interval() -> None:
    values = np.random.default_rng(0).random(500)
    interval = intervals.mean(values)
    assert interval.value == values.mean()
    assert interval.high - interval.value == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(500), rel=1e-4)


def test_differences_are_distinct_from_0_after_correction_for_their_number() -> None:
    """p of 0.012, 0.03 and 0.04 are all below 0.05; of three, Holm wants 0.0167 of the first and 0.025 of the next."""
    distances = stats.norm.isf(np.array([0.012, 0.03, 0.04]) / 2) / 1.959964
    differences = [Interval(-each, -each - 1, -each + 1) for each in distances]
    assert [each.excludes_zero for each in differences] == [True, True, True]
    assert intervals.beyond_noise(differences) == [True, False, False]
    assert intervals.beyond_noise(differences[::-1]) == [False, False, True]
    assert intervals.beyond_noise([Interval(0.0, 0.0, 0.0), Interval(0.1, 0.1, 0.1)]) == [False, True]
    assert intervals.beyond_noise([]) == []


def test_units_are_the_distinct_sums_of_counts_over_groups() -> None:
    generator = np.random.default_rng(0)
    for lesions, number in ((60, 60), (60, 15), (200, 3), (1, 1)):
        labels, groups = generator.integers(0, 3, lesions), generator.integers(0, number, lesions)
        decisions = generator.random((lesions, 3)) < 0.4
        (counts,), frequency = intervals._units([decisions], labels, groups)
        truth = labels[:, None] == np.arange(3)
        rows = np.concatenate([truth & decisions, truth.astype(int) + decisions, truth], axis=1)
        expected = [rows[groups == group].sum(axis=0) for group in np.unique(groups)]
        distinct, times = np.unique(expected, axis=0, return_counts=True)
        np.testing.assert_array_equal(np.concatenate([counts.found, counts.total, counts.positives], axis=1), distinct)
        np.testing.assert_array_equal(frequency, times)
