"""The nested estimate equals one in plain loops, in which nothing is shared between folds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.ensemble.conftest import experiment
from tests.synthetic_run import write_run
from triderm_dist import intervals, metrics
from triderm_dist.config import EnsembleConfig
from triderm_dist.ensemble.calibration import class_prior, fit_temperature, member_probabilities
from triderm_dist.ensemble.fit import fit_ensemble
from triderm_dist.ensemble.run_files import read_nested
from triderm_dist.ensemble.score_table import nested_tau_macro_f1
from triderm_dist.ensemble.thresholds import (
    Resamples,
    Thresholding,
    adjusted_thresholds,
    choose_thresholding,
    decide,
    regularized_thresholds,
    thresholdings,
)
from triderm_dist.ensemble.weights import fit_weights
from triderm_dist.predictions import OofTable, read_oof


def nested_in_plain_loops(
    table: OofTable, config: EnsembleConfig, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the decisions (N, C) of each weighting, of the ensemble and of `auto`, and the probabilities of these two.

    Everything about a fold is computed from `labels`, in which its labels are missing.
    """
    decisions: dict[str, np.ndarray] = {}
    probabilities: dict[str, np.ndarray] = {}
    choices = thresholdings(table.task.decision, config)
    for fold in range(3):
        inside, outside = np.flatnonzero(table.folds == fold), np.flatnonzero(table.folds != fold)
        labels, parts = table.labels[outside], table.folds[outside]
        calibrated = {}
        for model in table.models:
            temperature = fit_temperature(table.logits[model][outside], labels, table.heads[model])
            logits = table.logits[model].astype(float) / temperature
            if table.heads[model] == "softmax":
                calibrated[model] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            else:
                calibrated[model] = 1 / (1 + np.exp(-logits))
        members = list(calibrated.values())
        weightings = {
            "trimodal": lambda rows: [1.0, 0.0],
            "dual_cnn": lambda rows: [0.0, 1.0],
            "mean": lambda rows: [0.5, 0.5],
            "fitted": lambda rows, members=members, labels=labels, outside=outside: (
                fit_weights([member[outside[rows]] for member in members], labels[rows], rounds=config.rounds).weights
            ),
        }

        def fitted_decisions(combined, rule, shrinkage, tau, train, judged, labels=labels, outside=outside):
            of_train = combined[outside[train]]
            if tau is None:
                thresholds = regularized_thresholds(of_train, labels[train], shrinkage, Resamples(seed))
            else:
                thresholds = adjusted_thresholds(labels[train], combined.shape[1], tau)
            return decide(combined[judged], thresholds, rule)

        inner: dict[str, np.ndarray] = {}
        own: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, weights_on in weightings.items():
            best, everything = -1.0, np.ones(len(outside), bool)
            for rule, shrinkage, tau in choices:
                held_out = np.zeros((len(outside), len(table.diagnoses)), bool)
                for part in np.unique(parts):
                    first, second = weights_on(parts != part)
                    combined = first * members[0] + second * members[1]
                    judged = outside[parts == part]
                    held_out[parts == part] = fitted_decisions(combined, rule, shrinkage, tau, parts != part, judged)
                if (score := metrics.macro_f1(held_out, labels)) > best:
                    best, inner[name] = score, held_out
                    first, second = weights_on(everything)
                    combined = first * members[0] + second * members[1]
                    own[name] = (
                        fitted_decisions(combined, rule, shrinkage, tau, everything, inside),
                        combined[inside],
                    )
        scores = {name: metrics.macro_f1(each, labels) for name, each in inner.items()}
        network = max(table.models, key=lambda name: scores[name])
        ensemble = "fitted" if scores["fitted"] > max(scores[name] for name in ("mean", *table.models)) else "mean"
        gap = intervals.macro_f1_difference(
            inner[ensemble], inner[network], labels, table.groups[outside], config.bootstrap, seed
        )
        for name, pick in {
            "ensemble": ensemble,
            "auto": ensemble if gap.low > 0 else network,
            "network": network,
        }.items():
            own[name] = own[pick]
            shape = len(table), len(table.diagnoses)
            probabilities.setdefault(name, np.full(shape, np.nan))[inside] = own[pick][1]
        for name, (decided, _) in own.items():
            decisions.setdefault(name, np.zeros((len(table), len(table.diagnoses)), bool))[inside] = decided
    return decisions, probabilities


