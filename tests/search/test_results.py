"""Results of a search: repeats over seeds, and importance of settings."""

import random

import pytest
from scipy import stats

from triderm_dist.search.results import _read_repeats, baseline_and_best, importance
from triderm_dist.search.settings import BASELINE
from triderm_dist.search.space import (
    Domain,
)
from triderm_dist.search.trial import Trial, read_trials


def test_seed_noise_equals_a_paired_t_test(tmp_path):
    best, baseline = Trial(4, {"a": 2}), Trial(BASELINE, {"a": 1})
    scores = {1: (0.40, 0.45), 2: (0.42, 0.44), 3: (0.41, 0.47), 4: (0.40, None)}
    for seed, pair in scores.items():
        for trial, score in zip((baseline, best), pair, strict=True):
            if score is not None:
                done = Trial(trial.number, trial.settings, seed, "complete", 3, score)
                done.write(tmp_path / f"trial-{trial.number:03d}-seed-{seed}")
    found = _read_repeats(tmp_path, baseline, best)
    expected = stats.ttest_rel([0.45, 0.44, 0.47], [0.40, 0.42, 0.41]).confidence_interval(0.95)
    assert found.seeds == [1, 2, 3]
    assert (found.gain.low, found.gain.high) == pytest.approx((expected.low, expected.high))
    assert _read_repeats(tmp_path, baseline, Trial(4, {"a": 3})) is None  # different settings, of an earlier best trial
    assert read_trials(tmp_path) == []


def test_best_trial_is_a_complete_one_and_ties_go_to_the_baseline():
    """Scores of stopped trials are of other epochs."""
    stopped = Trial(2, {"a": 2}, state="stopped", macro_f1=0.9)
    baseline, equal = (Trial(number, {"a": number}, state="complete", macro_f1=0.5) for number in (BASELINE, 3))
    assert baseline_and_best([baseline, stopped, equal]) == (baseline, baseline)
    assert baseline_and_best([stopped, equal]) == (None, equal)
    assert baseline_and_best([stopped]) == (None, None)


def test_importance_ranks_settings_and_needs_enough_trials():
    space = {name: Domain("uniform", (0.0, 1.0)) for name in "abc"}
    generator = random.Random(0)
    drawn = [{name: generator.random() for name in space} for _ in range(12)]
    trials = [Trial(n, settings, macro_f1=0.3 + 0.2 * settings["b"]) for n, settings in enumerate(drawn, 1)]
    found = importance(trials, space)
    assert next(iter(found)) == "b" and found["b"].low > max(found["a"].high, found["c"].high)
    assert importance(trials[:5], space) == {}
    assert importance([Trial(trial.number, trial.settings, macro_f1=0.3) for trial in trials], space) == {}
