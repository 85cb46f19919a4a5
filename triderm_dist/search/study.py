"""Run a search: check all settings before Ray starts, run its trials, and summarize them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import yaml

from triderm_dist.cli import Interrupted
from triderm_dist.config import absolute_path, find_file, load, map_paths, save
from triderm_dist.files import exclusive_lock, write_text
from triderm_dist.runtime.extras import require
from triderm_dist.schema import ConfigError, InputError
from triderm_dist.search import pbt
from triderm_dist.search.results import Summary, baseline_and_best, summarize
from triderm_dist.search.settings import SearchRun
from triderm_dist.search.space import Space, fit_space, own_settings, read_space
from triderm_dist.search.trial import Trial, read_trials
from triderm_dist.search.tuner import ray_session, run_repeats, run_trials
from triderm_dist.settings import flatten

BATCH_SETTINGS = "train.global_batch", "train.micro_batch"


def search(run: SearchRun, log: Callable[[str], None]) -> Summary:
    """Run the trials, on this machine or a Ray cluster, and write trials.csv and best.yaml.

    log: is called with each line of progress.

    Raises MissingPackage without Ray or Optuna, and ConfigError for unusable settings or spaces, before any trial;
    Interrupted if the search was stopped.
    """
    settings, experiment = run.search, run.experiment
    require("triderm search", "ray", "optuna", "sklearn")
    _check_settings(run)
    space = _read_space(run, log)

    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.extra_sets import open_extra_sets, prepare_trainings

    index = open_index(experiment.train_shards, experiment.data.remote, verify=experiment.data.verify)
    open_extra_sets(experiment, index, verify=experiment.data.verify)  # raises for a wrong map before any work
    _check_batches(run, space)
    refusal = f"{run.search_folder}: another search is running in this folder; wait for it or stop it"
    with exclusive_lock(run.search_folder / ".lock", refusal):
        _open_folder(run, space)
        prepare_trainings(experiment, index, [run.model])  # once, for all trials
        waiting = 0
        with ray_session(settings):
            if not settings.resume or _ended(run) < settings.trials or _failed(run):
                run_trials(run, space, log)
            if _ended(run) == settings.trials:
                _remove_temporary_files(run)
                baseline, best = baseline_and_best(read_trials(run.search_folder))
                if settings.seeds and baseline and best and best is not baseline:
                    waiting = run_repeats(run, [baseline, best], log)
        summary = summarize(run)
    if (ended := _ended(run)) < settings.trials:
        raise Interrupted(f"{ended} of {settings.trials} trials have ended; rerun the same command with resume=true")
    if waiting:
        raise Interrupted(
            f"{waiting} trainings with other seeds have not ended; rerun the same command with resume=true"
        )
    if summary.best is None:
        failed = next(iter(_failed(run)), None)
        raise InputError(
            f"{run.search_folder}: no trial completed; the error of the first that failed: "
            f"{failed.error if failed else 'none'}"
        )
    return summary


def _check_settings(run: SearchRun) -> None:
    """Raise ConfigError for settings that cannot work."""
    settings, experiment, model = run.search, run.experiment, run.model
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("triderm search starts its own processes; run it without a launcher")
    if model not in experiment.models:
        raise ConfigError(f"search.model={model}: the settings have the models {', '.join(experiment.models)}")
    folds = experiment.data.folds
    if len(set(settings.folds)) < len(settings.folds) or not all(0 <= fold < folds for fold in settings.folds):
        raise ConfigError(f"search.folds: list folds from 0 to {folds - 1} (data.folds is {folds}), each once")
    if settings.scheduler == "asha" and settings.grace_epochs > run.epochs:
        raise ConfigError(
            f"search.grace_epochs={settings.grace_epochs}: a trial has {run.epochs} epochs; set it to fewer, or use "
            "scheduler=none"
        )
    if settings.scheduler == "pbt":
        pbt.check_search(run)


def _read_space(run: SearchRun, log: Callable[[str], None]) -> Space:
    """Read the space, fit it to the experiment and log what that changed. Raises ConfigError for an unusable space."""
    settings, experiment, model = run.search, run.experiment, run.model
    space, notes = fit_space(read_space(find_file("spaces", settings.space)), experiment, model, settings.space)
    if settings.scheduler == "pbt":
        pbt.check_space(space, experiment.models[model], settings.space)
    for note in notes:
        log(f"note: {note}")
    return space


def _check_batches(run: SearchRun, space: Space) -> None:
    """Raise ConfigError for a global batch of the space that the ranks of a trial cannot divide."""
    from triderm_dist.distributed.parallel import split_batch

    own = own_settings(run.experiment.models[run.model], BATCH_SETTINGS)
    for total, micro in product(*(space[key].all_values() if key in space else [own[key]] for key in BATCH_SETTINGS)):
        split_batch(total, micro, run.search.workers)


def _remove_temporary_files(run: SearchRun) -> None:
    """Remove files that Ray needs during the search only: its workers' files and its copies of checkpoints."""
    shutil.rmtree(run.search_folder / "ray-workers", ignore_errors=True)
    if not _failed(run):  # a failed trial may resume from its copy
        for copy in run.search_folder.glob("ray/trial-*/checkpoint_*"):
            shutil.rmtree(copy, ignore_errors=True)


def _ended(run: SearchRun) -> int:
    return sum(trial.state != "running" for trial in read_trials(run.search_folder))


def _failed(run: SearchRun) -> list[Trial]:
    return [trial for trial in read_trials(run.search_folder) if trial.state == "failed"]


def _open_folder(run: SearchRun, space: Space) -> None:
    """Create OUTPUT/search, or with resume=true check that the search in it has the same settings."""
    folder = run.search_folder
    settings_file, space_file = folder / "search.yaml", folder / "space.yaml"
    if not run.search.resume:
        if any(trial.state != "failed" for trial in read_trials(folder)):
            raise ConfigError(f"{folder}: holds a search; add resume=true to resume it, or set another output")
        # Of a search without trials, or with failed ones only.
        for leftover in (folder / "ray", *folder.glob("trial-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        tree = {key: {domain.kind: list(domain.values)} for key, domain in space.items()}
        write_text(space_file, yaml.safe_dump(tree, sort_keys=False))
        save(run, settings_file)
        return
    if not settings_file.exists():
        raise ConfigError(f"{folder}: holds no search to resume; remove resume=true")
    ignored = {"space", "resume", "address", "seeds"}  # spaces are compared below, by content
    both = (load(SearchRun, settings_file), run)
    before, now = (
        map_paths(each.model_dump(exclude={"output": True, "search": ignored}), absolute_path) for each in both
    )
    if key := _first_difference(before, now):
        raise ConfigError(f"{key}: differs from the search in {folder}; resume with its settings, see {settings_file}")
    if read_space(space_file) != space:
        raise ConfigError(f"{run.search.space}: differs from {space_file}, the space that the search was started with")


def _first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    first, second = flatten(one), flatten(other)
    return next((key for key in {**first, **second} if first.get(key) != second.get(key)), None)
