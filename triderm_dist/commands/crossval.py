"""Train all folds of all models, then gather their held-out predictions in oof.parquet.

triderm crossval --config EXPERIMENT.yaml

Without a GPU, folds are trained in parallel on the cores; with one, fold after fold. In parallel on GPUs, each fold on
half of one:

triderm crossval --config EXPERIMENT.yaml parallel_folds=true gpus=0.5

Fold after fold, each on all ranks:

triderm ranks --config_file ddp -m crossval --config EXPERIMENT.yaml
accelerate launch --config_file accelerate_configs/ddp.yaml -m triderm_dist.commands.crossval --config EXPERIMENT.yaml
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import CONFIG_FILE, PARALLEL_FOLDS_KEYS, TRAINING, ParallelFoldsRun, save
from triderm_dist.environment import record_data
from triderm_dist.runtime.child_processes import start_server
from triderm_dist.runtime.terminal import counted, wrapped

if TYPE_CHECKING:
    from triderm_dist.data.shards.index import ShardIndex

IMPORTED_BY_FOLDS = ("triderm_dist.engine.crossval", "triderm_dist.engine.extra_sets", "timm", "torchvision")
"""Modules that take seconds to import; processes of folds are forks of one that has imported them."""

GPU_FILES = ("/dev/nvidia*", "/dev/kfd", "/dev/dxg")
"""Devices of NVIDIA, AMD and Windows under Linux; only where one is there, PyTorch is asked whether it can use it."""


class CrossvalRun(ParallelFoldsRun):
    uses = TRAINING

    only: tuple[str, ...] | None = Field(None, description="train these models only; null trains all of `models`")

    @property
    def is_stage(self) -> bool:
        return True


def main(config: CrossvalRun) -> None:
    in_processes = config.parallel_folds == "auto" and trains_in_processes()
    if in_processes:
        start_server(IMPORTED_BY_FOLDS)  # first: it imports while this process does
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.distributed.collectives import is_main
    from triderm_dist.doctor.preflight import check_disk, check_training, lesions_of
    from triderm_dist.engine.crossval import run_folds
    from triderm_dist.engine.extra_sets import open_extra_sets
    from triderm_dist.engine.fold import data_facts, model_config
    from triderm_dist.engine.parallel_folds import run_local_folds
    from triderm_dist.engine.ray_folds import run_ray_folds
    from triderm_dist.schema import ConfigError

    if config.parallel_folds is True and "WORLD_SIZE" in os.environ:
        raise ConfigError("parallel_folds: starts its own processes; run `triderm crossval` without accelerate launch")
    names = config.only or tuple(config.models)
    for name in names:
        model_config(config, name)
    verify = config.data.verify and is_main()
    index = open_index(config.train_shards, config.data.remote, verify=verify)
    open_extra_sets(config, index, verify=verify)  # refuses a wrong map before anything is done
    experiment = config.experiment
    check_training(experiment, lesions_of(index))
    for note in check_disk(experiment, index) if is_main() else ():
        print(wrapped(f"note: {note}"))
    if config.parallel_folds is True:
        run_ray_folds(experiment, index, names, **{key: getattr(config, key) for key in PARALLEL_FOLDS_KEYS})
    elif in_processes:
        run_local_folds(experiment, index, names, cpus=config.cpus, retries=config.retries)
    else:
        save_config = partial(save, experiment, config.folder / CONFIG_FILE)
        run_folds(experiment, index, names, range(config.data.folds), on_start=save_config)
    if is_main():
        save(experiment, config.folder / CONFIG_FILE)
        record_data(config.folder, "train", data_facts(experiment, index))
        print_results(config, names)
        gather_oof(config, index)


def print_results(config: CrossvalRun, names: Sequence[str]) -> None:
    """Print the scores of the folds of some models, and send them to the trackers."""
    from triderm_dist.engine.fold_results import LOGGED, fold_results, fold_table
    from triderm_dist.monitoring.tracking import log_scores

    results = fold_results(config.experiment, names, range(config.data.folds))
    print(fold_table(results))
    scores = {f"{each.model}/fold {each.fold}/{key}": getattr(each, key) for each in results for key in LOGGED}
    log_scores(config.folder, scores, config.train)


def gather_oof(config: CrossvalRun, index: ShardIndex) -> None:
    """Gather the held-out predictions of all models in oof.parquet, if all are trained."""
    from triderm_dist.engine.fold import assigned_folds
    from triderm_dist.predictions import DataSplit, find_predictions, write_gathered

    if missing := [name for name in config.models if not find_predictions(config.folder, [name])]:
        print(wrapped(f"oof.parquet is written when {', '.join(missing)} is trained too"))
        return
    path, folds = config.folder / "oof.parquet", assigned_folds(index, config.data)
    data = DataSplit(index.lesion_ids, index.labels, folds, index.task)
    write_gathered(path, config.folder, tuple(config.models), data)
    print(wrapped(f"{counted(len(index), 'lesion')} by {counted(len(config.models), 'model')} in {path}"))


def trains_in_processes() -> bool:
    """Return whether folds are trained in processes of this machine where nothing else is asked for: without a GPU, on
    several cores, in a process that is not a rank.
    """
    from triderm_dist.data.threads import openmp_threads

    if os.name == "nt" or "WORLD_SIZE" in os.environ or openmp_threads() == 1:
        return False
    if not any(glob.glob(pattern) for pattern in GPU_FILES):
        return True
    import torch

    return not torch.cuda.is_available()


def start() -> None:
    run(CrossvalRun, main, __doc__, users=programs_using, on_ranks=lambda config: config.parallel_folds is not True)


if __name__ == "__main__":
    start()
