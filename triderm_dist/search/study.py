"""The search itself: Ray decides what runs where and when it stops."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from triderm_dist.cli import Interrupted
from triderm_dist.config import Experiment, load, save
from triderm_dist.schema import ConfigError, InputError
from triderm_dist.search.results import Summary, conclude, describe
from triderm_dist.search.settings import BASELINE, SearchConfig, SearchRun, trial_name
from triderm_dist.search.space import Space, fit_space, own_settings, read_space
from triderm_dist.search.trial import State, Trial, read_trial, read_trials, run_trial

if TYPE_CHECKING:
    from triderm_dist.data.shards import ShardIndex

REDUCTION = 3
"""ASHA lets one trial in so many pass each of its rungs."""


def search(run: SearchRun, say: Callable[[str], None]) -> Summary:
    """Run the trials, on this machine or a Ray cluster, and write trials.csv and best.yaml. `say` gets progress.

    Raises ConfigError for settings or a space that can't be used, before any trial; Interrupted where it was stopped.
    """
    settings, experiment, model = run.search, run.experiment, run.model
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("tune.search starts its own processes: run it by python -m tune.search, without a launcher")
    if model not in experiment.models:
        raise ConfigError(f"search.model={model}: the settings have the models {', '.join(experiment.models)}")
    folds = experiment.data.folds
    if len(set(settings.folds)) < len(settings.folds) or not all(0 <= fold < folds for fold in settings.folds):
        raise ConfigError(f"search.folds: each of 0 to {folds - 1} (data.folds is {folds}) may stand there once")
    space, notes = fit_space(read_space(Path(settings.space)), experiment, model, settings.space)
    for note in notes:
        say(f"note: {note}")

    from triderm_dist.data.cache import open_index

    index = open_index(experiment.train_shards, experiment.data.remote, verify=experiment.data.verify)
    _open_folder(run, space)
    _prepare_tokens(experiment, model, index)
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_CHDIR_TO_TRIAL_DIR="0", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its tables would drown ours
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # the most that Ray forgets when it is killed
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    try:
        _start_ray(settings)
        tuner = _tuner(run, space, say)
        tuner.fit()
    finally:
        ray.shutdown()
    trials = read_trials(run.search_folder)
    ended = sum(trial.state != "running" for trial in trials)
    summary = conclude(run)
    if ended < settings.trials:
        raise Interrupted(f"{ended} of {settings.trials} trials have ended; the same command with resume=true goes on")
    if summary.best is None:
        failed = next((trial for trial in trials if trial.state == "failed"), None)
        raise InputError(
            f"{run.search_folder}: no trial came to its end; the first that failed said: "
            f"{failed.error if failed else 'nothing'}"
        )
    return summary


def _open_folder(run: SearchRun, space: Space) -> None:
    """Begin OUTPUT/search, or check that the search there is the one that is asked for."""
    folder = run.search_folder
    record, written = folder / "search.yaml", folder / "space.yaml"
    if not run.search.resume:
        if read_trials(folder):
            raise ConfigError(f"{folder}: holds a search; go on with it by resume=true, or choose another output")
        shutil.rmtree(folder / "ray", ignore_errors=True)  # of a search that was killed before its first trial
        folder.mkdir(parents=True, exist_ok=True)
        tree = {key: {domain.kind: list(domain.values)} for key, domain in space.items()}
        written.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        save(run, record)
        return
    if not record.exists():
        raise ConfigError(f"{folder}: holds no search to go on with; leave resume=true away")
    before, now = (
        tree.model_dump(exclude={"search": {"resume", "address"}}) for tree in (load(SearchRun, record), run)
    )
    if key := _first_difference(before, now):
        raise ConfigError(f"{key}: differs from the search in {folder}; resume with its settings, see {record}")
    if read_space(written) != space:
        raise ConfigError(f"{run.search.space}: differs from {written}, with which the search was begun")


def _first_difference(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> str | None:
    for key in [*one, *(key for key in other if key not in one)]:
        first, second = one.get(key), other.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            if found := _first_difference(first, second, f"{prefix}{key}."):
                return found
        elif first != second:
            return f"{prefix}{key}"
    return None


def _prepare_tokens(experiment: Experiment, model: str, index: ShardIndex) -> None:
    """Compute a frozen tower's tokens once, so that the trials find them."""
    config = experiment.models[model]
    if not config.tower.frozen:
        return
    from triderm_dist.engine import parallel
    from triderm_dist.engine.tokens import open_views

    train = config.train
    accelerator = parallel.start(train.precision, train.micro_batch, train.global_batch, train.optim.clip_norm)
    open_views(config, index, experiment.token_folder, accelerator, experiment.data, seed=experiment.seed, train=True)


