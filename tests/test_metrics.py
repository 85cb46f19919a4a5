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
