"""Calibration of the ensemble and its networks, with and without temperature."""

from dataclasses import replace

import numpy as np
import pytest

from tests.report.test_discrimination import nested_rows
from tests.synthetic_run import CLINIC, MODELS, write_run
from triderm_dist import metrics
from triderm_dist.ensemble.artifact import Ensemble
from triderm_dist.ensemble.calibration import fit_temperature, member_probabilities, probabilities_of
from triderm_dist.predictions import OofTable, read_oof
from triderm_dist.report.calibration import MOST_PROBABLE, EnsembleCalibration
from triderm_dist.report.discrimination import MALIGNANT, Discrimination

NOTHING = np.empty(0)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> OofTable:
    """Predictions of two overconfident networks."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, 240, task=CLINIC)
    table = read_oof(folder / "oof.parquet")
    return replace(table, logits={name: 10 * logits for name, logits in table.logits.items()})


@pytest.fixture(scope="module")
def calibration(table: OofTable) -> EnsembleCalibration:
    names = tuple(MODELS)
    temperatures = np.array([fit_temperature(table.logits[name], table.labels, table.heads[name]) for name in names])
    ensemble = Ensemble(names, np.array([0.75, 0.25]), np.full(4, 0.5), temperatures=temperatures)
    members = [member_probabilities(table, name, t) for name, t in zip(names, temperatures, strict=True)]
    rows = replace(
        nested_rows(240),
        labels=table.labels,
        folds=table.folds,
        probabilities=ensemble.combine(members),
        decisions=ensemble.decide(members),
    )
    return EnsembleCalibration(Discrimination(CLINIC, rows, None), table, ensemble, names)


def test_temperature_calibrates_overconfident_networks(calibration: EnsembleCalibration) -> None:
    for network in calibration.by_network:
        assert network.temperature > 1.5
        for before, after in (network.nll, network.error, network.brier):
            assert after < before
        assert network.brier_change.value == pytest.approx(network.brier[1] - network.brier[0], abs=1e-12)


def test_figures_of_a_network_are_those_of_the_metrics(calibration: EnsembleCalibration) -> None:
    table, network = calibration.table, calibration.by_network[0]
    name, labels = network.name, table.labels
    after = np.empty(table.logits[name].shape)
    for fold in range(3):
        inside = table.folds == fold
        temperature = fit_temperature(table.logits[name][~inside], labels[~inside], table.heads[name])
        after[inside] = probabilities_of(table.logits[name][inside].astype(float) / temperature, table.heads[name])
    for place, probabilities in enumerate((member_probabilities(table, name), after)):
        expected = [
            function(probabilities, labels, NOTHING)
            for function in (metrics.negative_log_likelihood, metrics.calibration_error, metrics.brier_score)
        ]
        found = [network.nll[place], network.error[place], network.brier[place]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_targets_are_judged_with_and_without_temperature(calibration: EnsembleCalibration) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rows, table, targets = calibration.discrimination.rows, calibration.table, calibration.targets
    assert [each.name for each in targets] == [MOST_PROBABLE, MALIGNANT, *CLINIC.diagnosis_names]
    top = targets[0]
    assert top.after.reliability.error == pytest.approx(
        metrics.calibration_error(rows.probabilities, rows.labels, NOTHING), abs=1e-12
    )
    weights, names = calibration.ensemble.weights, calibration.networks
    before = sum(w * member_probabilities(table, name) for w, name in zip(weights, names, strict=True))
    assert top.before.reliability.error == pytest.approx(
        metrics.calibration_error(before, rows.labels, NOTHING), abs=1e-12
    )
    for index, target in enumerate(targets[2:]):
        truth = table.labels == index
        assert target.positives == truth.sum()
        for part, probabilities in ((target.before, before), (target.after, rows.probabilities)):
            expected = sklearn.brier_score_loss(truth, probabilities[:, index])
            assert part.brier.value == pytest.approx(expected, abs=1e-12)
        change = target.after.brier.value - target.before.brier.value
        assert target.brier_change.value == pytest.approx(change, abs=1e-12)


def test_a_temperature_is_fitted_on_some_of_many_lesions(
    calibration: EnsembleCalibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triderm_dist.report.calibration.FIT_LESIONS", 60)
    again = EnsembleCalibration(
        calibration.discrimination, calibration.table, calibration.ensemble, calibration.networks
    )
    for few, every in zip(again.by_network, calibration.by_network, strict=True):
        assert few.nll[1] != every.nll[1] and few.nll[1] == pytest.approx(every.nll[1], abs=0.05)
