"""Ray's part: where trials run and on how many workers, which settings come next, which trials stop or follow others.

Every trial trains by `run_trial`: in the process that Ray Tune starts for it, or, with several workers, on those that
Ray Train starts for it inside of the trial, each a rank.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from triderm_dist.distributed.ray_cluster import Needs, capacity, running_ray
from triderm_dist.schema import ConfigError
from triderm_dist.search.results import describe
from triderm_dist.search.settings import BASELINE, SearchConfig, SearchRun, trial_name
from triderm_dist.search.space import Domain, Space, own_settings
from triderm_dist.search.trial import State, Trial, last_checkpoint, read_trial, run_trial

REDUCTION = 3
"""ASHA lets one trial in so many pass each of its rungs."""


@contextmanager
def started(settings: SearchConfig) -> Iterator[None]:
    """Ray inside the block, here or in the cluster of `address`. Raises InputError where it does not start."""
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # the most that Ray forgets when it is killed
    variables = {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",  # its tables would drown ours
    }
    # A resumed trial tells its first epochs again, to Optuna too; failures are told by `_told_by`, in one line each.
    warnings.filterwarnings("ignore", "The reported value is ignored")
    warnings.filterwarnings("ignore", "Consider boosting PBT performance")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with running_ray(settings.address, settings.cpus, setting="search.address", variables=variables):
        yield


def run_trials(run: SearchRun, space: Space, say: Callable[[str], None]) -> None:
    """Run the trials of a search, or go on with those of a killed one; Ray is started."""
    from ray import tune

    settings, root = run.search, run.search_folder.resolve()
    own = own_settings(run.experiment.models[run.model], space)
    needs, concurrent = _share_machines(settings, settings.trials)
    say(f"{settings.trials} trials over {', '.join(space)}, {concurrent} at once" + _spread(settings))

    def settings_of(number: int, sampled: Mapping[str, Any]) -> dict[str, Any]:
        return own if number == BASELINE else {key: _tidy(value) for key, value in sampled.items()}

    trainable = _trainable(run, needs, settings_of)
    state = str(root / "ray")
    if settings.resume and tune.Tuner.can_restore(state):
        tune.Tuner.restore(state, trainable, resume_unfinished=True, resume_errored=True).fit()
        return

    def name_of(trial: Any) -> str:
        return trial_name(_number(trial, settings))

    population = settings.scheduler == "pbt"
    tune.Tuner(
        trainable,
        param_space={key: _ray_domain(domain) for key, domain in space.items()} if population else None,
        tune_config=tune.TuneConfig(
            metric="macro_f1",
            mode="max",
            search_alg=_searcher(settings, space, own),
            scheduler=_scheduler(run, space),
            num_samples=settings.trials,
            # A population takes turns where it does not fit in, which it does not once it is held back.
            max_concurrent_trials=None if population else concurrent,
            trial_dirname_creator=name_of,
        ),
        run_config=_run_config(run, "ray", name_of, settings.trials),
    ).fit()


def run_repeats(run: SearchRun, trials: Sequence[Trial], say: Callable[[str], None]) -> None:
    """Train finished trials again with other seeds, unless that is done; Ray is started."""
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
        return
    needs, concurrent = _share_machines(settings, len(todo))
    say(f"the best trial and the baseline with {settings.seeds} other seeds, {concurrent} at once" + _spread(settings))
    shutil.rmtree(root / "ray-seeds", ignore_errors=True)  # the folders of the trials tell what is done

    def name_of(trial: Any) -> str:
        return str(trial.config["repeat"])

    tune.Tuner(
        _trainable(run, needs, lambda number, sampled: known[number]),
        param_space={"repeat": tune.grid_search(todo)},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, trial_dirname_creator=name_of),
        run_config=_run_config(run, "ray-seeds", name_of, settings.trials),
    ).fit()


def _share_machines(settings: SearchConfig, trials: int) -> tuple[Needs, int]:
    """What a worker takes, and how many trials run at once. Raises ConfigError where not even one fits in."""
    import ray

    gpus = settings.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    if settings.workers > 1 and 0 < gpus < 1:
        raise ConfigError("search.gpus: the workers of one trial need a GPU each; set it to 1, or search.workers to 1")
    needs = {"CPU": float(settings.cpus), "GPU": float(gpus)}
    places, largest = capacity(needs)
    if places < settings.workers:
        raise ConfigError(
            f"search.workers, cpus, gpus: a trial wants {settings.workers} x ({settings.cpus} CPU, {gpus:g} GPU) and "
            f"there is room for {places}; the largest machine has {largest}"
        )
    return needs, max(1, min(places // settings.workers, trials, settings.concurrent or trials))


def _spread(settings: SearchConfig) -> str:
    return f", {settings.workers} workers each" if settings.workers > 1 else ""


def _trainable(run: SearchRun, needs: Needs, settings_of: Callable[[int, Mapping[str, Any]], dict[str, Any]]) -> Any:
    """The function that Ray Tune calls for a trial, in the trial's process, with what it takes of a machine."""
    from ray import tune

    settings, experiment, model, root = run.search, run.experiment, run.model, run.search_folder.resolve()
    here, epochs = os.getcwd(), run.epochs

    def trainable(sampled: dict[str, Any]) -> None:
        name = Path(tune.get_context().get_trial_dir()).name
        found = re.match(r"trial-(\d+)(?:-seed-(\d+))?", name)
        assert found, name
        number, seed = int(found[1]), int(found[2] or 0)
        trial = Trial(number, settings_of(number, sampled), seed)
        folder = root / trial_name(number, seed)

        def train(report: Callable[[dict[str, Any]], None], leader: Path | None = None) -> None:
            import torch

            os.chdir(here)
            torch.set_num_threads(settings.cpus)
            run_trial(trial, experiment, model, settings.folds, folder, report, leader)

        def report_with_checkpoint(scores: dict[str, Any]) -> None:
            epoch = scores["epoch"]
            if epoch < last_checkpoint(folder):
                return  # told before the trial was paused, and its folder is no longer that of this epoch
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
                raise  # and Ray tries it again

    if settings.workers > 1:
        # Its workers take the cores; the trial itself only waits for them. Ray wants it to take something.
        return tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 2.0**20}]))
    return tune.with_resources(trainable, tune.PlacementGroupFactory([{k: v for k, v in needs.items() if v}]))


