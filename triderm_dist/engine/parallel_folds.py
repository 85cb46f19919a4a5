"""Train the folds of a cross-validation in parallel, each by `run_folds` in a process of its own.

`run_local_folds` starts the processes on this machine; `engine.ray_folds` lets Ray start them, on GPUs and clusters.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from triderm_dist.cli import Interrupted
from triderm_dist.config import CONFIG_FILE, Experiment, import_plugins, save
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.threads import openmp_threads
from triderm_dist.engine.fold import check_run_task, is_fold_finished
from triderm_dist.engine.fold_folder import remove_obsolete_checkpoints
from triderm_dist.runtime.child_processes import ChildProcesses, Failure
from triderm_dist.runtime.memory import available_memory
from triderm_dist.runtime.signals import cleaning_up, end_at_once, on_second_request
from triderm_dist.runtime.terminal import clock, counted, wrapped
from triderm_dist.schema import InputError

Fold = tuple[str, int]
"""The name of a model, and the number of a fold."""
PROCESS_BYTES = 1 << 29
"""Memory of a process in addition to its training: imports that it does not share, decoded photos."""
ENOUGH_BYTES = 8 << 30
"""With this much memory per process, the need of a training is not estimated, which would take seconds."""


class Pool(Protocol):
    """Runs named tasks in processes."""

    def start(self, name: str) -> None:
        """Start or queue a task."""

    def ended(self) -> list[tuple[str, Failure | None]]:
        """Wait for about a second at most; return (task, failure or None) of those that have ended."""

    def stop(self) -> None:
        """Stop all tasks, and wait until they have saved their state."""


def run_local_folds(
    experiment: Experiment, index: ShardIndex, models: Sequence[str], *, cpus: int | None, retries: int
) -> None:
    """Train every fold of every model on the CPUs of this machine, as many at once as cores and memory allow.

    cpus: threads per fold; None divides the cores by the number of all trainings of the experiment, at least 1. It is
    independent of the number of remaining trainings, so that a resumed run gives the same numbers.
    retries: how often a fold whose process died or failed is restarted from its last checkpoint; invalid input is not
    retried.

    Raises as `run_tasks`; DataError if the run has folds of another task.
    """
    folds = remaining_folds(experiment, index, models)
    if not folds:
        return
    cores = openmp_threads()
    cpus = cpus or max(1, cores // (len(experiment.models) * experiment.data.folds))
    names = list(dict.fromkeys(name for name, _ in folds))
    shared = os.getcwd(), experiment
    if task := preparation_name(experiment, names):
        run_tasks(ChildProcesses({task: (_stoppable, (prepare_folds, *shared, cores, names))}, 1), [task], retries)

    def memory_per_fold() -> float:
        estimate = ChildProcesses({"memory": (_memory_per_fold, (*shared, cpus, names))}, 1)
        run_tasks(estimate, ["memory"], retries)
        return float(estimate.results["memory"])

    at_once = processes_that_fit(min(cores // cpus, len(folds)), available_memory(), memory_per_fold)
    print(wrapped(f"{counted(len(folds), 'fold')}, {at_once} at once, each on {counted(cpus, 'thread')}"), flush=True)
    first = {name: next(fold for fold in folds if fold[0] == name) for name in names}
    tasks = {
        fold_title(fold): (_stoppable, (train_fold, *shared, cpus, *fold, fold != first[fold[0]])) for fold in folds
    }
    processes = ChildProcesses(tasks, at_once)

    def end_all_at_once() -> None:
        processes.kill()
        end_at_once()

    with on_second_request(end_all_at_once):
        run_tasks(processes, list(tasks), retries)


def processes_that_fit(processes: int, memory: int | None, need: Callable[[], float]) -> int:
    """Return how many of `processes`, at least one, fit into `memory` bytes; all of them if `memory` is None.

    need: returns the bytes of one; not called if there is plenty (`ENOUGH_BYTES`).
    """
    if memory is not None and memory < processes * ENOUGH_BYTES:
        processes = min(processes, int(memory // need()))
    return max(1, processes)


def remaining_folds(experiment: Experiment, index: ShardIndex, models: Sequence[str]) -> list[Fold]:
    """Return the folds that are not finished. Raises DataError if the run has folds of another task."""
    check_run_task(experiment, index)
    folds = [(name, fold) for name in models for fold in range(experiment.data.folds)]
    for name, fold in folds:
        remove_obsolete_checkpoints(experiment.fold_folder(name, fold))
    return [(name, fold) for name, fold in folds if not is_fold_finished(experiment, index, name, fold)]


def fold_title(fold: Fold) -> str:
    """Return the name of a fold as a task."""
    return f"{fold[0]} fold {fold[1]}"


def preparation_name(experiment: Experiment, models: Sequence[str]) -> str | None:
    """Return the name of the task that computes what folds of these models share; None if they share nothing."""
    if cached := [name for name in models if experiment.models[name].tower.cached]:
        return "tokens of " + ", ".join(cached)
    return "photos of extra sets" if experiment.data.extra_sets else None


def run_tasks(pool: Pool, names: Sequence[str], retries: int) -> None:
    """Run all tasks, restarting failed ones.

    Raises InputError that names tasks without retries left, after all others are finished; KeyboardInterrupt after a
    request to stop, when all tasks have saved.
    """
    running, attempts, failed = set(names), Counter[str](), dict[str, str]()
    started, finished = time.monotonic(), 0
    try:
        for name in names:
            pool.start(name)
        while running:
            for name, failure in pool.ended():
                running.discard(name)
                if failure is None:
                    finished += 1
                    _print_progress(finished, len(names), time.monotonic() - started)
                    continue
                attempts[name] += 1
                if failure.is_final or attempts[name] > retries:
                    failed[name] = failure.reason
                    print(f"{name} failed: {failure.reason}", flush=True)
                else:
                    print(f"{name} failed, restarting it from its last checkpoint: {failure.reason}", flush=True)
                    running.add(name)
                    pool.start(name)
    except BaseException:
        cleaning_up()
        pool.stop()
        raise
    if failed:
        raise InputError(_failures(failed, len(names)))


def _failures(failed: Mapping[str, str], total: int) -> str:
    """Return one line with the tasks that failed and the reasons, each reason once."""
    tasks: dict[str, list[str]] = {}
    for name, reason in failed.items():
        tasks.setdefault(reason, []).append(name)
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in tasks.items())
    return f"{reasons} ({total - len(failed)} of {total} finished; rerun the same command to retry the others)"


def _print_progress(finished: int, total: int, seconds: float) -> None:
    """Print the number of finished tasks, and the remaining time at the same rate."""
    if total > 1:
        left = f", about {clock(seconds / finished * (total - finished))} left" if finished < total else ""
        print(f"{finished} of {total} finished in {clock(seconds)}{left}", flush=True)


# --- in the processes of the folds -----------------------------------------------------------------------------------


def train_fold(directory: str, experiment: Experiment, threads: int, name: str, fold: int, brief: bool = False) -> None:
    """Train one fold. brief: see `run_folds`."""
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.crossval import run_folds

    _set_up(directory, experiment, threads)
    index = open_index(experiment.train_shards, experiment.data.remote)
    save_settings = partial(save, experiment, experiment.folder / CONFIG_FILE)
    run_folds(experiment, index, [name], [fold], on_start=save_settings, in_parallel=True, brief=brief)


def prepare_folds(directory: str, experiment: Experiment, threads: int, names: Sequence[str]) -> None:
    """Compute what the folds of some models share."""
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.extra_sets import prepare_trainings

    _set_up(directory, experiment, threads)
    prepare_trainings(experiment, open_index(experiment.train_shards, experiment.data.remote), names)


def _memory_per_fold(directory: str, experiment: Experiment, threads: int, names: Sequence[str]) -> float:
    """Return the bytes that the process of a fold needs, for the model that needs most."""
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.monitoring.memory_estimate import estimate_model_memory

    _set_up(directory, experiment, threads)
    signature = open_index(experiment.train_shards, experiment.data.remote).signature
    models = [experiment.models[name] for name in names]
    estimates = [(estimate_model_memory(model, signature, False)[0], model.train.micro_batch) for model in models]
    return PROCESS_BYTES + max(estimate.total(micro_batch) for estimate, micro_batch in estimates)


def _stoppable(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function that raises Interrupted after it has saved, and raise KeyboardInterrupt instead."""
    try:
        function(*arguments)
    except Interrupted:
        raise KeyboardInterrupt from None


def _set_up(directory: str, experiment: Experiment, threads: int) -> None:
    """Work in the command's directory with `threads` threads and the plugins."""
    import torch

    os.chdir(directory)
    torch.set_num_threads(threads)
    import_plugins(experiment.plugins)
