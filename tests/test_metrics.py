from itertools import pairwise

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


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_the_report_equal_those_of_scikit_learn(ties: bool) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(4), [200, 40, 9, 60]))
    probabilities = 0.5 * np.eye(4)[labels] + generator.random((len(labels), 4))
    if ties:
        probabilities = probabilities.round(1) + 0.05
    decisions, p, truth = (
        probabilities > 0.6,
        probabilities / probabilities.sum(axis=1, keepdims=True),
        np.eye(4)[labels],
    )
    found = {name: metric.function(probabilities, labels, decisions) for name, metric in metrics.METRICS.items()}
    areas = [sklearn.roc_auc_score(truth[:, c], probabilities[:, c]) for c in range(4)]
    precisions = [sklearn.average_precision_score(truth[:, c], probabilities[:, c]) for c in range(4)]
    np.testing.assert_allclose(metrics.areas_under_roc(probabilities, labels), areas, rtol=0, atol=1e-12)
    np.testing.assert_allclose(metrics.average_precisions(probabilities, labels), precisions, rtol=0, atol=1e-12)
    largest, correct = p.max(axis=1), p.argmax(axis=1) == labels
    accuracy, confidence = calibration_curve(correct, largest, n_bins=metrics.CALIBRATION_BINS)
    counts = np.histogram(largest, np.linspace(0, 1, metrics.CALIBRATION_BINS + 1))[0]
    assert found == pytest.approx(
        {
            "mean_recall": sklearn.recall_score(truth, decisions, average="macro"),
            "accuracy": sklearn.accuracy_score(labels, p.argmax(axis=1)),
            "balanced_accuracy": sklearn.balanced_accuracy_score(labels, p.argmax(axis=1)),
            "auc": np.mean(areas),
            "average_precision": np.mean(precisions),
            "nll": sklearn.log_loss(labels, p),
            "brier": 4 * sklearn.mean_squared_error(truth, p),
            "calibration_error": np.abs(accuracy - confidence) @ counts[counts > 0] / len(labels),
        },
        abs=1e-12,
    )
    assert metrics.macro_f1(decisions, labels) == pytest.approx(
        sklearn.f1_score(truth, decisions, average="macro"), abs=1e-12
    )


def test_metrics_leave_out_a_diagnosis_without_a_lesion() -> None:
    generator = np.random.default_rng(0)
    labels, probabilities = np.repeat([0, 2], 20), generator.random((40, 3))
    areas = metrics.areas_under_roc(probabilities, labels)
    assert np.isnan(areas[1]) and np.isnan(metrics.average_precisions(probabilities, labels)[1])
    for metric in metrics.METRICS.values():
        assert np.isfinite(metric.function(probabilities, labels, probabilities > 0.5))
    assert metrics.negative_log_likelihood(np.eye(3)[[0, 1]], np.array([0, 0]), np.eye(3)[[0, 1]] > 0) < 20


def test_area_under_roc_counts_half_of_ties() -> None:
    roc_auc_score = pytest.importorskip("sklearn.metrics").roc_auc_score
    generator = np.random.default_rng(0)
    is_malignant = generator.random(200) < 0.4
    ties = generator.integers(0, 5, 200)
    assert metrics.area_under_roc(ties, is_malignant) == pytest.approx(roc_auc_score(is_malignant, ties), abs=1e-12)
    assert np.isnan(metrics.area_under_roc(ties, np.ones(200, bool)))


