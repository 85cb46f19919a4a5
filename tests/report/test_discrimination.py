"""Discrimination of the ensemble: targets, operating points and net benefit."""

from dataclasses import replace

import numpy as np
import pytest

from tests.synthetic_run import CLINIC, folds_of, labels_of
from triderm_dist import metrics
from triderm_dist.ensemble.run_files import NestedRows
from triderm_dist.report import discrimination
from triderm_dist.report.discrimination import Discrimination, Target


def nested_rows(lesions: int = 400, skill: float = 2.0, seed: int = 0) -> NestedRows:
    """Return nested rows of the task CLINIC with three folds, better than chance, decided by argmax."""
    labels = labels_of(lesions, seed, classes=4)
    logits = np.random.default_rng(seed).normal(size=(lesions, 4)) + skill * np.eye(4)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return NestedRows(
        lesion_ids=np.array([f"lesion-{row}" for row in range(lesions)], object),
        labels=labels,
        folds=folds_of(labels),
        probabilities=probabilities,
        decisions=metrics.argmax_decisions(probabilities),
        stack=np.full((lesions, 4), np.nan),
    )


@pytest.fixture(scope="module")
def content() -> Discrimination:
    return Discrimination(CLINIC, nested_rows(), None)


def test_targets_are_the_diagnoses_and_the_kinds_that_the_task_states(content: Discrimination) -> None:
    malignancy = content.malignancy
    assert malignancy is not None
    assert [target.name for target in content.targets] == [discrimination.MALIGNANT, *CLINIC.diagnosis_names]
    labels, probabilities = content.rows.labels, content.rows.probabilities
    known = labels != 2  # the kind of the third diagnosis is not stated
    assert content.unknown_kind == (~known).sum() > 0
    np.testing.assert_array_equal(malignancy.positive, labels[known] == 0)
    share = probabilities[known, 0] / probabilities[known][:, [0, 1, 3]].sum(axis=1)
    np.testing.assert_allclose(malignancy.scores, share, rtol=1e-12)
    counts = metrics.class_counts(content.rows.decisions, labels)
    for index, target in enumerate(content.diagnoses):
        assert target.rates == content.rates[index]
        assert target.rates.specificity.value == pytest.approx(counts.specificity[index], abs=1e-12)
    assert [target.name for target in content.to_find] == [discrimination.MALIGNANT, CLINIC.diagnosis_names[0]]


def test_a_task_without_kinds_has_no_malignant_target() -> None:
    task = replace(CLINIC, diagnoses=tuple(replace(each, malignant=None) for each in CLINIC.diagnoses))
    content = Discrimination(task, nested_rows(), None)
    assert content.malignancy is None and content.unknown_kind == 0
    assert content.to_find == [] == content.operating_points == content.net_benefits


def test_macro_f1_is_given_by_each_rule(content: Discrimination) -> None:
    rows = content.rows
    assert list(content.macro_f1) == ["each diagnosis with p > 0.5"]  # argmax decides
    of_fitted = Discrimination(replace(CLINIC, decision="fitted"), rows, None)
    values = [interval.value for interval in of_fitted.macro_f1.values()]
    expected = [
        metrics.official_macro_f1(rows.probabilities, rows.labels),
        metrics.argmax_macro_f1(rows.probabilities, rows.labels),
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_an_operating_point_uses_no_label_of_the_fold_that_it_judges(content: Discrimination) -> None:
    target = content.diagnoses[0]
    point = discrimination.operating_point(target, 0.9)
    assert point is not None
    for fold in range(3):
        inside = target.folds == fold
        outside = target.positive & ~inside
        reached = (target.scores[outside] >= point.thresholds[fold]).mean()
        higher = np.nextafter(point.thresholds[fold], 1)
        assert reached >= 0.9 > (target.scores[outside] >= higher).mean()
        shuffled = target.positive.copy()
        shuffled[inside] = ~shuffled[inside]
        again = discrimination.operating_point(replace(target, positive=shuffled), 0.9)
        assert again is not None and again.thresholds[fold] == point.thresholds[fold]
        np.testing.assert_array_equal(again.decided[inside], point.decided[inside])
    assert point.rates.sensitivity.value == pytest.approx(point.decided[target.positive].mean(), abs=1e-12)
    assert point.rates.specificity.value == pytest.approx(1 - point.decided[~target.positive].mean(), abs=1e-12)
    assert point.missed == (target.positive & ~point.decided).sum()
    assert point.rates.sensitivity.value == pytest.approx(0.9, abs=0.08)
    own = point.predictive_values([target.prevalence])
    assert own[0][0].value == pytest.approx(point.rates.positive_predictive_value.value, abs=1e-12)


def test_a_target_in_one_fold_has_no_operating_point(content: Discrimination) -> None:
    target = content.diagnoses[0]
    assert discrimination.operating_point(replace(target, positive=target.folds == 0), 0.9) is None


def test_operating_points_of_many_lesions_reach_their_sensitivity() -> None:
    generator = np.random.default_rng(0)
    positive = generator.random(20_000) < 0.2
    scores = generator.normal(size=20_000) + positive
    target = Target("a", "", scores, positive, positive, np.arange(20_000) % 5, None, True)
    for aim in discrimination.SENSITIVITIES:
        point = discrimination.operating_point(target, aim)
        assert point is not None and point.rates.sensitivity.value == pytest.approx(aim, abs=0.01)


def test_net_benefit_of_a_treatment_of_all_gains_nothing(content: Discrimination) -> None:
    target = content.diagnoses[0]
    everyone = replace(target, scores=np.ones(len(target.scores)))
    risk = target.prevalence / 2
    benefit = discrimination.net_benefit(everyone, risk)
    assert benefit.of_ensemble.value == pytest.approx(benefit.of_all, abs=1e-12) and benefit.of_all > 0
    assert (benefit.gain.value, benefit.gain.low, benefit.gain.high) == (0, 0, 0)
    rare = discrimination.net_benefit(target, 0.5)  # treating all harms: the better choice is none
    assert rare.of_all < 0 and rare.gain == rare.of_ensemble


def test_net_benefit_curve_is_that_of_each_threshold(content: Discrimination) -> None:
    target, risks = content.diagnoses[0], np.array([0.001, 0.1, 0.37, 0.5, 0.99])
    expected = [metrics.net_benefit_of_lesions(target.scores, target.positive, risk).mean() for risk in risks]
    np.testing.assert_allclose(discrimination.net_benefit_curve(target.ranking, risks), expected, atol=1e-12)


def test_a_thinned_curve_keeps_its_ends_and_its_shape() -> None:
    x = np.linspace(0, 1, 50_000)
    thin_x, thin_y = discrimination.thinned(x, np.sqrt(x))
    assert 300 < len(thin_x) <= 402 and (thin_x[0], thin_x[-1]) == (0, 1)
    assert np.abs(np.interp(x, thin_x, thin_y) - np.sqrt(x)).max() < 0.005
    np.testing.assert_array_equal(discrimination.thinned(x[:300], x[:300]), [x[:300], x[:300]])
