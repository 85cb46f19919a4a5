"""Train the folds of a cross-validation in parallel, in processes that Ray schedules on GPUs or a cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from triderm_dist.config import Experiment
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed.ray_cluster import cluster_capacity, running_ray
from triderm_dist.engine.parallel_folds import (
    Fold,
    fold_title,
    preparation_name,
    prepare_folds,
    remaining_folds,
    run_tasks,
    train_fold,
)
from triderm_dist.runtime.child_processes import Failure
from triderm_dist.runtime.extras import require
from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.terminal import counted, wrapped
from triderm_dist.schema import ConfigError, InputError


def run_ray_folds(
    experiment: Experiment,
    index: ShardIndex,
    models: Sequence[str],
    *,
    cpus: int | None,
    gpus: float | None,
    retries: int,
    address: str | None,
) -> None:
    """Train every fold of every model as `run_folds` does, as many at once as resources allow, skipping finished ones.

    cpus: cores and threads per fold; None is 1.  gpus: share of a GPU per fold; None is one GPU if there are any.
    retries: see `run_local_folds`.  address: of a Ray cluster; None starts Ray on this machine.

    Raises MissingPackage without Ray, ConfigError if no machine has the resources of one fold; otherwise as
    `run_local_folds`.
    """
    folds = remaining_folds(experiment, index, models)
    if not folds:
        return
    require("parallel_folds", "ray")
    with running_ray(address, cpus or 1, setting="address", forward=True):
        try:
            _schedule(experiment, folds, cpus or 1, gpus, retries)
        finally:
            time.sleep(0.5)  # until Ray has forwarded the last lines of the folds


def _schedule(experiment: Experiment, folds: Sequence[Fold], cpus: int, gpus: float | None, retries: int) -> None:
    """Compute the tokens and thumbnails that folds share, then train the folds; Ray is running."""
    import ray

    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    fitting, largest = cluster_capacity({"CPU": cpus, "GPU": gpus})
    if not fitting:
        raise ConfigError(
            f"cpus={cpus}, gpus={gpus:g}: no machine has the resources of one fold; the largest has {largest}"
        )
    resources = f"{cpus} CPU" + (f", {gpus:g} GPU" if gpus else "")
    at_once = min(fitting, len(folds))
    print(wrapped(f"{counted(len(folds), 'fold')}, {at_once} at once, each on {resources}"), flush=True)

    shared = os.getcwd(), experiment, cpus
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_call)
    names = [name for name in experiment.models if name in dict(folds)]
    if task := preparation_name(experiment, names):
        pool = RayTasks({task: partial(remote.options(name=task).remote, prepare_folds, *shared, names)})
        run_tasks(pool, [task], retries)
    tasks = {
        fold_title(fold): partial(remote.options(name=fold_title(fold)).remote, train_fold, *shared, *fold)
        for fold in folds
    }
    run_tasks(RayTasks(tasks), list(tasks), retries)


class RayTasks:
    """A `Pool` of Ray tasks; Ray runs as many at once as resources allow. tasks: functions that submit them."""

    def __init__(self, tasks: Mapping[str, Callable[[], Any]]) -> None:
        self._tasks, self._running = tasks, dict[Any, str]()

    def start(self, name: str) -> None:
        self._running[self._tasks[name]()] = name

    def ended(self) -> list[tuple[str, Failure | None]]:
        import ray

        references, _ = ray.wait(list(self._running), timeout=1.0)  # Python handles signals between two waits
        return [(self._running.pop(reference), self._failure(reference)) for reference in references]

    def stop(self) -> None:
        import ray

        for reference in self._running:
            ray.cancel(reference)
        if self._running:
            ray.wait(list(self._running), num_returns=len(self._running))

    @staticmethod
    def _failure(reference: Any) -> Failure | None:
        """Return the failure of an ended task; None if it succeeded."""
        import ray

        try:
            ray.get(reference)
            return None
        except ray.exceptions.WorkerCrashedError:
            return Failure("its process died, possibly out of memory")
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error  # Ray wraps what the task raised
            if isinstance(cause, InputError):
                return Failure(one_line(cause), is_final=True)
            return Failure(one_line(cause, with_type=True))


def _call(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of Ray."""
    with _sigint_as_sigterm():
        function(*arguments)


@contextmanager
def _sigint_as_sigterm() -> Iterator[None]:
    """Handle SIGINT, with which Ray cancels a task, as SIGTERM."""
    before = signal.signal(signal.SIGINT, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
