"""One trial: its reports, and how it resumes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from triderm_dist.config import Experiment, load
from triderm_dist.schema import ConfigError, DataError
from triderm_dist.search.space import (
    with_settings,
)
from triderm_dist.search.trial import Trial, _Curve, _own_experiment, read_trial, read_trials, run_trial
from triderm_dist.search.tuner import progress_callback


def test_curve_is_the_mean_over_folds_of_the_best_epoch():
    best, last = _Curve("best"), _Curve("last")
    for curve in (best, last):
        for epoch, score in enumerate([0.2, 0.6, 0.4], 1):
            assert curve.add(epoch, {"macro_f1": score, "official": score / 2})
            assert not curve.add(epoch, {"macro_f1": 9.0, "official": 9.0})  # reported again after a resume
        curve.end_fold()
        curve.add(1, {"macro_f1": 0.1, "official": 0.0})
        assert curve.epochs == 4
    assert best.mean("macro_f1") == pytest.approx((0.6 + 0.1) / 2)
    assert last.mean("official") == pytest.approx((0.2 + 0.0) / 2)


def test_invalid_trial_record_gives_one_line(tmp_path):
    (tmp_path / "trial-001").mkdir()
    (tmp_path / "trial-001" / "trial.json").write_text('{"nummer": 1}')
    with pytest.raises(DataError, match=r"trial.json: not the record of a trial"):
        read_trials(tmp_path)


def test_trial_whose_process_never_started_is_recorded_with_its_own_settings(tmp_path, capsys):
    """Not with what Ray drew, which for a training with another seed is the name of its folder."""
    of_ray = SimpleNamespace(config={"repeat": "trial-002-seed-1"})
    (tmp_path / "trial-002-seed-1").mkdir()
    callback = progress_callback(
        tmp_path, lambda trial: trial.config["repeat"], lambda number, drawn: {"train.optim.lr": number / 10}, 2, 3
    )
    callback.on_trial_error(0, [], of_ray)
    error = "its process died; out of memory?"
    assert read_trials(tmp_path, repeats=True) == [Trial(2, {"train.optim.lr": 0.2}, 1, "failed", error=error)]
    assert f"trial 2 seed 1  epoch 0/3  failed  {error}" in capsys.readouterr().out


def test_trial_has_the_sets_and_tokens_of_the_experiment(tmp_path):
    experiment = load(Experiment, None, [f"output={tmp_path / 'run'}"])
    own = _own_experiment(Trial(2, {}), experiment, "trimodal", tmp_path / "run" / "search" / "trial-002")
    for name in ("train_shards", "test_shards", "token_folder"):
        assert getattr(own, name) == getattr(experiment, name)


def test_trial_reports_every_epoch_and_resumes_after_a_kill(tiny, tmp_path):
    experiment = load(Experiment, tiny)

    class Killed(BaseException):
        pass

    def run(folder: Path, kill_at: int | None) -> list[dict]:
        reported: list[dict] = []

        def report(scores: dict) -> None:
            reported.append(scores)
            if scores["epoch"] == kill_at:
                raise Killed

        trial = Trial(2, {"train.loss.gamma": 1.5, "train.optim.lr": 0.004})
        run_trial(trial, experiment, "small", (0, 1), folder, report)
        return reported

    complete = run(tmp_path / "complete", None)
    assert [scores["epoch"] for scores in complete] == [1, 2, 3, 4, 5, 6]
    for kill_at in (2, 4):
        with pytest.raises(Killed):
            run(tmp_path / "killed", kill_at)
    weights = tmp_path / "killed" / "small" / "fold-0" / "weights.safetensors"
    written = weights.stat().st_mtime_ns
    assert run(tmp_path / "killed", None) == complete  # replayed, then continued
    assert weights.stat().st_mtime_ns == written  # the finished fold was not trained again
    assert run(tmp_path / "killed", None) == complete
    record = read_trial(tmp_path / "killed")
    assert (record.state, record.epochs, record.macro_f1) == ("complete", 6, complete[-1]["macro_f1"])
    metrics = [json.loads(line) for line in (weights.parent / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "validation" for line in metrics) == 3


def test_trial_that_was_stopped_stays_so(tiny, tmp_path):
    """Its process may report another epoch before Ray ends it."""

    def stop(scores: dict) -> None:
        replace(read_trial(tmp_path), state="stopped").write(tmp_path)

    experiment = with_settings(load(Experiment, tiny), "small", {"train.epochs": 2})
    run_trial(Trial(2, {}), experiment, "small", (0,), tmp_path, stop)
    assert (read_trial(tmp_path).state, read_trial(tmp_path).epochs) == ("stopped", 1)


def test_trial_with_changed_settings_restarts_and_failure_is_recorded(tiny, tmp_path):
    experiment, folder = load(Experiment, tiny), tmp_path / "trial-001"
    experiment = with_settings(experiment, "small", {"train.epochs": 1})
    run_trial(Trial(1, {"train.loss.gamma": 1.0}), experiment, "small", (0,), folder, lambda scores: None)
    (folder / "left").touch()
    with pytest.raises(ConfigError):
        run_trial(Trial(1, {"train.global_batch": 10}), experiment, "small", (0,), folder, lambda scores: None)
    record = read_trial(folder)
    assert record.state == "failed" and "global_batch 10 is not a multiple" in record.error
    assert not (folder / "left").exists()


def test_trial_resumes_from_a_better_one_with_its_own_settings(tiny, tmp_path):
    experiment = load(Experiment, tiny)

    class Paused(BaseException):
        pass

    def run(number: int, settings: dict, source: Path | None, pause_at: int | None) -> list[dict]:
        reported: list[dict] = []

        def report(scores: dict) -> None:
            reported.append(scores)
            if scores["epoch"] == pause_at:
                raise Paused

        run_trial(Trial(number, settings), experiment, "small", (0,), tmp_path / f"{number}", report, source)
        return reported

    with pytest.raises(Paused):
        run(2, {"train.optim.lr": 0.004}, None, pause_at=2)
    shutil.copytree(tmp_path / "2", tmp_path / "copy")
    expected = run(2, {"train.optim.lr": 0.004}, None, None)
    with pytest.raises(Paused):
        run(3, {"train.optim.lr": 0.002}, None, pause_at=1)  # replaced by the copied checkpoint

    frozen = {"train.optim.lr": 1e-12, "train.optim.min_lr": 0.0, "train.optim.weight_decay": 0.0}
    for _ in range(2):  # a restart does not copy again
        assert run(3, frozen, tmp_path / "copy", None)[:2] == expected[:2]
    record = read_trial(tmp_path / "3")
    assert (record.number, record.state, record.settings) == (3, "complete", frozen)
    assert record.changes == [{"epoch": 2, "trial": 2, "settings": {"train.optim.lr": 0.004}}]
    weights = {name: load_file(next(tmp_path.glob(f"{name}/small/fold-0/**/weights.safetensors"))) for name in "23"}
    copied = load_file(next((tmp_path / "copy").glob("small/fold-0/checkpoints/*/weights.safetensors")))
    assert all(
        np.allclose(weights["3"][key], copied[key], rtol=0, atol=1e-9) for key in copied if "num_batches" not in key
    )
    assert any(not np.allclose(weights["2"][key], copied[key], rtol=0, atol=1e-9) for key in copied)
