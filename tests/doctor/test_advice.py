"""Experiments and launchers that the doctor suggests for a machine."""

import pytest

from triderm_dist.config import Experiment, load, shipped_names
from triderm_dist.doctor.advice import suggest
from triderm_dist.doctor.findings import GIB
from triderm_dist.doctor.machine import Gpu


@pytest.mark.parametrize(
    ("gpus", "experiment", "launcher", "override"),
    [
        ([], "cpu", "single", ""),
        ([Gpu("A100", 79 * GIB, 78 * GIB, (8, 0))], "a100", "single", ""),
        ([Gpu("3090", 24 * GIB, 23 * GIB, (8, 6))], "rtx3090", "single", ""),
        ([Gpu("4090", 24 * GIB, 23 * GIB, (8, 9))], "rtx4090", "single", ""),
        ([Gpu("laptop", 8 * GIB, 7 * GIB, (8, 9))], "rtx3090", "single", "train.micro_batch=4"),
        ([Gpu("H100", 79 * GIB, 78 * GIB, (9, 0))] * 8, "h100x8", "ddp", ""),
        ([Gpu("4090", 24 * GIB, 23 * GIB, (8, 9))] * 2, "milk10k", "ddp", "train.micro_batch=24"),
        ([Gpu("4090", 24 * GIB, 23 * GIB, (8, 9))] * 5, "milk10k", "ddp", "train.global_batch=80 train.micro_batch=16"),
    ],
)
def test_suggested_experiment_and_launcher_exist_and_batch_splits(gpus, experiment, launcher, override):
    by_name = {each.name: each.text for each in suggest(gpus)}
    assert by_name["experiment"].partition(";")[0] == experiment
    assert by_name["accelerate file"].startswith(launcher)
    assert launcher in shipped_names("accelerate_configs")
    assert override in by_name["start"]
    overrides = [word for word in by_name["start"].split() if word.startswith("train.")]
    config = load(Experiment, experiment, overrides)
    for model in config.models.values():
        assert model.train.global_batch % (max(1, len(gpus)) * model.train.micro_batch) == 0
