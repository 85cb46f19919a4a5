"""Folds of a cross-validation side by side, each trained by `run_folds` in a process that Ray gives its share of a
machine.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from triderm_dist.config import Experiment, save
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed.ray_cluster import room, running_ray
from triderm_dist.engine.fold import is_done
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
    """Train every fold of every model as `run_folds` does, as many at once as fit in, skipping what is done.

    cpus: cores and threads of a fold. gpus: its share of a GPU; None takes one where there are GPUs. retries: how often
    a fold whose process died or failed goes on from its last checkpoint; not for bad input, which stays bad.
    Raises ConfigError where not even one fold fits in, InputError naming the folds that failed for good when all
    others are finished, KeyboardInterrupt where it was asked to stop: then all folds have saved.
    """
    todo = [(name, fold) for name in models for fold in range(experiment.data.folds)]
    todo = [(name, fold) for name, fold in todo if not is_done(experiment, index, name, fold)]
    if not todo:
        return
    with running_ray(address, cpus, setting="address", forward=True):
        try:
            _schedule(experiment, todo, cpus, gpus, retries)
        finally:
            time.sleep(0.5)  # until the last lines of the folds are here


def _schedule(
    experiment: Experiment, todo: Sequence[tuple[str, int]], cpus: int, gpus: float | None, retries: int
) -> None:
    """Tokens of frozen towers, so that folds find them, then the folds; Ray is started."""
    import ray

    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    places, largest = room({"CPU": cpus, "GPU": gpus})
    if not places:
        raise ConfigError(
            f"cpus={cpus}, gpus={gpus:g}: a fold wants more than any machine has; the largest has {largest}"
        )
    share = f"{cpus} CPU" + (f", {gpus:g} GPU" if gpus else "")
    print(f"{len(todo)} folds, {min(places, len(todo))} at once, each on {share}", flush=True)

    shared = os.getcwd(), cpus, experiment
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    if frozen := [name for name in experiment.models if name in dict(todo) and experiment.models[name].tower.frozen]:
        name, prepare = "tokens of " + ", ".join(frozen), remote(_prepare_tokens)
        _finish({name: partial(prepare.options(name=name).remote, *shared, frozen)}, retries)
    train = remote(_train)
    names = {f"{name} fold {fold}": (name, fold) for name, fold in todo}
    _finish({name: partial(train.options(name=name).remote, *shared, *pair) for name, pair in names.items()}, retries)


def _finish(tasks: Mapping[str, Callable[[], Any]], retries: int) -> None:
    """Start tasks and wait for all of them, some again. Raises InputError naming those that failed for good."""
    import ray

    running = {start(): name for name, start in tasks.items()}
    tried, failed = Counter[str](), dict[str, str]()
    try:
        while running:
            ended, _ = ray.wait(list(running), timeout=1.0)  # signals are looked at in between
            for reference in ended:
                name = running.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    tried[name] += 1
                    why, hopeless = _cause(error)
                    if hopeless or tried[name] > retries:
                        failed[name] = why
                        print(f"{name} failed: {why}", flush=True)
                    else:
                        print(f"{name} is tried again from its last checkpoint: {why}", flush=True)
                        running[tasks[name]()] = name
    except KeyboardInterrupt:
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running))
        raise
    if failed:
        whys = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise InputError(f"{whys} ({len(tasks) - len(failed)} of {len(tasks)} done, the same command tries the rest)")


def _cause(error: Exception) -> tuple[str, bool]:
    """Why a task failed, in one line, and whether it would fail again."""
    import ray

    if isinstance(error, ray.exceptions.WorkerCrashedError):
        return "its process died; out of memory?", False
    cause = getattr(error, "cause", None) or error  # what a task raised comes wrapped
    bad_input = isinstance(cause, InputError)
    return one_line(cause, with_type=not bad_input), bad_input


# --- in the processes of the folds -----------------------------------------------------------------------------------


def _train(here: str, cpus: int, experiment: Experiment, name: str, fold: int) -> None:
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.crossval import run_folds

    with _as_worker(here, cpus):
        index = open_index(experiment.train_shards, experiment.data.remote)
        keep = partial(save, experiment, experiment.folder / "config.yaml")
        run_folds(experiment, index, [name], [fold], on_start=keep)


def _prepare_tokens(here: str, cpus: int, experiment: Experiment, names: Sequence[str]) -> None:
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.views import prepare_tokens

    with _as_worker(here, cpus):
        index = open_index(experiment.train_shards, experiment.data.remote)
        for name in names:
            prepare_tokens(experiment, index, name)


@contextmanager
def _as_worker(here: str, cpus: int) -> Iterator[None]:
    """In the folder of the command, with that many threads; what Ray cancels by SIGINT stops as by SIGTERM."""
    import torch

    os.chdir(here)
    torch.set_num_threads(cpus)
    before = signal.signal(signal.SIGINT, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