def tau_in_plain_loops(table: OofTable, model: str) -> float:
    """Return argmax macro F1 of a softmax head after logit adjustment, fitted on the other folds."""
    decided = np.zeros(len(table), int)
    for fold in range(3):
        inside, outside = table.folds == fold, table.folds != fold
        adjust, best = np.log(class_prior(table.labels[outside], len(table.diagnoses))), -1.0
        for tau in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5):
            adjusted = table.logits[model].astype(float) - tau * adjust
            if (score := metrics.argmax_macro_f1(adjusted[outside], table.labels[outside])) > best:
                best, decided[inside] = score, adjusted[inside].argmax(axis=1)
    return metrics.macro_f1(np.eye(len(table.diagnoses))[decided] > 0, table.labels)


@pytest.mark.parametrize("use", ["ensemble", "auto"])
def test_nested_estimate_equals_one_in_plain_loops(tmp_path: Path, use: str) -> None:
    write_run(tmp_path, 120)
    config = experiment(tmp_path, use=use, enabled=False)
    fit = fit_ensemble(tmp_path, config)
    table, written = read_oof(tmp_path / "oof.parquet"), read_nested(tmp_path / "ensemble_oof.parquet")
    decisions, probabilities = nested_in_plain_loops(table, config.ensemble, config.seed)
    rows = {row.name: row for row in fit.rows}
    names = {"trimodal": "trimodal", "dual_cnn": "dual_cnn", "mean": "plain mean", "fitted": "fitted weights"}
    for weighting, name in names.items():
        assert rows[name].nested.value == pytest.approx(metrics.macro_f1(decisions[weighting], table.labels), abs=1e-12)
    given = use if use == "ensemble" else "network" if fit.chosen in table.models else "ensemble"
    np.testing.assert_array_equal(written.decisions, decisions[given])
    np.testing.assert_allclose(written.probabilities, probabilities[given], atol=1e-6)
    assert rows["ensemble"].argmax == metrics.argmax_macro_f1(probabilities[given], table.labels)
    if use == "auto":
        counted = f"it scores {metrics.macro_f1(decisions['auto'], table.labels):.3f}"
        assert any(counted in note for note in fit.notes)


def test_logit_adjustment_takes_prior_and_tau_from_the_other_folds(table: OofTable) -> None:
    """The diagnoses differ between the folds, and so do the priors of what is left out."""
    generator = np.random.default_rng(0)
    folds = np.where(generator.random(len(table)) < 0.8, table.labels % 3, generator.integers(0, 3, len(table)))
    biased = table.logits["trimodal"] + np.log(class_prior(table.labels, len(table.diagnoses)))
    for _ in range(5):
        noisy = {"trimodal": biased + 2 * generator.normal(size=biased.shape)}
        other = replace(table, folds=folds, logits=noisy)
        assert nested_tau_macro_f1(other, "trimodal") == pytest.approx(tau_in_plain_loops(other, "trimodal"), abs=1e-12)
    probabilities = member_probabilities(table, "trimodal")
    for tau in (0.5, 1.5):
        choice = Thresholding("nearest", None, tau)
        _, decisions = choose_thresholding(
            probabilities[None], lambda rows: np.ones(1), table.labels, folds, [choice], Resamples()
        )
        for fold in range(3):
            prior = class_prior(table.labels[folds != fold], len(table.diagnoses))
            adjusted = np.log(probabilities[folds == fold]) - tau * np.log(prior)
            adjusted[:, ~np.isin(np.arange(len(prior)), table.labels[folds != fold])] = -np.inf  # never predicted
            np.testing.assert_array_equal(decisions[folds == fold], metrics.argmax_decisions(adjusted))