def scored(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (N,) in [0, 1], of every second seed with many ties, and positives (N,) bool of both kinds."""
    generator = np.random.default_rng(seed)
    lesions = int(generator.integers(20, 200))
    positive = generator.random(lesions) < generator.uniform(0.05, 0.9)
    positive[:2] = True, False
    scores = np.clip(generator.normal(0.4 + 0.2 * positive, 0.2), 0, 1)
    return np.round(scores, 1) if seed % 2 else scores, positive


@pytest.mark.parametrize("seed", range(20))
def test_ranking_equals_scikit_learn(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, positive = scored(seed)
    ranking = metrics.Ranking.of(scores, positive)
    close = {"rtol": 0, "atol": 1e-12}
    false_positives, true_positives, thresholds = sklearn.roc_curve(positive, scores, drop_intermediate=False)
    np.testing.assert_allclose(ranking.roc_curve, [false_positives, true_positives], **close)
    np.testing.assert_array_equal(ranking.thresholds, thresholds[1:])
    precision, recall, _ = sklearn.precision_recall_curve(positive, scores)
    ours = [curve[::-1] for curve in ranking.precision_recall_curve]
    np.testing.assert_allclose(ours, [recall[:-1], precision[:-1]], **close)
    assert ranking.area_under_roc == pytest.approx(sklearn.roc_auc_score(positive, scores), abs=1e-12)
    assert ranking.average_precision == pytest.approx(sklearn.average_precision_score(positive, scores), abs=1e-12)
    assert ranking.area_under_roc == pytest.approx(metrics.area_under_roc(scores, positive), abs=1e-12)
    for value in (ranking.placements[positive].mean(), ranking.placements[~positive].mean()):
        assert value == pytest.approx(ranking.area_under_roc, abs=1e-12)
    for target in (0.5, 0.9, 0.95, 1.0):
        first = np.flatnonzero(true_positives >= target - 1e-9)[0]
        assert metrics.threshold_for(scores[positive], target) == thresholds[first]


def test_ranking_without_both_kinds_has_no_area() -> None:
    scores = np.array([0.1, 0.2])
    assert np.isnan(metrics.Ranking.of(scores, np.array([True, True])).area_under_roc)
    none = metrics.Ranking.of(scores, np.array([False, False]))
    assert np.isnan(none.area_under_roc) and np.isnan(none.average_precision)


@pytest.mark.parametrize("seed", range(10))
def test_rates_of_a_diagnosis_equal_scikit_learn(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.concatenate([np.arange(4), generator.integers(0, 4, 80)]))
    decisions = generator.random((len(labels), 4)) < 0.3
    counts = metrics.class_counts(decisions, labels)
    for label in range(4):
        truth, decided = labels == label, decisions[:, label]
        expected = {
            "recall": sklearn.recall_score(truth, decided),
            "precision": sklearn.precision_score(truth, decided),
            "specificity": sklearn.recall_score(truth, decided, pos_label=False),
            "negative_predictive_value": sklearn.precision_score(truth, decided, pos_label=False),
            "f1": sklearn.f1_score(truth, decided),
        }
        for name, value in expected.items():
            assert getattr(counts, name)[label] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("seed", range(20))
def test_net_benefit_equals_the_formula_of_vickers_and_elkin(seed: int) -> None:
    scores, positive = scored(seed)
    for threshold in (0.01, 0.1, 0.3, 0.5, 0.9):
        treated = [score >= threshold for score in scores.tolist()]
        true_positives = sum(t and p for t, p in zip(treated, positive.tolist(), strict=True))
        false_positives = sum(t and not p for t, p in zip(treated, positive.tolist(), strict=True))
        lesions, odds = len(scores), threshold / (1 - threshold)
        expected = true_positives / lesions - false_positives / lesions * odds
        assert metrics.net_benefit_of_lesions(scores, positive, threshold).mean() == pytest.approx(expected, abs=1e-12)
        everyone = metrics.net_benefit_of_lesions(np.ones(lesions), positive, threshold).mean()
        assert metrics.net_benefit_of_all(positive.mean(), threshold) == pytest.approx(everyone, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_predictive_values_equal_precision_at_the_own_prevalence(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, positive = scored(seed)
    decided = scores > 0.5
    decided[:2] = True, False
    sensitivity, specificity = (sklearn.recall_score(positive, decided, pos_label=kind) for kind in (True, False))
    values = metrics.predictive_values(sensitivity, specificity, np.array([positive.mean()]))
    expected = [sklearn.precision_score(positive, decided, pos_label=kind) for kind in (True, False)]
    np.testing.assert_allclose(np.ravel(values), expected, rtol=0, atol=1e-12)
    doubled = np.concatenate([np.flatnonzero(positive), np.arange(len(scores))])  # each positive twice
    other = metrics.predictive_values(sensitivity, specificity, np.array([positive[doubled].mean()]))
    assert other[0][0] == pytest.approx(sklearn.precision_score(positive[doubled], decided[doubled]), abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_reliability_equals_scikit_learn_and_the_published_error(seed: int) -> None:
    calibration = pytest.importorskip("sklearn.calibration")
    scores, positive = scored(seed)
    bins = metrics.Reliability.of(scores, positive, 10)
    used = bins.lesions > 0
    share, probability = calibration.calibration_curve(positive, scores, n_bins=10)
    np.testing.assert_allclose([bins.positive[used], bins.probability[used]], [share, probability], atol=1e-12)
    edges = np.linspace(0, 1, 11)
    error = 0.0
    for low, high in pairwise(edges):  # Naeini et al. 2015: bins (low, high]
        inside = (scores > low) & (scores <= high) | ((low == 0) & (scores == 0))
        if inside.any():
            error += inside.mean() * abs(scores[inside].mean() - positive[inside].mean())
    assert bins.error == pytest.approx(error, abs=1e-12)
    assert metrics.brier_score(np.stack([1 - scores, scores], 1), positive.astype(int), np.empty(0)) == pytest.approx(
        2 * pytest.importorskip("sklearn.metrics").brier_score_loss(positive, scores), abs=1e-12
    )


def test_error_by_chance_is_the_mean_error_of_true_probabilities() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.beta(1, 3, 3000)
    errors = [metrics.Reliability.of(probabilities, generator.random(3000) < probabilities).error for _ in range(200)]
    chance = metrics.Reliability.of(probabilities, generator.random(3000) < probabilities).error_by_chance
    assert chance == pytest.approx(np.mean(errors), rel=0.05)
