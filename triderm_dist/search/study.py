"""The search from its settings to its results: all is checked before Ray starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import yaml

from triderm_dist.cli import Interrupted
from triderm_dist.config import find_file, load, save
from triderm_dist.files import exclusive_lock
from triderm_dist.schema import ConfigError, InputError
from triderm_dist.search.results import Summary, conclude, outcome
from triderm_dist.search.settings import SearchRun
from triderm_dist.search.space import Space, fit_space, own_settings, read_space, refuse_fixed
from triderm_dist.search.trial import Trial, read_trials
from triderm_dist.search.tuner import run_repeats, run_trials, started

BATCH = "train.global_batch", "train.micro_batch"


def search(run: SearchRun, say: Callable[[str], None]) -> Summary:
    """Run the trials, on this machine or a Ray cluster, and write trials.csv and best.yaml. `say` gets progress.

    Raises ConfigError for settings or a space that can't be used, before any trial; Interrupted where it was stopped.
    """
    settings, experiment, model = run.search, run.experiment, run.model
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("triderm search starts its own processes: run it by triderm search, without a launcher")
    if model not in experiment.models:
        raise ConfigError(f"search.model={model}: the settings have the models {', '.join(experiment.models)}")
    folds = experiment.data.folds
    if len(set(settings.folds)) < len(settings.folds) or not all(0 <= fold < folds for fold in settings.folds):
        raise ConfigError(f"search.folds: each of 0 to {folds - 1} (data.folds is {folds}) may stand there once")
    _check_population(run)
    space, notes = fit_space(read_space(find_file("spaces", settings.space)), experiment, model, settings.space)
    if settings.scheduler == "pbt":
        refuse_fixed(space, experiment.models[model], settings.space)
    for note in notes:
        say(f"note: {note}")

    from triderm_dist.data.shards.open import open_index
    from triderm_dist.distributed.parallel import split_batch
    from triderm_dist.engine.views import prepare_tokens

    index = open_index(experiment.train_shards, experiment.data.remote, verify=experiment.data.verify)
    own = own_settings(experiment.models[model], BATCH)
    for total, micro in product(*(space[key].all_values() if key in space else [own[key]] for key in BATCH)):
        split_batch(total, micro, settings.workers)
    refusal = InputError(f"{run.search_folder}: another search is working here; wait for it or stop it")
    with exclusive_lock(run.search_folder / ".lock", refusal):
        _open_folder(run, space)
        prepare_tokens(experiment, index, model)  # once, so that the trials find them
        with started(settings):
            if not settings.resume or _ended(run) < settings.trials or _failed(run):
                run_trials(run, space, say)
            if _ended(run) == settings.trials:
                _drop_copies(run)
                baseline, best = outcome(read_trials(run.search_folder))
                if settings.seeds and baseline and best and best is not baseline:
                    run_repeats(run, [baseline, best], say)
        summary = conclude(run)
    if (ended := _ended(run)) < settings.trials:
        raise Interrupted(f"{ended} of {settings.trials} trials have ended; the same command with resume=true goes on")
    if summary.best is None:
        failed = next(iter(_failed(run)), None)
        raise InputError(
            f"{run.search_folder}: no trial came to its end; the first that failed said: "
            f"{failed.error if failed else 'nothing'}"
        )
    return summary


def _drop_copies(run: SearchRun) -> None:
    """Remove what only Ray needed to run trials on workers and to copy leading ones."""
    shutil.rmtree(run.search_folder / "ray-workers", ignore_errors=True)
    if not _failed(run):  # a failed one may go on from its copy after a resume
        for copy in run.search_folder.glob("ray/trial-*/checkpoint_*"):
            shutil.rmtree(copy, ignore_errors=True)


def _ended(run: SearchRun) -> int:
    return sum(trial.state != "running" for trial in read_trials(run.search_folder))


def _failed(run: SearchRun) -> list[Trial]:
    return [trial for trial in read_trials(run.search_folder) if trial.state == "failed"]


def _check_population(run: SearchRun) -> None:
    """Raise ConfigError for settings of a search that population-based training can't follow."""
    settings = run.search
    if settings.scheduler != "pbt":
        return
    if len(settings.folds) > 1:
        raise ConfigError("search.folds: pbt trains one fold, in whose course settings change; leave one, like [0]")
    if settings.workers > 1:
        raise ConfigError("search.workers: pbt trains a trial in one process; set it to 1, or use scheduler=asha")
    if settings.concurrent:
        raise ConfigError("search.concurrent: pbt gives all trials a turn; leave it null, search.cpus sets their share")
    if settings.trials < 3:
        raise ConfigError("search.trials: pbt wants the baseline and at least two more that follow one another")


def _open_folder(run: SearchRun, space: Space) -> None:
    """Begin OUTPUT/search, or check that the search there is the one that is asked for."""
    folder = run.search_folder
    record, written = folder / "search.yaml", folder / "space.yaml"
    if not run.search.resume:
        if any(trial.state != "failed" for trial in read_trials(folder)):
            raise ConfigError(f"{folder}: holds a search; go on with it by resume=true, or choose another output")
        for left in (folder / "ray", *folder.glob("trial-*")):  # by a search without a trial, or of failed ones only
            shutil.rmtree(left, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        tree = {key: {domain.kind: list(domain.values)} for key, domain in space.items()}
        written.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        save(run, record)
        return
    if not record.exists():
        raise ConfigError(f"{folder}: holds no search to go on with; leave resume=true away")
    before, now = (
        tree.model_dump(exclude={"search": {"resume", "address", "seeds"}}) for tree in (load(SearchRun, record), run)
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
