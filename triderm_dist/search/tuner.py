"""Run trials with Ray Tune: resources and workers, the searcher, the scheduler, progress.

Every trial trains by `run_trial`: in the process that Ray Tune starts for it or, with several workers, in those that
Ray Train starts within the trial, one per rank.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from triderm_dist.distributed.ray_cluster import Needs, cluster_capacity, running_ray
from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.terminal import counted
from triderm_dist.schema import ConfigError, DataError
from triderm_dist.search import pbt
from triderm_dist.search.results import format_settings
from triderm_dist.search.settings import BASELINE, SearchConfig, SearchRun, parse_trial_name, trial_name
from triderm_dist.search.space import Space, own_settings, rounded
from triderm_dist.search.trial import State, Trial, last_checkpoint, read_trial, run_trial

REDUCTION = 3
"""ASHA promotes one of this many trials at each rung."""

SettingsOf = Callable[[int, Mapping[str, Any]], dict[str, Any]]
"""Takes the number of a trial and what Ray drew for it; returns the settings that it trains with."""


@contextmanager
def ray_session(settings: SearchConfig) -> Iterator[None]:
    """Run Ray inside the block, on this machine or in the cluster at `address`.

    Raises InputError if it does not start.
    """
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # Ray loses at most these seconds when it is killed
    variables = {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",  # disables Ray's progress tables
    }
    # Ray warns of the epochs that a resumed trial reports again; `progress_callback` prints each failure on one line.
    warnings.filterwarnings("ignore", "The reported value is ignored")
    warnings.filterwarnings("ignore", "Consider boosting PBT performance")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with running_ray(settings.address, settings.cpus, setting="search.address", variables=variables):
        yield


def run_trials(run: SearchRun, space: Space, log: Callable[[str], None]) -> None:
    """Run the trials of a search, or resume those of an interrupted one. Ray must be running."""
    from ray import tune

    settings, root = run.search, run.search_folder.resolve()
    own = own_settings(run.experiment.models[run.model], space)
    needs, concurrent = _allocate(settings, settings.trials)
    trials = f"{counted(settings.trials, 'trial')} of {run.model}"
    log(f"{trials} over {', '.join(space)}, {concurrent} at once" + _workers_text(settings))

    def settings_of(number: int, sampled: Mapping[str, Any]) -> dict[str, Any]:
        return own if number == BASELINE else {key: rounded(value) for key, value in sampled.items()}

    trainable = _trainable(run, needs, settings_of)
    state = str(root / "ray")
    if settings.resume and tune.Tuner.can_restore(state):
        try:
            tuner = tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True)
        except Exception as error:  # any, since Ray unpickles it
            text = one_line(error, 160, with_type=True)
            raise DataError(
                f"{state}: Ray's state of the search is damaged ({text}); set another output to search again; triderm "
                "results shows the trials of this one"
            ) from None
        tuner.fit()
        return

    def name_of(trial: Any) -> str:
        return trial_name(_number(trial, settings))

    population = settings.scheduler == "pbt"
    tune.Tuner(
        trainable,
        param_space={key: domain.for_ray() for key, domain in space.items()} if population else None,
        tune_config=tune.TuneConfig(
            metric="macro_f1",
            mode="max",
            search_alg=_searcher(settings, space, own),
            scheduler=_scheduler(run, space),
            num_samples=settings.trials,
            # A population alternates between its trials where they do not all fit; a limit would prevent that.
            max_concurrent_trials=None if population else concurrent,
            trial_dirname_creator=name_of,
        ),
        run_config=_run_config(run, "ray", name_of, settings_of),
    ).fit()


def run_repeats(run: SearchRun, trials: Sequence[Trial], log: Callable[[str], None]) -> int:
    """Train finished trials again with other seeds, as far as that is not done. Ray must be running.

    Returns how many of these trainings have not ended, because the search was interrupted.
    """
    from ray import tune

    settings, root = run.search, run.search_folder.resolve()
    known = {trial.number: trial.settings for trial in trials}
    todo = []
    for seed in range(1, settings.seeds + 1):
        for trial in trials:
            before = read_trial(run.trial_folder(trial.number, seed))
            if not before or before.state != "complete" or before.settings != trial.settings:
                todo.append(trial_name(trial.number, seed))
    if not todo:
        return 0
    needs, concurrent = _allocate(settings, len(todo))
    seeds = f"the best trial and the baseline with {counted(settings.seeds, 'other seed')}"
    log(f"{seeds}, {concurrent} at once" + _workers_text(settings))
    # The folders of the trials record which repetitions are done, so Ray's own state is not needed.
    shutil.rmtree(root / "ray-seeds", ignore_errors=True)

    def name_of(trial: Any) -> str:
        return str(trial.config["repeat"])

    def settings_of(number: int, sampled: Mapping[str, Any]) -> dict[str, Any]:
        return known[number]

    tune.Tuner(
        _trainable(run, needs, settings_of),
        param_space={"repeat": tune.grid_search(todo)},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, trial_dirname_creator=name_of),
        run_config=_run_config(run, "ray-seeds", name_of, settings_of),
    ).fit()
    ended = [read_trial(root / name) for name in todo]
    return sum(trial is None or trial.state == "running" for trial in ended)


def _allocate(settings: SearchConfig, trials: int) -> tuple[Needs, int]:
    """Return the resources of a worker, and how many trials run at once. Raises ConfigError if not one fits."""
    import ray

    gpus = settings.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    if settings.workers > 1 and 0 < gpus < 1:
        raise ConfigError(
            "search.gpus: each worker of a trial needs its own GPU; set search.gpus to 1, or search.workers to 1"
        )
    needs = {"CPU": float(settings.cpus), "GPU": float(gpus)}
    slots, largest = cluster_capacity(needs)
    if slots < settings.workers:
        raise ConfigError(
            f"search.workers, cpus, gpus: a trial needs {settings.workers} x ({settings.cpus} CPU, {gpus:g} GPU), "
            f"but the cluster has resources for {slots} workers; its largest machine has {largest}"
        )
    return needs, max(1, min(slots // settings.workers, trials, settings.concurrent or trials))


def _workers_text(settings: SearchConfig) -> str:
    return f", {settings.workers} workers each" if settings.workers > 1 else ""


def _trainable(run: SearchRun, needs: Needs, settings_of: SettingsOf) -> Any:
    """Return the function that Ray Tune calls in the process of each trial, with the resources that it needs."""
    from ray import tune

    settings, experiment, model, root = run.search, run.experiment, run.model, run.search_folder.resolve()
    working_directory, epochs = os.getcwd(), run.epochs

    def trainable(sampled: dict[str, Any]) -> None:
        number, seed = parse_trial_name(Path(tune.get_context().get_trial_dir()).name)
        trial = Trial(number, settings_of(number, sampled), seed)
        folder = root / trial_name(number, seed)

        def train(report: Callable[[dict[str, Any]], None], leader: Path | None = None) -> None:
            import torch

            os.chdir(working_directory)
            torch.set_num_threads(settings.cpus)
            run_trial(trial, experiment, model, settings.folds, folder, report, leader)

        def report_with_checkpoint(scores: dict[str, Any]) -> None:
            epoch = scores["epoch"]
            if epoch < last_checkpoint(folder):
                return  # an epoch from before the pause; the folder has a newer checkpoint already
            due = epoch % settings.exploit_epochs == 0 and epoch < epochs
            tune.report(scores, checkpoint=tune.Checkpoint.from_directory(folder) if due else None)

        try:
            if settings.workers > 1:
                _train_on_workers(settings, needs, experiment.rank_timeout, folder, train)
            elif settings.scheduler == "pbt" and not seed:
                if checkpoint := tune.get_checkpoint():
                    with checkpoint.as_directory() as leader:
                        train(report_with_checkpoint, Path(leader))
                else:
                    train(report_with_checkpoint)
            else:
                train(tune.report)
        except Exception:
            known = read_trial(folder)
            if not (known and known.bad_input):
                raise  # so that Ray retries

    if settings.workers > 1:
        # The workers use the cores; the trial's own process waits for them, but Ray requires it to reserve something.
        return tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 2.0**20}]))
    return tune.with_resources(trainable, tune.PlacementGroupFactory([{k: v for k, v in needs.items() if v}]))


def _train_on_workers(
    settings: SearchConfig, needs: Needs, timeout: float, folder: Path, train: Callable[..., None]
) -> None:
    """Call `train` on all workers of a trial. Ray Train stops them all when one fails; Ray Tune, when it stops the
    trial.
    """
    from ray import train as ray_train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    def worker() -> None:
        from triderm_dist.distributed.out_of_memory import SUPERVISED

        os.environ[SUPERVISED] = "ray"
        train(ray_train.report)

    callback: Any = TuneReportCallback()  # not a callback by Ray's own annotations
    trainer = TorchTrainer(
        worker,
        torch_config=TorchConfig(backend="nccl" if needs["GPU"] else "gloo", timeout_s=int(timeout)),
        scaling_config=ray_train.ScalingConfig(
            num_workers=settings.workers, use_gpu=needs["GPU"] > 0, resources_per_worker=needs
        ),
        run_config=ray_train.RunConfig(
            name=folder.name, storage_path=str(folder.parent / "ray-workers"), callbacks=[callback]
        ),
    )
    trainer.fit()


def _run_config(run: SearchRun, name: str, name_of: Callable[[Any], str], settings_of: SettingsOf) -> Any:
    from ray import tune

    root = run.search_folder.resolve()
    return tune.RunConfig(
        name=name,
        storage_path=str(root),
        verbose=0,
        callbacks=[progress_callback(root, name_of, settings_of, run.search.trials, run.epochs)],
        failure_config=tune.FailureConfig(max_failures=run.search.retries),
        # Ray's advice for a population: other trials may still be copying an older checkpoint.
        checkpoint_config=tune.CheckpointConfig(num_to_keep=4),
    )


def _searcher(settings: SearchConfig, space: Space, own: Mapping[str, Any]) -> Any:
    """Return the searcher, which draws the settings of a trial; the first trial has the experiment's own."""
    if settings.scheduler == "pbt":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(points_to_evaluate=[dict(own)], random_state=settings.seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if settings.searcher == "tpe":
        # A third of the trials are random: the default of 10 is most of a short search.
        sampler: Any = optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=max(4, settings.trials // 3))
    else:
        sampler = optuna.samplers.RandomSampler(seed=settings.seed)
    return OptunaSearch(
        {key: domain.distribution() for key, domain in space.items()},
        metric="macro_f1", mode="max", points_to_evaluate=[dict(own)], sampler=sampler,
    )  # fmt: skip


def _scheduler(run: SearchRun, space: Space) -> Any:
    """Return the scheduler, which stops lagging trials except for the baseline, against which gains are measured."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    settings, epochs = run.search, run.epochs

    class Asha(ASHAScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            action = super().on_trial_result(tune_controller, trial, result)
            return self.CONTINUE if _number(trial, settings) == BASELINE and action == self.STOP else action

    if settings.scheduler == "asha":
        return Asha(time_attr="epoch", max_t=epochs + 1, grace_period=settings.grace_epochs, reduction_factor=REDUCTION)
    if settings.scheduler == "none":
        return FIFOScheduler()
    return pbt.scheduler(settings, space, epochs, lambda trial: _number(trial, settings))


def _number(trial: Any, settings: SearchConfig) -> int:
    """Return the number of a trial, from 1. Ray counts from 0 if it draws the settings without a searcher."""
    count = int(re.split(r"[_@]", trial.experiment_tag)[0])
    return count + 1 if settings.scheduler == "pbt" else count


def progress_callback(
    root: Path, name_of: Callable[[Any], str], settings_of: SettingsOf, trials: int, epochs: int
) -> Any:
    """Return a callback of Ray that prints progress, records how trials end, and removes their checkpoints then."""
    from ray.tune.progress_reporter import TrialProgressCallback

    class Progress(TrialProgressCallback):  # replaces the one that Ray would add
        printed_at = 0.0

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            known = read_trial(root / name_of(trial))
            if known and known.state == "running" and time.monotonic() - self.printed_at > 20:
                self._print_trial(known)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "stopped", "")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "failed", "its process died; out of memory?")

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            known = read_trial(root / name_of(trial))
            reason = known.error if known and known.error else "its process died"
            print(f"{name_of(trial)} restarts from its last checkpoint: {reason}", flush=True)

        def _end(self, trial: Any, state: State, error: str) -> None:
            folder = root / name_of(trial)
            known = read_trial(folder)
            if known is None:  # it ended before it wrote its file
                number, seed = parse_trial_name(folder.name)
                known = Trial(number, settings_of(number, trial.config), seed)
            if known.state == "running":
                known = replace(known, state=state, error=error)
                known.write(folder)
            if known.state != "failed":  # a failed trial can resume from them
                for checkpoints in folder.glob("*/fold-*/checkpoints"):
                    shutil.rmtree(checkpoints, ignore_errors=True)
            self._print_trial(known)

        def _print_trial(self, known: Trial) -> None:
            self.printed_at = time.monotonic()
            name = f"trial {known.number}" + (f" seed {known.seed}" if known.seed else f"/{trials}")
            score = "" if known.macro_f1 is None else f"  macro F1 {known.macro_f1:.3f}"
            line = f"{name}  epoch {known.epochs}/{epochs}{score}  {known.state}"
            print(f"{line}  {known.error or format_settings(known.settings)}", flush=True)

    return Progress()