def _train_on_workers(
    settings: SearchConfig, needs: Needs, timeout: float, folder: Path, train: Callable[..., None]
) -> None:
    """Call `train` on all workers of a trial, which Ray Train joins; it ends them all where one of them fails, and Ray
    Tune, where it ends the trial.
    """
    from ray import train as ray_train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    def worker() -> None:
        from triderm_dist.distributed.out_of_memory import SUPERVISED

        os.environ[SUPERVISED] = "ray"
        train(ray_train.report)

    told: Any = TuneReportCallback()  # Ray's own annotations do not know it for a callback
    trainer = TorchTrainer(
        worker,
        torch_config=TorchConfig(backend="nccl" if needs["GPU"] else "gloo", timeout_s=int(timeout)),
        scaling_config=ray_train.ScalingConfig(
            num_workers=settings.workers, use_gpu=needs["GPU"] > 0, resources_per_worker=needs
        ),
        run_config=ray_train.RunConfig(
            name=folder.name, storage_path=str(folder.parent / "ray-workers"), callbacks=[told]
        ),
    )
    trainer.fit()


def _run_config(run: SearchRun, name: str, name_of: Callable[[Any], str], trials: int) -> Any:
    from ray import tune

    root = run.search_folder.resolve()
    return tune.RunConfig(
        name=name,
        storage_path=str(root),
        verbose=0,
        callbacks=[_told_by(root, name_of, trials, run.epochs)],
        failure_config=tune.FailureConfig(max_failures=run.search.retries),
        # Ray's own advice for a population: others may still be on their way from an older one.
        checkpoint_config=tune.CheckpointConfig(num_to_keep=4),
    )


