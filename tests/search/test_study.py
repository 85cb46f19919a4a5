"""triderm search and triderm results on a tiny packed set."""

import csv
import json
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.fork_server import forks
from tests.processes import finish, start, wait_for
from tests.search.conftest import space_file
from triderm_dist.config import Experiment, load, save
from triderm_dist.schema import Busy, ConfigError
from triderm_dist.search.results import summarize, verdict
from triderm_dist.search.settings import BASELINE, SearchRun, read_search
from triderm_dist.search.space import (
    with_settings,
)
from triderm_dist.search.study import search
from triderm_dist.search.trial import Trial, read_trials, run_trial


def program(name: str, *words: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    return start(name, *words, environment=environment, errors=subprocess.STDOUT)


def output_of(process: subprocess.Popen, status: int = 0) -> str:
    done = finish(process)
    assert done.returncode == status, done.stdout
    return done.stdout


def test_bad_input_ends_with_status_2_before_ray_starts(tiny, tmp_path):
    for words, message in [
        (["space=none.yaml"], "none.yaml: no such file"),
        (["model=large"], "the settings have the models small"),
        (["folds=[0,2]"], "search.folds"),
        (["resume=true"], "holds no search to resume"),
        ([f"data.shards={tmp_path / 'nowhere'}"], "no such folder"),
    ]:
        text = output_of(program("tune.search", "--config", str(tiny), *words), status=2)
        assert re.fullmatch(rf"(note: .*\n)*error: .*{message}.*\n", text), text
    for words, message in [
        (["workers=2"], "16 is not a multiple of 2 ranks x micro_batch 16"),
        (["scheduler=pbt", "folds=[0,1]"], "pbt changes settings within the training of one fold"),
        (["scheduler=pbt", "workers=2"], "pbt trains a trial in one process"),
        (["scheduler=pbt", "concurrent=1"], "pbt alternates between all trials"),
        (["grace_epochs=4"], "search.grace_epochs=4: a trial has 3 epochs; set it to fewer"),
        (["scheduler=pbt", "exploit_epochs=3"], "search.exploit_epochs=3: a trial has 3 epochs, so none would copy"),
        (["scheduler=pbt"], "train.sampling.power cannot change during a training"),
    ]:
        with pytest.raises(ConfigError, match=message):
            search(load(SearchRun, tiny, words), log=lambda text: None)
    for domain, batch in (("choice: [8, 12]", 12), ("randint: [1, 4]", 3)):
        words = [f"space={space_file(tmp_path, f'train.micro_batch: {{{domain}}}')}"]
        with pytest.raises(ConfigError, match=f"16 is not a multiple of 1 ranks x micro_batch {batch}"):
            search(load(SearchRun, tiny, words), log=lambda text: None)
    assert not (tmp_path / "run" / "search" / "trial-001").exists()


def test_search_of_two_trials_writes_a_best_file_that_trains(tiny, tmp_path):
    space = space_file(
        tmp_path, "train.optim.lr: {loguniform: [3e-3, 3e-2]}\ntrain.optim.layer_decay: {uniform: [0.5, 1]}"
    )
    run = tmp_path / "run"
    words = ["--config", str(tiny), f"space={space}", "trials=2", "train.epochs=2", "concurrent=2", "seeds=2"]
    text = output_of(program("tune.search", *words))
    assert "layer_decay is left out: with tower.frozen" in text
    assert "2 trials of small over" in text
    assert "train.optim.lr is widened to the experiment's own value 0.001" in text
    trials = read_trials(run / "search")
    assert [trial.number for trial in trials] == [1, 2] and trials[0].state == "complete"
    assert trials[0].settings == {"train.optim.lr": 0.001}
    assert len(list(run.glob("tokens/*"))) == 1 and not list(run.glob("search/*/tokens"))

    with (run / "search" / "trials.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == "0"]  # repeats of the best trial have other seeds
    assert [row["trial"] for row in rows] == ["1", "2"] and float(rows[0]["gain"]) == 0
    complete = [trial for trial in trials if trial.state == "complete"]
    best = max(complete, key=lambda trial: trial.macro_f1)
    searched = read_search(run)
    assert load(Experiment, run / "best.yaml") == with_settings(searched.experiment, "small", best.settings)

    output_of(program("launch.train", "--config", str(run / "best.yaml")))
    metrics = [json.loads(line) for line in (run / "small" / "fold-0" / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in metrics if line["kind"] == "validation"][-1]
    assert final["macro_f1"] == best.macro_f1  # launch.train reproduces the trial

    text = output_of(program("tune.results", f"output={run}"))
    drawn = run / "search" / "report"
    assert all((drawn / f"{name}.png").stat().st_size > 10_000 for name in ("curves", "settings", "parallel"))
    assert (run / "search" / "report.html").read_text().count("<figure ") == 3
    repeats = read_trials(run / "search", repeats=True)
    if best.number != BASELINE:
        assert [(trial.number, trial.seed) for trial in repeats] == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert len({trial.macro_f1 for trial in repeats if trial.number == 1} - {trials[0].macro_f1}) > 0
        assert re.search(r"With 2 other seeds .* 95% interval over seeds", " ".join(text.split()))
    assert "resume=true" in output_of(program("tune.search", *words), status=2)


TRAIN_WORKER = "ray::RayTrainWorker"


@pytest.mark.slow
def test_trials_on_two_workers_equal_one_worker_also_after_a_kill(tiny, tmp_path):
    space, run = space_file(tmp_path, "train.optim.lr: {loguniform: [3e-3, 3e-2]}"), tmp_path / "run"
    settings = ["train.micro_batch=8", "train.epochs=8"]
    words = ["--config", str(tiny), f"space={space}", "trials=2", "scheduler=none", "seeds=0", *settings]
    # Two trials at once on any machine.
    process = program("tune.search", *words, "workers=2", environment={"RAY_OVERRIDE_RESOURCES": '{"CPU": 4}'})
    wait_for(lambda: any(trial.epochs for trial in read_trials(run / "search")), process)
    wait_for(lambda: len(forks(TRAIN_WORKER)) == 4, process)
    workers = forks(TRAIN_WORKER)
    os.kill(workers[0], signal.SIGKILL)
    # The other worker of the same trial ends as well.
    wait_for(lambda: len(set(workers) & set(forks(TRAIN_WORKER))) <= 2, process)
    assert "restarts from its last checkpoint" in output_of(process)

    experiment = load(Experiment, tiny, settings)
    trials = read_trials(run / "search")
    assert len(trials) == 2
    for trial in trials:
        single, reported = tmp_path / f"single-{trial.number}", []
        run_trial(Trial(trial.number, trial.settings), experiment, "small", (0,), single, reported.append)
        assert trial.state == "complete" and trial.curve == pytest.approx(
            [scores["macro_f1"] for scores in reported], abs=1e-6
        )
        folder = Path("small/fold-0")
        runs = (single, run / "search" / f"trial-{trial.number:03d}")
        first, second = (load_file(each / folder / "weights.safetensors") for each in runs)
        for key in first:
            np.testing.assert_allclose(first[key], second[key], rtol=1e-3, atol=2e-5, err_msg=key)


@pytest.mark.slow
def test_pbt_copies_the_best_trial(tiny, tmp_path):
    # The last two of five trials copy the best; at least one of them is not the baseline, which copies none.
    space = space_file(tmp_path, "train.optim.lr: {loguniform: [1e-6, 1e-5]}\ntrain.loss.gamma: {uniform: [0, 1]}")
    run = tmp_path / "run"
    text = output_of(program(
        "tune.search", "--config", str(tiny), f"space={space}", "trials=5", "scheduler=pbt", "exploit_epochs=2",
        "seeds=0", "train.epochs=4", "train.optim.lr=0.01", "train.optim.min_lr=1e-7",
        environment={"RAY_OVERRIDE_RESOURCES": '{"CPU": 5}'},
    ))  # fmt: skip
    trials = read_trials(run / "search")
    assert [(trial.state, len(trial.curve)) for trial in trials] == [("complete", 4)] * 5, text
    assert not trials[0].changes
    copied = [trial for trial in trials if trial.changes]
    assert copied and "copies trial" in text
    for trial in copied:
        change = trial.changes[-1]
        source = trials[change["trial"] - 1]
        assert change["epoch"] == 2 and trial.curve[:2] == source.curve[:2] and trial.settings != change["settings"]
        assert trial.settings["train.loss.gamma"] <= 2 and trial.settings["train.optim.lr"] <= 0.01
    assert not list(run.glob("search/ray/trial-*/checkpoint_*"))


def test_search_locks_its_folder_fails_fast_and_stops_on_sigterm(tiny, tmp_path):
    wrong = ", ".join(f"timm:nonsense-{number}" for number in range(30))
    space, run = space_file(tmp_path, f"tower.source: {{choice: [{wrong}]}}"), tmp_path / "run"
    words = [f"space={space}", "trials=2", "scheduler=none", "train.epochs=2000"]
    process = program(
        "tune.search", "--config", str(tiny), *words, environment={"RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
    )

    wait_for(lambda: [trial.state for trial in read_trials(run / "search")] == ["running", "failed"], process)
    before = read_trials(run / "search")[0].epochs
    # Enough time for a second attempt of the failed trial.
    wait_for(lambda: read_trials(run / "search")[0].epochs > before + 20, process)
    with pytest.raises(Busy, match=r"another search is running in this folder"):
        search(load(SearchRun, tiny, [*words, "resume=true"]), log=lambda text: None)
    process.send_signal(signal.SIGTERM)
    text = output_of(process, status=3)
    assert "rerun the same command with resume=true" in text and "*** SIG" not in text
    assert "restarts from" not in text and "nonsense" in text
    lines = verdict(summarize(read_search(run)))
    assert lines == ["2 trials: 0 complete, 0 stopped early, 1 failed, 1 running."]


@pytest.mark.slow
def test_killed_search_resumes_without_rerunning_finished_trials(tiny, tmp_path):
    space = space_file(tmp_path, "train.loss.gamma: {uniform: [0, 3]}\ntrain.optim.lr: {loguniform: [1e-3, 1e-2]}")
    folder = tmp_path / "run" / "search"
    words = ["--config", str(tiny), f"space={space}", "trials=4", "scheduler=none", "concurrent=1", "train.epochs=6"]
    process = program("tune.search", *words)
    wait_for(lambda: sum(trial.state == "complete" for trial in read_trials(folder)) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = {trial.number: trial for trial in read_trials(folder) if trial.state == "complete"}
    weights = [path for n in finished for path in folder.glob(f"trial-{n:03d}/*/fold-*/weights.*")]
    written = {path: path.stat().st_mtime_ns for path in weights}
    assert BASELINE in finished and written

    assert "train.epochs: differs" in output_of(program("tune.search", *words, "train.epochs=7", "resume=true"), 2)
    output_of(program("tune.search", *words, "resume=true"))
    trials = read_trials(folder)
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert all(trials[number - 1].macro_f1 == trial.macro_f1 for number, trial in finished.items())
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())


@pytest.mark.slow
def test_search_that_is_stopped_during_trainings_with_other_seeds_ends_with_3(tiny, tmp_path):
    space = space_file(tmp_path, "train.optim.lr: {loguniform: [1e-3, 1e-2]}")
    words = [f"space={space}", "trials=2", "seeds=1", "train.epochs=60"]
    run = load(SearchRun, tiny, words)
    for number, lr in ((1, 0.001), (2, 0.01)):  # a search whose second trial is the best
        folder = run.trial_folder(number)
        run_trial(Trial(number, {"train.optim.lr": lr}), run.experiment, "small", (0,), folder, lambda scores: None)
        replace(read_trials(run.search_folder)[number - 1], macro_f1=number / 10).write(folder)
    save(run, run.search_folder / "search.yaml")
    (run.search_folder / "space.yaml").write_text(space.read_text())
    process = program("tune.search", "--config", str(tiny), *words, "resume=true")
    wait_for(lambda: any(trial.epochs for trial in read_trials(run.search_folder, repeats=True)), process)
    process.send_signal(signal.SIGTERM)
    text = output_of(process, status=3)
    assert re.search(r"interrupted: [12] trainings with other seeds have not ended; .*resume=true", text), text