def _start_ray(settings: SearchConfig) -> None:
    import ray

    library = str(Path(__file__).resolve().parents[2])
    paths = dict.fromkeys([library, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(settings.cpus),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": "error", "log_to_driver": False}
    # "local", since without an address Ray joins whatever cluster was last started on this machine.
    # Nothing large goes through the object store; its default is a third of the memory.
    local: dict[str, Any] = {} if settings.address else {"object_store_memory": 100 * 2**20}
    try:
        ray.init(settings.address or "local", runtime_env={"env_vars": variables}, **quiet, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"search.address={settings.address}: Ray does not start ({' '.join(str(error).split())}); "
            "check the address, and RAY_AUTH_TOKEN where the cluster asks for a token"
        ) from None


def _tuner(run: SearchRun, space: Space, say: Callable[[str], None]) -> Any:
    """A Ray Tuner ready to `fit`: a new one, or that of the killed search."""
    import optuna
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search.optuna import OptunaSearch

    settings, experiment, model, root = run.search, run.experiment, run.model, run.search_folder.resolve()
    here, own = os.getcwd(), own_settings(experiment.models[model], space)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A resumed trial tells its first epochs again, to Optuna too; failures are told by `_told_by`, in one line each.
    warnings.filterwarnings("ignore", "The reported value is ignored")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

    def trainable(sampled: dict[str, Any]) -> None:
        import torch

        os.chdir(here)
        torch.set_num_threads(settings.cpus)
        number = int(Path(tune.get_context().get_trial_dir()).name.removeprefix("trial-").partition("_")[0])
        values = own if number == BASELINE else {key: _tidy(value) for key, value in sampled.items()}
        folder = root / trial_name(number)
        run_trial(Trial(number, values), experiment, model, settings.folds, folder, tune.report)

    gpus = settings.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    needs = {"cpu": float(settings.cpus), "gpu": gpus}
    for name, amount in needs.items():
        most = max((node["Resources"].get(name.upper(), 0.0) for node in ray.nodes()), default=0.0)
        if amount > most:
            raise ConfigError(f"search.{name}s: a trial wants {amount:g}, no machine has more than {most:g}")
    total = ray.cluster_resources()
    fit_in = min(int(total.get(name.upper(), 0) / amount) for name, amount in needs.items() if amount)
    concurrent = settings.concurrent or max(1, min(fit_in, settings.trials))
    with_resources = tune.with_resources(trainable, needs)
    state = str(root / "ray")
    say(f"{settings.trials} trials over {', '.join(space)}, {concurrent} at once")
    if settings.resume and tune.Tuner.can_restore(state):
        ended = [trial for trial in read_trials(root) if trial.state in ("complete", "stopped")]
        say(f"going on after {len(ended)} trials")
        return tune.Tuner.restore(state, with_resources, resume_unfinished=True, resume_errored=True)

    class Asha(ASHAScheduler):
        """ASHA that lets the baseline run to its end, as every gain is measured against it."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            action = super().on_trial_result(tune_controller, trial, result)
            return self.CONTINUE if _number(trial) == BASELINE and action == self.STOP else action

    if settings.scheduler == "asha":
        scheduler: Any = Asha(
            time_attr="epoch", max_t=run.epochs + 1, grace_period=settings.grace_epochs, reduction_factor=REDUCTION
        )
    else:
        scheduler = FIFOScheduler()
    if settings.searcher == "tpe":
        # A third of the trials at random, then by model: the default, 10, is most of a short search.
        sampler: Any = optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=max(4, settings.trials // 3))
    else:
        sampler = optuna.samplers.RandomSampler(seed=settings.seed)
    searcher = OptunaSearch(
        {key: domain.distribution() for key, domain in space.items()},
        metric="macro_f1", mode="max", points_to_evaluate=[own], sampler=sampler,
    )  # fmt: skip
    return tune.Tuner(
        with_resources,
        tune_config=tune.TuneConfig(
            metric="macro_f1", mode="max", search_alg=searcher, scheduler=scheduler, num_samples=settings.trials,
            max_concurrent_trials=concurrent, trial_dirname_creator=lambda trial: trial_name(_number(trial)),
        ),
        run_config=tune.RunConfig(
            name="ray", storage_path=str(root), verbose=0, callbacks=[_told_by(root, settings.trials, run.epochs)]
        ),
    )  # fmt: skip


def _number(trial: Any) -> int:
    """Ray's count of a trial, from 1."""
    return int(trial.experiment_tag.partition("_")[0])


def _tidy(value: Any) -> Any:
    """Six digits are enough for a setting that people read and write."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _told_by(root: Path, trials: int, epochs: int) -> Any:
    """A Ray callback that says what happens, records how trials end, and drops the checkpoints of ended ones."""
    from ray import tune

    class Told(tune.Callback):
        said = 0.0

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            known = read_trial(root / trial_name(_number(trial)))
            if known and known.state == "running" and time.monotonic() - self.said > 20:
                self._say(known)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "stopped", "")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "failed", "its process died; out of memory?")

        def _end(self, trial: Any, state: State, error: str) -> None:
            folder = root / trial_name(_number(trial))
            known = read_trial(folder) or Trial(_number(trial), dict(trial.config))
            if known.state == "running":
                known = replace(known, state=state, error=error)
                known.write(folder)
            if known.state != "failed":  # that one goes on from them after a resume
                for checkpoints in folder.glob("*/fold-*/checkpoints"):
                    shutil.rmtree(checkpoints, ignore_errors=True)
            self._say(known)

        def _say(self, known: Trial) -> None:
            self.said = time.monotonic()
            score = "" if known.macro_f1 is None else f"  macro F1 {known.macro_f1:.3f}"
            line = f"trial {known.number}/{trials}  epoch {known.epochs}/{epochs}{score}  {known.state}"
            print(f"{line}  {known.error or describe(known.settings)}", flush=True)

    return Told()
