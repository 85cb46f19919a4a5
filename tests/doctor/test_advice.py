"""Experiments that the doctor suggests for a machine, by the memory that their models need."""

import pytest

from tests.doctor.conftest import SMALL
from triderm_dist.config import Experiment, load
from triderm_dist.doctor.advice import canvas_of, fitting_settings, suggest
from triderm_dist.doctor.findings import GIB
from triderm_dist.doctor.machine import Gpu
from triderm_dist.monitoring.memory_estimate import estimate_model_memory
from triderm_dist.tasks import milk10k_task

SIGNATURE = milk10k_task().signature(("a",))


def small(*settings: str) -> Experiment:
    tower = [*SMALL, "models.a.tower.image_size=512", "train.global_batch=16", "train.micro_batch=16"]
    return load(Experiment, None, [*tower, *settings])


@pytest.mark.slow
def test_micro_batch_is_the_largest_that_fits() -> None:
    def need(micro: int, checkpointing: bool = False) -> int:
        canvas = canvas_of(small().data)
        experiment = small(f"train.activation_checkpointing={checkpointing}")
        return estimate_model_memory(experiment.models["a"], SIGNATURE, True, canvas=canvas)[0].total(micro)

    assert fitting_settings(small(), SIGNATURE, need(16)) == []
    assert fitting_settings(small(), SIGNATURE, need(16) - 1) == ["models.a.train.micro_batch=8"]
    only_checkpointed = fitting_settings(small(), SIGNATURE, need(1) - 1)
    assert only_checkpointed and "models.a.train.activation_checkpointing=true" in only_checkpointed
    assert fitting_settings(small(), SIGNATURE, need(1, checkpointing=True) - 1) is None


def test_machine_without_a_gpu_gets_the_experiment_for_a_cpu() -> None:
    assert {each.name: each.text for each in suggest([], SIGNATURE)}["start"].split()[:4] == [
        "triderm", "pipeline", "--config", "cpu"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "memory", "experiment", "setting"),
    [
        (1, 79, "a100", ""),
        (1, 44.5, "a100", ""),
        (1, 23.5, "rtx4090", ""),
        (1, 8, "milk10k", "models.dual_cnn.train.micro_batch=12"),
        (8, 79, "h100x8", "parallel_folds=true"),
        (2, 23.5, "rtx4090", "parallel_folds=true"),
    ],
)
def test_suggested_experiment_trains_with_what_fits(count: int, memory: float, experiment: str, setting: str) -> None:
    found = {each.name: each.text for each in suggest([Gpu("a GPU", int(memory * GIB), 0, (8, 9))] * count, SIGNATURE)}
    assert found["experiment"].partition(";")[0] == experiment
    assert setting in found["start"] and ("each fold on all GPUs" in found) == (count > 1)
    words = found["start"].split()
    load(Experiment, experiment, [word for word in words if word.startswith(("train.", "models."))])


@pytest.mark.slow
def test_fold_on_five_gpus_splits_its_batch() -> None:
    found = {each.name: each.text for each in suggest([Gpu("a GPU", 24 * GIB, 0, (8, 9))] * 5, SIGNATURE)}
    assert found["each fold on all GPUs"].split()[-3:-1] == ["train.global_batch=80", "train.micro_batch=16"]
