"""Train the folds of a cross-validation in parallel, each by `run_folds` in its own process, scheduled by Ray."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from triderm_dist.config import CONFIG_FILE, Experiment, import_plugins, save
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed.ray_cluster import capacity, running_ray
from triderm_dist.engine.fold import check_task, is_fold_finished
from triderm_dist.engine.fold_folder import remove_obsolete_checkpoints
from triderm_dist.runtime.extras import require
from triderm_dist.runtime.signals import cleaning_up
from triderm_dist.runtime.terminal import clock, counted, wrapped
from triderm_dist.schema import ConfigError, InputError, one_line


def run_parallel_folds(
    experiment: Experiment,
    index: ShardIndex,
    models: Sequence[str],
    *,
    cpus: int,
    gpus: float | None,
    retries: int,
    address: str | None,
) -> None:
    """Train every fold of every model as `run_folds` does, as many at once as resources allow, skipping finished ones.

    cpus: cores and threads per fold. gpus: share of a GPU per fold; None takes one GPU where there are any. retries:
    how often a fold whose process died or failed is restarted from its last checkpoint; invalid input is not retried.
    address: of a Ray cluster; None starts Ray on this machine.

    Raises MissingPackage without Ray, ConfigError where no machine has the resources of one fold, InputError with the
    folds that failed finally, once all others are finished, KeyboardInterrupt after a request to stop, once all folds
    have saved. DataError where the run has folds of another task.
    """
    check_task(experiment, index)
    remaining = [(name, fold) for name in models for fold in range(experiment.data.folds)]
    for name, fold in remaining:
        remove_obsolete_checkpoints(experiment.fold_folder(name, fold))
    remaining = [(name, fold) for name, fold in remaining if not is_fold_finished(experiment, index, name, fold)]
    if not remaining:
        return
    require("parallel_folds", "ray")
    with running_ray(address, cpus, setting="address", forward=True):
        try:
            _schedule(experiment, remaining, cpus, gpus, retries)
        finally:
            time.sleep(0.5)  # until Ray has forwarded the last lines of the folds


def _schedule(
    experiment: Experiment, folds: Sequence[tuple[str, int]], cpus: int, gpus: float | None, retries: int
) -> None:
    """Compute what several folds share, tokens and thumbnails, then train the folds; Ray is running."""
    import ray

    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    fitting, largest = capacity({"CPU": cpus, "GPU": gpus})
    if not fitting:
        raise ConfigError(
            f"cpus={cpus}, gpus={gpus:g}: no machine has the resources of one fold; the largest has {largest}"
        )
    resources = f"{cpus} CPU" + (f", {gpus:g} GPU" if gpus else "")
    at_once = min(fitting, len(folds))
    print(wrapped(f"{counted(len(folds), 'fold')}, {at_once} at once, each on {resources}"), flush=True)

    shared = os.getcwd(), cpus, experiment
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    names = [name for name in experiment.models if name in dict(folds)]
    frozen = [name for name in names if experiment.models[name].tower.frozen]
    if frozen or experiment.data.extra_sets:
        task, prepare = "tokens of " + ", ".join(frozen) if frozen else "photos of extra sets", remote(_prepare)
        _run_tasks({task: partial(prepare.options(name=task).remote, *shared, names)}, retries)
    train = remote(_train)
    tasks = {f"{name} fold {fold}": (name, fold) for name, fold in folds}
    _run_tasks(
        {task: partial(train.options(name=task).remote, *shared, *fold) for task, fold in tasks.items()}, retries
    )


def _run_tasks(tasks: Mapping[str, Callable[[], Any]], retries: int) -> None:
    """Start all tasks and wait for them, restarting failed ones. Raises InputError with those that failed finally."""
    import ray

    running = {start(): name for name, start in tasks.items()}
    attempts, failed = Counter[str](), dict[str, str]()
    started, ended_folds = time.monotonic(), 0
    try:
        while running:
            ended, _ = ray.wait(list(running), timeout=1.0)  # Python handles signals between two waits
            for reference in ended:
                name = running.pop(reference)
                try:
                    ray.get(reference)
                    ended_folds += 1
                    _print_progress(ended_folds, len(tasks), time.monotonic() - started)
                except ray.exceptions.RayError as error:
                    attempts[name] += 1
                    reason, is_final = _failure(error)
                    if is_final or attempts[name] > retries:
                        failed[name] = reason
                        print(f"{name} failed: {reason}", flush=True)
                    else:
                        print(f"{name} failed, restarting it from its last checkpoint: {reason}", flush=True)
                        running[tasks[name]()] = name
    except KeyboardInterrupt:
        cleaning_up()
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running))
        raise
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        done = len(tasks) - len(failed)
        raise InputError(f"{reasons} ({done} of {len(tasks)} finished; rerun the same command to retry the others)")


def _print_progress(finished: int, total: int, seconds: float) -> None:
    """Print how many tasks are finished, and the time left if the others finish at the same rate."""
    if total > 1:
        left = f", about {clock(seconds / finished * (total - finished))} left" if finished < total else ""
        print(f"{finished} of {total} finished in {clock(seconds)}{left}", flush=True)


def _failure(error: Exception) -> tuple[str, bool]:
    """Return the reason of a failed task in one line, and whether a retry would fail too."""
    import ray

    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return "its process died, possibly out of memory", False
    cause = getattr(error, "cause", None) or error  # Ray wraps what the task raised
    if isinstance(cause, InputError):
        return one_line(cause), True
    return one_line(cause, with_type=True), False


# --- in the processes of the folds -----------------------------------------------------------------------------------


def _train(directory: str, cpus: int, experiment: Experiment, name: str, fold: int) -> None:
    """Train one fold."""
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.crossval import run_folds

    with _worker(directory, cpus, experiment):
        index = open_index(experiment.train_shards, experiment.data.remote)
        save_settings = partial(save, experiment, experiment.folder / CONFIG_FILE)
        run_folds(experiment, index, [name], [fold], on_start=save_settings, in_parallel=True)


def _prepare(directory: str, cpus: int, experiment: Experiment, names: Sequence[str]) -> None:
    """Compute what the folds of some models share."""
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.extra_sets import prepare

    with _worker(directory, cpus, experiment):
        prepare(experiment, open_index(experiment.train_shards, experiment.data.remote), names)


@contextmanager
def _worker(directory: str, cpus: int, experiment: Experiment) -> Iterator[None]:
    """Work in the command's directory with `cpus` threads and the plugins, and handle Ray's SIGINT as SIGTERM."""
    import torch

    os.chdir(directory)
    torch.set_num_threads(cpus)
    import_plugins(experiment.plugins)
    before = signal.signal(signal.SIGINT, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
