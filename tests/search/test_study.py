"""Search: spaces that are checked before a trial starts, trials that resume, and a real search on a tiny packed set."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from scipy import stats

from tests.processes import ROOT
from triderm_dist.config import Experiment, load
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.schema import ConfigError, DataError, InputError
from triderm_dist.search.results import _repeats, conclude, importance, verdict
from triderm_dist.search.settings import BASELINE, SearchRun, read_search
from triderm_dist.search.space import (
    Domain,
    fit_space,
    own_settings,
    read_space,
    refuse_fixed,
    with_settings,
    without_effect,
)
from triderm_dist.search.study import search
from triderm_dist.search.trial import Trial, _Curve, read_trial, read_trials, run_trial


def space_file(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text)
    return path


# --- spaces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.loss.gama: {uniform: [0, 3]}", r"unknown setting 'train.loss.gama'; did you mean 'train.loss.gamma'\?"),
        ("train.optim.lr: {uniform: [-1, 1]}", "train.optim.lr: input should be greater than 0"),
        ("train.loss.label_smoothing: {uniform: [0, 1]}", "train.loss.label_smoothing: input should be less than 1"),
        ("train.epochs: {randint: [2, 9]}", "train.epochs is the budget of a trial"),
        ("train.loss: {choice: [1]}", "train.loss: input should be a valid dictionary"),
        ("width: {choice: [64, 65]}", "width 65 is not a multiple of heads"),
        ("tower.freeze_clinical: {uniform: [0, 3]}", "tower.freeze_clinical: input should be a valid integer"),
        ("train.loss.gamma: {uniform: [3, 0]}", "two numbers, the lower first"),
        ("train.loss.gamma: {normal: [0, 3]}", "write one of uniform, loguniform, randint, choice"),
        ("train.loss.gamma: 3", "write one of uniform"),
        ("train.optim.lr: {loguniform: [0, 1e-3]}", "loguniform takes numbers above 0"),
        ("use: {choice: [[clinical]]}", "choice takes plain values"),
        ("train.log_every: {randint: [1, 5]}", "no setting of this space has effect"),
        ("", "a space is a mapping of settings"),
        ("a: [", "not a readable YAML file"),
    ],
)
def test_a_wrong_space_is_one_line(tmp_path, text, message):
    path = space_file(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        fit_space(read_space(path), Experiment(), "trimodal", str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("name", ["losses", "llrd", "all"])
@pytest.mark.parametrize("experiment", ["demo", "milk10k", "milk10k_cpu"])
def test_the_spaces_of_the_repository_fit_its_experiments(name, experiment):
    config = load(Experiment, ROOT / "launch" / "experiments" / f"{experiment}.yaml")
    for model in config.models:
        space, notes = fit_space(read_space(ROOT / "tune" / "spaces" / f"{name}.yaml"), config, model, name)
        frozen = config.models[model].tower.frozen
        left_out = [note for note in notes if "left out" in note]
        assert len(left_out) == (3 if frozen and name != "losses" else 0)
        assert ("train.optim.layer_decay" in space) == (name != "losses" and not frozen)


def test_the_space_of_all_is_the_other_two():
    losses, llrd, both = (read_space(ROOT / "tune" / "spaces" / f"{name}.yaml") for name in ("losses", "llrd", "all"))
    assert both == losses | llrd


@given(
    domain=st.one_of(
        st.tuples(st.floats(1e-6, 1), st.floats(1.5, 9)).map(lambda ends: Domain("uniform", ends)),
        st.tuples(st.floats(1e-6, 1), st.floats(1.5, 9)).map(lambda ends: Domain("loguniform", ends)),
        st.tuples(st.integers(0, 4), st.integers(5, 9)).map(lambda ends: Domain("randint", ends)),
        st.just(Domain("choice", ("shuffle", "balanced"))),
    ),
    seed=st.integers(0, 99),
)
def test_samples_lie_in_their_domain_and_optuna_agrees(domain, seed):
    value = domain.sample(random.Random(seed))
    distribution = domain.distribution()
    # exp(log(x)) is off by a rounding at the ends
    assert value in domain or value == pytest.approx(domain.values[0]) or value == pytest.approx(domain.values[1])
    assert distribution.to_external_repr(distribution.to_internal_repr(value)) == value
    ends = domain.values if domain.kind == "choice" else (distribution.low, distribution.high)
    assert tuple(ends) == domain.values


def test_a_space_is_widened_to_the_experiments_own_settings():
    experiment = load(Experiment, None, ["train.optim.lr=0.01", "models.a.train.loss.gamma=5"])
    space = {"train.optim.lr": Domain("loguniform", (1e-5, 1e-3)), "train.loss.gamma": Domain("choice", (0.0, 1.0))}
    fitted, notes = fit_space(space, experiment, "a", "here")
    assert fitted["train.optim.lr"].values == (1e-5, 0.01)
    assert fitted["train.loss.gamma"].values == (0.0, 1.0, 5.0)
    assert len(notes) == 2 and "0.01" in notes[0]
    experiment = load(Experiment, None, ["models.a.train.loss.gamma=0"])
    with pytest.raises(ConfigError, match=r"here: train.loss.gamma: the experiment's own value 0.0 fits no loguniform"):
        fit_space({"train.loss.gamma": Domain("loguniform", (0.5, 2.0))}, experiment, "a", "here")


def test_settings_reach_one_model_and_win_over_shared_ones():
    experiment = load(Experiment, None, ["train.loss.gamma=1", "models.a.width=64", "models.b.width=64"])
    changed = with_settings(experiment, "b", {"train.loss.gamma": 0.5, "tower.freeze_clinical": 2})
    assert own_settings(changed.models["b"], ["train.loss.gamma", "tower.freeze_clinical"]) == {
        "train.loss.gamma": 0.5,
        "tower.freeze_clinical": 2,
    }
    assert changed.models["a"] == experiment.models["a"]
    assert with_settings(changed, "b", own_settings(experiment.models["b"], ["train.loss.gamma"])).models[
        "b"
    ].train == (experiment.models["b"].train)


def test_what_has_no_effect_depends_on_what_else_varies():
    frozen = load(Experiment, None, ["models.a.tower.frozen=true"]).models["a"]
    idle = without_effect(frozen, ["train.optim.layer_decay", "train.optim.lr"])
    assert list(idle) == ["train.optim.layer_decay"] and "tower.frozen" in idle["train.optim.layer_decay"]
    assert not without_effect(frozen, ["train.optim.layer_decay", "tower.frozen"])
    plain = load(Experiment, None, ["models.a.train.loss.focal_weight=0"]).models["a"]
    assert set(without_effect(plain, ["train.loss.gamma", "train.optim.layer_decay"])) == {"train.loss.gamma"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.sampling.power", "how many steps an epoch has"),
        ("train.optim.warmup_epochs", "warm-up is over"),
        ("train.augment.rotation", "tokens would be computed anew"),
        ("width", "the weights and the course of a training hang on it"),
        ("train.ema_decay", "the weights and the course of a training hang on it"),
    ],
)
def test_a_setting_that_is_fixed_in_mid_training_is_refused_with_the_reason(key, message):
    model = load(Experiment, None, ["models.a.tower.frozen=true"]).models["a"]
    space = read_space(ROOT / "tune" / "spaces" / "pbt.yaml")
    refuse_fixed(space, model, "pbt.yaml")
    with pytest.raises(ConfigError, match=rf"here: {key} can't change in mid-training \(.*{message}"):
        refuse_fixed({**space, key: Domain("uniform", (0.0, 1.0))}, model, "here")


def test_short_names_stand_for_the_section():
    config = load(SearchRun, None, ["space=x.yaml", "trials=3", "seed=7", "search.seed=8", "search.cpus=2"])
    assert (config.search.space, config.search.trials, config.search.seed, config.search.cpus) == ("x.yaml", 3, 8, 2)
    assert config.seed == 7 and isinstance(config.experiment, Experiment)
    for misspelt in ("search.trails=3", "trails=3"):
        with pytest.raises(ConfigError, match=r"did you mean 'search.trials'"):
            load(SearchRun, None, [misspelt])


# --- a trial ---------------------------------------------------------------------------------------------------------


def test_the_curve_is_the_mean_over_folds_of_the_kept_epoch():
    best, last = _Curve("best"), _Curve("last")
    for curve in (best, last):
        for epoch, score in enumerate([0.2, 0.6, 0.4], 1):
            assert curve.add(epoch, {"macro_f1": score, "official": score / 2})
            assert not curve.add(epoch, {"macro_f1": 9.0, "official": 9.0})  # told again after a resume
        curve.end_fold()
        curve.add(1, {"macro_f1": 0.1, "official": 0.0})
        assert curve.epochs == 4
    assert best.mean("macro_f1") == pytest.approx((0.6 + 0.1) / 2)
    assert last.mean("official") == pytest.approx((0.2 + 0.0) / 2)


def test_a_trial_that_is_no_trial_is_told(tmp_path):
    (tmp_path / "trial-001").mkdir()
    (tmp_path / "trial-001" / "trial.json").write_text('{"nummer": 1}')
    with pytest.raises(DataError, match=r"trial.json: not a trial"):
        read_trials(tmp_path)


@pytest.fixture
def tiny(make_challenge: Callable, tmp_path: Path) -> Path:
    """An experiment file on 44 packed lesions with a frozen tower, seconds an epoch."""
    shards = tmp_path / "shards"
    pack_shards(read_challenge(make_challenge(lesions=44).folder), shards, short_side=None)
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "tower.safetensors"
    save_file(timm.create_model("test_efficientnet", num_classes=0).state_dict(), weights)
    tower = {"source": f"timm:test_efficientnet@{weights}", "image_size": 32, "frozen": True}
    tree = {
        "output": str(tmp_path / "run"),
        "data": {"shards": str(shards), "folds": 2},
        "train": {
            "epochs": 3,
            "global_batch": 16,
            "micro_batch": 16,
            "select": "last",
            "optim": {"lr": 1e-3, "min_lr": 1e-6, "warmup_epochs": 1},
        },
        "models": {"small": {"width": 32, "heads": 4, "mlp_ratio": 1.0, "tower": tower}},
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_trial_reports_every_epoch_and_goes_on_after_a_kill(tiny, tmp_path):
    experiment = load(Experiment, tiny)

    class Killed(BaseException):
        pass

    def run(folder: Path, kill_at: int | None) -> list[dict]:
        told: list[dict] = []

        def report(scores: dict) -> None:
            told.append(scores)
            if scores["epoch"] == kill_at:
                raise Killed

        trial = Trial(2, {"train.loss.gamma": 1.5, "train.optim.lr": 0.004})
        run_trial(trial, experiment, "small", (0, 1), folder, report)
        return told

    whole = run(tmp_path / "whole", None)
    assert [scores["epoch"] for scores in whole] == [1, 2, 3, 4, 5, 6]
    for kill_at in (2, 4):
        with pytest.raises(Killed):
            run(tmp_path / "cut", kill_at)
    weights = tmp_path / "cut" / "small" / "fold-0" / "weights.safetensors"
    written = weights.stat().st_mtime_ns
    assert run(tmp_path / "cut", None) == whole  # replayed, then continued
    assert weights.stat().st_mtime_ns == written  # the finished fold was not trained again
    assert run(tmp_path / "cut", None) == whole
    record = read_trial(tmp_path / "cut")
    assert (record.state, record.epochs, record.macro_f1) == ("complete", 6, whole[-1]["macro_f1"])
    metrics = [json.loads(line) for line in (weights.parent / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "validation" for line in metrics) == 3


def test_a_trial_of_other_settings_starts_afresh_and_a_failure_is_recorded(tiny, tmp_path):
    experiment, folder = load(Experiment, tiny), tmp_path / "trial-001"
    experiment = with_settings(experiment, "small", {"train.epochs": 1})
    run_trial(Trial(1, {"train.loss.gamma": 1.0}), experiment, "small", (0,), folder, lambda scores: None)
    (folder / "left").touch()
    with pytest.raises(ConfigError):
        run_trial(Trial(1, {"train.global_batch": 10}), experiment, "small", (0,), folder, lambda scores: None)
    record = read_trial(folder)
    assert record.state == "failed" and "global_batch 10 is not a multiple" in record.error
    assert not (folder / "left").exists()


def test_a_trial_goes_on_from_a_leading_one_with_settings_of_its_own(tiny, tmp_path):
    experiment = load(Experiment, tiny)

    class Paused(BaseException):
        pass

    def run(number: int, settings: dict, leader: Path | None, pause_at: int | None) -> list[dict]:
        told: list[dict] = []

        def report(scores: dict) -> None:
            told.append(scores)
            if scores["epoch"] == pause_at:
                raise Paused

        run_trial(Trial(number, settings), experiment, "small", (0,), tmp_path / f"{number}", report, leader)
        return told

    with pytest.raises(Paused):
        run(2, {"train.optim.lr": 0.004}, None, pause_at=2)
    shutil.copytree(tmp_path / "2", tmp_path / "copy")
    leading = run(2, {"train.optim.lr": 0.004}, None, None)
    with pytest.raises(Paused):
        run(3, {"train.optim.lr": 0.002}, None, pause_at=1)  # what it loses by following

    still = {"train.optim.lr": 1e-12, "train.optim.min_lr": 0.0, "train.optim.weight_decay": 0.0}
    for _ in range(2):  # a restart does not follow once more
        assert run(3, still, tmp_path / "copy", None)[:2] == leading[:2]
    record = read_trial(tmp_path / "3")
    assert (record.number, record.state, record.settings) == (3, "complete", still)
    assert record.changes == [{"epoch": 2, "trial": 2, "settings": {"train.optim.lr": 0.004}}]
    weights = {name: load_file(next(tmp_path.glob(f"{name}/small/fold-0/**/weights.safetensors"))) for name in "23"}
    led = load_file(next((tmp_path / "copy").glob("small/fold-0/checkpoints/*/weights.safetensors")))
    assert all(np.allclose(weights["3"][key], led[key], rtol=0, atol=1e-9) for key in led if "num_batches" not in key)
    assert any(not np.allclose(weights["2"][key], led[key], rtol=0, atol=1e-9) for key in led)


# --- what came out ---------------------------------------------------------------------------------------------------


def test_the_noise_of_seeds_is_that_of_a_paired_t_test(tmp_path):
    best, baseline = Trial(4, {"a": 2}), Trial(BASELINE, {"a": 1})
    scores = {1: (0.40, 0.45), 2: (0.42, 0.44), 3: (0.41, 0.47), 4: (0.40, None)}
    for seed, pair in scores.items():
        for trial, score in zip((baseline, best), pair, strict=True):
            if score is not None:
                done = Trial(trial.number, trial.settings, seed, "complete", 3, score)
                done.write(tmp_path / f"trial-{trial.number:03d}-seed-{seed}")
    found = _repeats(tmp_path, baseline, best)
    expected = stats.ttest_rel([0.45, 0.44, 0.47], [0.40, 0.42, 0.41]).confidence_interval(0.95)
    assert found.seeds == [1, 2, 3]
    assert (found.gain.low, found.gain.high) == pytest.approx((expected.low, expected.high))
    assert _repeats(tmp_path, baseline, Trial(4, {"a": 3})) is None  # other settings, of an earlier best
    assert read_trials(tmp_path) == []


def test_importance_finds_the_setting_that_matters_and_says_nothing_of_few_trials():
    space = {name: Domain("uniform", (0.0, 1.0)) for name in "abc"}
    generator = random.Random(0)
    drawn = [{name: generator.random() for name in space} for _ in range(12)]
    trials = [Trial(n, settings, macro_f1=0.3 + 0.2 * settings["b"]) for n, settings in enumerate(drawn, 1)]
    found = importance(trials, space)
    assert next(iter(found)) == "b" and found["b"].low > max(found["a"].high, found["c"].high)
    assert importance(trials[:5], space) == {}
    assert importance([Trial(trial.number, trial.settings, macro_f1=0.3) for trial in trials], space) == {}


# --- the programs ----------------------------------------------------------------------------------------------------


def program(name: str, *words: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(
        [sys.executable, "-m", name, *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def output_of(process: subprocess.Popen, status: int = 0) -> str:
    text, _ = process.communicate(timeout=240)
    assert process.returncode == status, text
    return text


def test_bad_input_ends_with_status_2_before_ray_starts(tiny, tmp_path):
    for words, message in [
        (["space=none.yaml"], "none.yaml is no file"),
        (["model=large"], "the settings have the models small"),
        (["folds=[0,2]"], "search.folds"),
        (["resume=true"], "holds no search to go on with"),
        ([f"data.shards={tmp_path / 'nowhere'}"], "no such folder"),
    ]:
        text = output_of(program("tune.search", "--config", str(tiny), *words), status=2)
        assert re.fullmatch(rf"(note: .*\n)*error: .*{message}.*\n", text), text
    for words, message in [
        (["workers=2"], "16 is not a multiple of 2 ranks x micro_batch 16"),
        (["scheduler=pbt", "folds=[0,1]"], "pbt trains one fold"),
        (["scheduler=pbt", "workers=2"], "pbt trains a trial in one process"),
        (["scheduler=pbt", "concurrent=1"], "pbt gives all trials a turn"),
        (["scheduler=pbt"], "train.sampling.power can't change in mid-training"),
    ]:
        with pytest.raises(ConfigError, match=message):
            search(load(SearchRun, tiny, words), say=lambda text: None)
    for domain, batch in (("choice: [8, 12]", 12), ("randint: [1, 4]", 3)):
        words = [f"space={space_file(tmp_path, f'train.micro_batch: {{{domain}}}')}"]
        with pytest.raises(ConfigError, match=f"16 is not a multiple of 1 ranks x micro_batch {batch}"):
            search(load(SearchRun, tiny, words), say=lambda text: None)
    assert not (tmp_path / "run" / "search" / "trial-001").exists()


def test_a_real_search_of_two_trials_and_the_best_file_trains(tiny, tmp_path):
    space = space_file(
        tmp_path, "train.optim.lr: {loguniform: [3e-3, 3e-2]}\ntrain.optim.layer_decay: {uniform: [0.5, 1]}"
    )
    run = tmp_path / "run"
    words = ["--config", str(tiny), f"space={space}", "trials=2", "train.epochs=2", "concurrent=2", "seeds=2"]
    text = output_of(program("tune.search", *words))
    assert "layer_decay is left out: tower.frozen" in text
    assert "train.optim.lr is widened to the experiment's own value 0.001" in text
    trials = read_trials(run / "search")
    assert [trial.number for trial in trials] == [1, 2] and trials[0].state == "complete"
    assert trials[0].settings == {"train.optim.lr": 0.001}
    assert len(list(run.glob("tokens/*"))) == 1 and not list(run.glob("search/*/tokens"))

    with (run / "search" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["1", "2"] and float(rows[0]["gain"]) == 0
    complete = [trial for trial in trials if trial.state == "complete"]
    best = max(complete, key=lambda trial: trial.macro_f1)
    searched = read_search(run)
    assert load(Experiment, run / "best.yaml") == with_settings(searched.experiment, "small", best.settings)

    output_of(program("launch.train", "--config", str(run / "best.yaml")))
    metrics = [json.loads(line) for line in (run / "small" / "fold-0" / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in metrics if line["kind"] == "validation"][-1]
    assert final["macro_f1"] == best.macro_f1  # launch.train does what the trial did

    text = output_of(program("tune.results", f"output={run}"))
    assert all((run / "search" / f"{name}.png").stat().st_size > 10_000 for name in ("curves", "settings", "parallel"))
    assert (run / "search" / "report.html").read_text().count("data:image/png") == 3
    repeats = read_trials(run / "search", repeats=True)
    if best.number != BASELINE:
        assert [(trial.number, trial.seed) for trial in repeats] == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert len({trial.macro_f1 for trial in repeats if trial.number == 1} - {trials[0].macro_f1}) > 0
        assert re.search(r"With 2 other seeds .* 95 % interval over\s+seeds", text)
    assert "resume=true" in output_of(program("tune.search", *words), status=2)


def descendants(pid: int, title: str) -> list[int]:
    """Processes below a process whose command line holds `title`."""
    parents, titled = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if title in (folder / "cmdline").read_text():
                titled.append(int(folder.name))
        except (OSError, ValueError):
            continue

    def below(child: int) -> bool:
        return child in parents and (parents[child] == pid or below(parents[child]))

    return [child for child in titled if below(child)]


def wait_for(what: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline and process.poll() is None, output_of(process)
        time.sleep(0.2)


def test_trials_on_two_workers_each_give_what_one_worker_gives_also_after_a_worker_was_killed(tiny, tmp_path):
    space, run = space_file(tmp_path, "train.optim.lr: {loguniform: [3e-3, 3e-2]}"), tmp_path / "run"
    words = ["--config", str(tiny), f"space={space}", "trials=2", "scheduler=none", "seeds=0", "train.micro_batch=8"]
    # Room for two trials at once, whatever the machine has.
    process = program("tune.search", *words, "workers=2", environment={"RAY_OVERRIDE_RESOURCES": '{"CPU": 4}'})
    wait_for(lambda: any(trial.epochs for trial in read_trials(run / "search")), process)
    workers = descendants(process.pid, "RayTrainWorker")
    assert len(workers) == 4
    os.kill(workers[0], signal.SIGKILL)
    wait_for(lambda: len(set(workers) & set(descendants(process.pid, "RayTrainWorker"))) <= 2, process)  # its mate too
    assert "is tried again from its last checkpoint" in output_of(process)

    experiment = load(Experiment, tiny, ["train.micro_batch=8"])
    for trial in read_trials(run / "search"):
        alone, told = tmp_path / f"alone-{trial.number}", []
        run_trial(Trial(trial.number, trial.settings), experiment, "small", (0,), alone, told.append)
        assert trial.state == "complete" and trial.curve == pytest.approx([one["macro_f1"] for one in told], abs=1e-6)
        folder = Path("small/fold-0")
        first, second = (load_file(home / folder / "weights.safetensors")
                         for home in (alone, run / "search" / f"trial-{trial.number:03d}"))  # fmt: skip
        for key in first:
            np.testing.assert_allclose(first[key], second[key], rtol=1e-3, atol=2e-5, err_msg=key)


def test_a_population_follows_its_leader(tiny, tmp_path):
    # Two of five are last, so that one of them is not the baseline, which follows nobody.
    space = space_file(tmp_path, "train.optim.lr: {loguniform: [1e-6, 1e-5]}\ntrain.loss.gamma: {uniform: [0, 1]}")
    run = tmp_path / "run"
    text = output_of(program(
        "tune.search", "--config", str(tiny), f"space={space}", "trials=5", "scheduler=pbt", "exploit_epochs=2",
        "seeds=0", "train.epochs=4", "train.optim.lr=0.01", "train.optim.min_lr=1e-7",
        environment={"RAY_OVERRIDE_RESOURCES": '{"CPU": 5}'},
    ))  # fmt: skip
    trials = read_trials(run / "search")
    assert [(trial.state, len(trial.curve)) for trial in trials] == [("complete", 4)] * 5
    assert not trials[0].changes
    followed = [trial for trial in trials if trial.changes]
    assert followed and "goes on from trial" in text
    for trial in followed:
        change = trial.changes[-1]
        leading = trials[change["trial"] - 1]
        assert change["epoch"] == 2 and trial.curve[:2] == leading.curve[:2] and trial.settings != change["settings"]
        assert trial.settings["train.loss.gamma"] <= 2 and trial.settings["train.optim.lr"] <= 0.01
    assert not list(run.glob("search/ray/trial-*/checkpoint_*"))


def test_a_search_is_alone_tries_bad_input_once_and_stops_on_sigterm(tiny, tmp_path):
    wrong = ", ".join(f"timm:nonsense-{number}" for number in range(30))
    space, run = space_file(tmp_path, f"tower.source: {{choice: [{wrong}]}}"), tmp_path / "run"
    words = [f"space={space}", "trials=2", "scheduler=none", "train.epochs=2000"]
    process = program(
        "tune.search", "--config", str(tiny), *words, environment={"RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
    )

    wait_for(lambda: [trial.state for trial in read_trials(run / "search")] == ["running", "failed"], process)
    before = read_trials(run / "search")[0].epochs
    wait_for(lambda: read_trials(run / "search")[0].epochs > before + 20, process)  # time to try the other again
    with pytest.raises(InputError, match=r"another search is working here"):
        search(load(SearchRun, tiny, [*words, "resume=true"]), say=lambda text: None)
    process.send_signal(signal.SIGTERM)
    text = output_of(process, status=3)
    assert "the same command with resume=true goes on" in text and "*** SIG" not in text
    assert "is tried again" not in text and "nonsense" in text
    said = verdict(conclude(read_search(run)))
    assert said == ["2 trials: 0 ran to their end, 0 were stopped early, 1 failed, 1 not ended."]


@pytest.mark.slow
def test_a_killed_search_goes_on_without_its_finished_trials(tiny, tmp_path):
    space = space_file(tmp_path, "train.loss.gamma: {uniform: [0, 3]}\ntrain.optim.lr: {loguniform: [1e-3, 1e-2]}")
    folder = tmp_path / "run" / "search"
    words = ["--config", str(tiny), f"space={space}", "trials=4", "scheduler=none", "concurrent=1", "train.epochs=6"]
    process, deadline = program("tune.search", *words), time.monotonic() + 200
    while sum(trial.state == "complete" for trial in read_trials(folder)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = {trial.number: trial for trial in read_trials(folder) if trial.state == "complete"}
    written = {path: path.stat().st_mtime_ns for n in finished for path in folder.glob(f"trial-{n:03d}/**/weights.*")}
    assert BASELINE in finished and written

    assert "train.epochs: differs" in output_of(program("tune.search", *words, "train.epochs=7", "resume=true"), 2)
    output_of(program("tune.search", *words, "resume=true"))
    trials = read_trials(folder)
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert all(trials[number - 1].macro_f1 == trial.macro_f1 for number, trial in finished.items())
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())
