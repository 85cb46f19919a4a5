import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from triderm_dist import metrics
from triderm_dist.schema import DIAGNOSES, DataError

C = len(DIAGNOSES)


def slow_f1(decisions: np.ndarray, labels: np.ndarray, label: int) -> float:
    tp = sum(1 for row, y in zip(decisions, labels, strict=True) if row[label] and y == label)
    fp = sum(1 for row, y in zip(decisions, labels, strict=True) if row[label] and y not in (label, -1))
    fn = sum(1 for row, y in zip(decisions, labels, strict=True) if not row[label] and y == label)
    return 2 * tp / (2 * tp + fp + fn)


@settings(deadline=None)
@given(arrays(bool, (30, 4)), arrays(np.int64, 30, elements=st.integers(-1, 3)))
def test_f1_equals_a_reference_and_ignores_unlabeled_lesions(decisions: np.ndarray, labels: np.ndarray) -> None:
    f1 = metrics.f1_per_class(decisions, labels)
    for label in range(4):
        if (labels == label).any():
            assert f1[label] == pytest.approx(slow_f1(decisions, labels, label))
        else:
            assert np.isnan(f1[label])
    if (labels >= 0).any():
        assert metrics.macro_f1(decisions, labels) == pytest.approx(np.nanmean(f1))


def test_official_threshold_is_strict() -> None:
    labels = np.arange(3)
    assert metrics.official_macro_f1(np.eye(3) * 0.5, labels) == 0.0
    assert metrics.official_macro_f1(np.eye(3) * 0.5000001, labels) == 1.0
    assert metrics.argmax_macro_f1(np.eye(3) * 0.5, labels) == 1.0


def test_mismatched_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(3, 2\).*\(4,\)"):
        metrics.macro_f1(np.ones((3, 2), bool), np.zeros(4, int))


def test_bootstrap_equals_resampling_lesions_one_by_one() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [200, 40, 9])
    decisions = generator.random((len(labels), 3)) < np.where(np.eye(3)[labels] > 0, 0.7, 0.15)
    slow = []
    for _ in range(3000):
        rows = np.concatenate([generator.choice(np.flatnonzero(labels == c), (labels == c).sum()) for c in range(3)])
        slow.append(metrics.f1_per_class(decisions[rows], labels[rows]))
    fast = metrics.bootstrap_f1(decisions, labels, 3000, seed=1)
    np.testing.assert_allclose(fast.mean(axis=0), np.mean(slow, axis=0), atol=0.01)
    np.testing.assert_allclose(fast.std(axis=0), np.std(slow, axis=0), rtol=0.1)
    assert np.isfinite(fast).all()  # stratified: every diagnosis is in each resample
    interval = metrics.bootstrap_interval(decisions, labels, 3000)
    assert interval.low < interval.value < interval.high


@pytest.mark.parametrize("recall", [0.3, 0.8, 0.95, 1.0])
def test_recall_difference_interval_has_nominal_coverage(recall: float) -> None:
    """A slice with 60 lesions of one diagnosis and 5 of each other, compared with 200 of each, at equal recall."""
    generator = np.random.default_rng(0)
    few, many = np.array([60] + 10 * [5]), np.full(11, 200)
    kept, draws, behind, ahead = np.ones(11, bool), 2000, 0, 0
    for _ in range(draws):
        counts = [
            metrics.ClassCounts(generator.binomial(positives, recall), positives, positives)
            for positives in (few, many)
        ]
        difference = metrics.recall_difference(counts[0], counts[1], kept)
        assert difference.low <= difference.value <= difference.high
        behind, ahead = behind + (difference.high < 0), ahead + (difference.low > 0)
    assert behind / draws < 0.04  # nominally 0.025
    assert ahead / draws < 0.08  # few lesions with high recall give wide intervals
    if recall < 1:
        assert behind + ahead > 0  # the interval is narrow enough to detect a difference


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 100)
    first = metrics.argmax_decisions(np.eye(3)[labels] + generator.normal(scale=0.6, size=(300, 3)))
    second = first.copy()
    second[np.flatnonzero(first.any(axis=1))[::15]] = False
    assert metrics.paired_difference(first, first, labels) == metrics.Interval(0.0, 0.0, 0.0)
    difference = metrics.paired_difference(first, second, labels)
    assert 0 < difference.low < difference.value < difference.high
    separate = [metrics.bootstrap_interval(table, labels) for table in (first, second)]
    assert separate[0].low < separate[1].high
    assert difference.high - difference.low < separate[0].high - separate[0].low