def _searcher(settings: SearchConfig, space: Space, own: Mapping[str, Any]) -> Any:
    """What draws the settings of a trial; the first trial has the experiment's own."""
    if settings.scheduler == "pbt":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(points_to_evaluate=[dict(own)], random_state=settings.seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if settings.searcher == "tpe":
        # A third of the trials at random, then by model: the default, 10, is most of a short search.
        sampler: Any = optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=max(4, settings.trials // 3))
    else:
        sampler = optuna.samplers.RandomSampler(seed=settings.seed)
    return OptunaSearch(
        {key: domain.distribution() for key, domain in space.items()},
        metric="macro_f1", mode="max", points_to_evaluate=[dict(own)], sampler=sampler,
    )  # fmt: skip


def _scheduler(run: SearchRun, space: Space) -> Any:
    """What stops trials or lets them follow others; never the baseline, against which every gain is measured."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining

    settings, epochs = run.search, run.epochs

    class Asha(ASHAScheduler):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            action = super().on_trial_result(tune_controller, trial, result)
            return self.CONTINUE if _number(trial, settings) == BASELINE and action == self.STOP else action

    class Population(PopulationBasedTraining):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if result["epoch"] >= epochs:  # nothing is left to train
                return self.CONTINUE
            return super().on_trial_result(tune_controller, trial, result)

        def _quantiles(self) -> tuple[list[Any], list[Any]]:
            lower, upper = super()._quantiles()
            return [trial for trial in lower if _number(trial, settings) != BASELINE], upper

        def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
            super()._exploit(tune_controller, trial, trial_to_clone)
            numbers = [_number(one, settings) for one in (trial, trial_to_clone)]
            print("trial {} goes on from trial {}".format(*numbers), describe(trial.config), sep="  ", flush=True)

    if settings.scheduler == "asha":
        return Asha(time_attr="epoch", max_t=epochs + 1, grace_period=settings.grace_epochs, reduction_factor=REDUCTION)
    if settings.scheduler == "none":
        return FIFOScheduler()
    random.seed(settings.seed)  # from which Ray draws who follows whom, and how settings change
    return Population(
        time_attr="epoch",
        perturbation_interval=settings.exploit_epochs,
        synch=True,  # all wait for the last: else who follows whom would hang on which process was faster
        hyperparam_mutations={
            key: list(domain.values) if domain.kind == "choice" else _ray_domain(domain)
            for key, domain in space.items()
        },
        # Ray's factors of 0.8 and 1.2 may lead out of the space.
        custom_explore_fn=lambda config: {key: _tidy(space[key].clipped(value)) for key, value in config.items()},
        log_config=False,
    )


def _ray_domain(domain: Domain) -> Any:
    from ray import tune

    if domain.kind == "choice":
        return tune.choice(list(domain.values))
    low, high = domain.values
    if domain.kind == "randint":
        return tune.randint(low, high + 1)
    return tune.loguniform(low, high) if domain.kind == "loguniform" else tune.uniform(low, high)


def _number(trial: Any, settings: SearchConfig) -> int:
    """The number of a trial, from 1: Ray's count, which begins with 0 where no searcher draws."""
    count = int(re.split(r"[_@]", trial.experiment_tag)[0])
    return count + 1 if settings.scheduler == "pbt" else count


def _tidy(value: Any) -> Any:
    """Six digits are enough for a setting that people read and write."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _told_by(root: Path, name_of: Callable[[Any], str], trials: int, epochs: int) -> Any:
    """A Ray callback that says what happens, records how trials end, and drops the checkpoints of ended ones."""
    from ray.tune.progress_reporter import TrialProgressCallback

    class Told(TrialProgressCallback):  # in its place: Ray adds one that prints, unless there is one
        said = 0.0

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            known = read_trial(root / name_of(trial))
            if known and known.state == "running" and time.monotonic() - self.said > 20:
                self._say(known)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "stopped", "")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._end(trial, "failed", "its process died; out of memory?")

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            known = read_trial(root / name_of(trial))
            why = known.error if known and known.error else "its process died"
            print(f"{name_of(trial)} is tried again from its last checkpoint: {why}", flush=True)

        def _end(self, trial: Any, state: State, error: str) -> None:
            folder = root / name_of(trial)
            known = read_trial(folder)
            if known is None:  # it ended before it began
                number, _, seed = folder.name.removeprefix("trial-").partition("-seed-")
                known = Trial(int(number), dict(trial.config), int(seed or 0))
            if known.state == "running":
                known = replace(known, state=state, error=error)
                known.write(folder)
            if known.state != "failed":  # that one goes on from them after a resume
                for checkpoints in folder.glob("*/fold-*/checkpoints"):
                    shutil.rmtree(checkpoints, ignore_errors=True)
            self._say(known)

        def _say(self, known: Trial) -> None:
            self.said = time.monotonic()
            name = f"trial {known.number}" + (f" seed {known.seed}" if known.seed else f"/{trials}")
            score = "" if known.macro_f1 is None else f"  macro F1 {known.macro_f1:.3f}"
            line = f"{name}  epoch {known.epochs}/{epochs}{score}  {known.state}"
            print(f"{line}  {known.error or describe(known.settings)}", flush=True)

    return Told()
