"""The memory of a training step, counted on shapes alone, against the same count of a real step."""

from __future__ import annotations

import pytest
import torch

from triderm_dist.config import ModelConfig
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.network import Network
from triderm_dist.monitoring.flops import example_inputs
from triderm_dist.monitoring.memory_estimate import MemoryEstimate, _Live, _peak, estimate_memory, estimate_model_memory


def model(**settings: object) -> ModelConfig:
    tower = {"source": "timm:test_vit", "pretrained": False, "image_size": 64, "freeze_clinical": 0}
    tower |= {"freeze_dermoscopic": 0, **settings.pop("tower", {})}  # type: ignore[dict-item]
    return ModelConfig.model_validate({"width": 64, "heads": 4, "tower": tower, **settings})


def network_of(config: ModelConfig) -> Network:
    return build_network(config, ("a", "b"), build_towers(config.tower))


def test_shapes_take_what_a_real_step_takes() -> None:
    network = network_of(model()).train()
    expected = _peak(network, 4, half=False, activation_checkpointing=False)
    inputs = example_inputs(network, 4)
    with _Live([*network.parameters(), *network.buffers()]) as live:
        outputs = network(*inputs)
        torch.stack([logits.float().sum() for logits in outputs[:3]]).sum().backward()
    assert expected == pytest.approx(live.peak, rel=0.02)


def test_what_saves_memory_is_seen() -> None:
    plain = estimate_memory(network_of(model()), half=False, activation_checkpointing=False)
    recomputed = estimate_memory(network_of(model()), half=False, activation_checkpointing=True)
    half = estimate_memory(network_of(model()), half=True, activation_checkpointing=False)
    frozen = estimate_memory(network_of(model(tower={"freeze_clinical": 6, "freeze_dermoscopic": 6})), False, False)
    assert recomputed.a_lesion < plain.a_lesion / 2
    assert half.a_lesion < 0.8 * plain.a_lesion
    assert frozen.a_lesion < plain.a_lesion / 2 and frozen.optimizer < plain.optimizer
    parameters = sum(p.numel() for p in network_of(model()).parameters())
    assert (plain.parameters, plain.optimizer, plain.gradients) == (4 * parameters, 8 * parameters, 4 * parameters)


def test_largest_is_the_last_that_fits() -> None:
    need = MemoryEstimate(parameters=100, optimizer=200, gradients=50, base=-20, a_lesion=7.5)
    for memory in (349, 350, 360, 1000):
        largest = need.largest(memory)
        assert need.total(largest + 1) > memory and (largest == 0 or need.total(largest) <= memory)


def test_a_tower_that_is_not_here_is_stood_in_for() -> None:
    frozen = model(tower={"source": "timm:test_efficientnet", "frozen": True})
    need, said = estimate_model_memory(frozen, False)
    assert said == "" and need.parameters < 4 * 200_000  # the tower is not in the network that is trained