def test_score_equals_the_official_scorer_on_200_submissions() -> None:
    """All by the F1 per category of the scorer; ten also by the complete scorer, which takes 0.3 s each."""
    scoring = pytest.importorskip("isic_challenge_scoring", reason="isic-challenge-scoring 5.8.0 is not installed")
    if not hasattr(scoring, "ClassificationMetric") or not hasattr(scoring.ClassificationMetric, "DICE"):
        pytest.skip("this isic-challenge-scoring is older than 5.8.0 and has no dice")
    pandas = pytest.importorskip("pandas")
    from isic_challenge_scoring import metrics as official
    from isic_challenge_scoring.classification import ClassificationScore
    from isic_challenge_scoring.confusion import create_binary_confusion_matrix

    generator = np.random.default_rng(0)
    for trial in range(200):
        rows = int(generator.integers(C * 2, 90))
        labels = generator.permutation(np.concatenate([np.arange(C), generator.integers(0, C, rows - C)]))
        kind = trial % 4
        table = generator.random((rows, C))
        if kind == 1:  # values of exactly 0.5
            table = generator.choice([0.0, 0.25, 0.5, 0.5000001, 0.75, 1.0], (rows, C))
        elif kind == 2:  # some diagnoses never predicted
            table[:, generator.choice(C, 4, replace=False)] *= 0.5
        elif kind == 3:  # one diagnosis only
            table = np.zeros((rows, C))
            table[:, generator.integers(C)] = 0.9
        ours = metrics.official_macro_f1(table, labels)
        dice = [
            official.binary_dice(
                create_binary_confusion_matrix(
                    truth_binary_values=labels == label,
                    prediction_binary_values=table[:, label] > 0.5,
                    weights=np.ones(rows),
                    name=DIAGNOSES[label],
                )
            )
            for label in range(C)
        ]
        assert np.mean(dice) == pytest.approx(ours, abs=1e-12)
        if trial % 10 in (0, 3) and trial < 100:
            ids = pandas.Index([f"lesion-{row}" for row in range(rows)], name="lesion_id")
            truth = pandas.DataFrame(np.eye(C)[labels], columns=DIAGNOSES, index=ids)
            submitted = pandas.DataFrame(table, columns=DIAGNOSES, index=ids)
            weights = pandas.DataFrame({"score_weight": 1.0, "validation_weight": 1.0}, index=ids)
            score = ClassificationScore(truth, submitted, weights, scoring.ClassificationMetric.DICE)
            assert score.overall == pytest.approx(ours, abs=1e-12)


def test_metrics_of_the_report_and_their_intervals(monkeypatch) -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [200, 40, 9])
    probabilities = 0.5 * np.eye(3)[labels] + generator.random((len(labels), 3))
    decisions = probabilities > 0.6
    positives = metrics.Metric("positives", lambda probabilities, labels, decisions: float((labels == 2).sum()))
    monkeypatch.setitem(metrics.METRICS, "positives", positives)
    monkeypatch.setitem(metrics.METRICS, "macro_f1", metrics.Metric("", lambda p, y, d: metrics.macro_f1(d, y)))
    values = metrics.bootstrap_metrics(probabilities, labels, decisions, 400)
    assert list(values) == list(metrics.METRICS)
    assert values["mean_recall"].value == pytest.approx(np.mean(metrics.class_counts(decisions, labels).recall))
    assert values["accuracy"].value == (probabilities.argmax(axis=1) == labels).mean()
    assert values["positives"] == metrics.Interval(9.0, 9.0, 9.0)  # stratified
    expected = metrics.bootstrap_interval(decisions, labels, 4000)
    assert values["macro_f1"].value == expected.value
    assert values["macro_f1"].low == pytest.approx(expected.low, abs=0.02)
    assert values["macro_f1"].high == pytest.approx(expected.high, abs=0.02)


def test_malignant_against_benign() -> None:
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    generator = np.random.default_rng(0)
    malignant = np.array([1.0, 0.0, np.nan, 1.0, 0.0])
    labels = generator.choice([0, 1, 3, 4], 200)
    probabilities = (0.5 * np.eye(5)[labels] + generator.random((200, 5))).round(1)  # with ties
    decisions = probabilities > 0.8
    values = {name: metric.function(probabilities, labels, decisions) for name, metric in
              metrics.malignancy_metrics(malignant).items()}  # fmt: skip
    is_malignant, called = np.isin(labels, [0, 3]), decisions[:, [0, 3]].any(axis=1)
    score = probabilities[:, [0, 3]].sum(axis=1) / probabilities[:, [0, 1, 3, 4]].sum(axis=1)
    assert values["sensitivity"] == pytest.approx(called[is_malignant].mean())
    assert values["specificity"] == pytest.approx((~called)[~is_malignant].mean())
    assert values["auc"] == pytest.approx(roc_auc_score(is_malignant, score), abs=1e-12)
    ties = generator.integers(0, 5, 200)
    assert metrics.area_under_roc(ties, is_malignant) == pytest.approx(roc_auc_score(is_malignant, ties), abs=1e-12)
    assert np.isnan(metrics.area_under_roc(ties, np.ones(200, bool)))
