"""Estimated memory of a training step compared with a real step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from triderm_dist.config import ModelConfig
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.network import Network
from triderm_dist.models.towers import TokenShape
from triderm_dist.monitoring.flops import example_inputs
from triderm_dist.monitoring.memory_estimate import (
    MemoryEstimate,
    _LiveBytes,
    _peak,
    estimate_memory,
    estimate_model_memory,
    network_without_weights,
)
from triderm_dist.tasks import milk10k_task

SIGNATURE = milk10k_task().signature(("a", "b"))


def model(**settings: object) -> ModelConfig:
    tower = {"source": "timm:test_vit", "pretrained": False, "image_size": 64, "freeze_clinical": 0}
    tower |= {"freeze_dermoscopic": 0, **settings.pop("tower", {})}  # type: ignore[dict-item]
    return ModelConfig.model_validate({"width": 64, "heads": 4, "tower": tower, **settings})


def network_of(config: ModelConfig) -> Network:
    return build_network(config, SIGNATURE, build_towers(config.tower))


def test_memory_estimate_equals_a_real_step() -> None:
    network = network_of(model()).train()
    expected = _peak(network, 4, half=False, activation_checkpointing=False)
    inputs = example_inputs(network, 4)
    with _LiveBytes([*network.parameters(), *network.buffers()]) as live:
        outputs = network(*inputs)
        torch.stack([logits.float().sum() for logits in outputs.heads]).sum().backward()
    assert expected == pytest.approx(live.peak, rel=0.02)


def test_estimate_of_small_micro_batches_of_a_checkpointed_cnn() -> None:
    """The peak of a CNN with batch norms is then at another moment than with large micro-batches."""
    network = network_of(model(kind="dual_cnn", tower={"source": "timm:resnet10t"}))
    need = estimate_memory(network, half=False, activation_checkpointing=True)
    for lesions in (6, 20):
        peak = _peak(network, lesions, half=False, activation_checkpointing=True)
        assert need.total(lesions) - need.parameters - need.optimizer == pytest.approx(peak, rel=0.05)
    assert replace(need, small=(0.0, 0.0)).total(6) < 0.95 * need.total(6)


def test_checkpointing_half_precision_and_freezing_save_memory() -> None:
    plain = estimate_memory(network_of(model()), half=False, activation_checkpointing=False)
    recomputed = estimate_memory(network_of(model()), half=False, activation_checkpointing=True)
    half = estimate_memory(network_of(model()), half=True, activation_checkpointing=False)
    frozen = estimate_memory(network_of(model(tower={"freeze_clinical": 6, "freeze_dermoscopic": 6})), False, False)
    assert recomputed.per_lesion < plain.per_lesion / 2
    assert half.per_lesion < 0.8 * plain.per_lesion
    assert frozen.per_lesion < plain.per_lesion / 2 and frozen.optimizer < plain.optimizer
    parameters = sum(p.numel() for p in network_of(model()).parameters())
    assert (plain.parameters, plain.optimizer, plain.gradients) == (4 * parameters, 8 * parameters, 4 * parameters)


def test_largest_micro_batch_is_the_last_that_fits() -> None:
    need = MemoryEstimate(parameters=100, optimizer=200, gradients=50, base=-20, per_lesion=7.5)
    for memory in (349, 350, 360, 1000):
        largest = need.largest(memory)
        assert need.total(largest + 1) > memory and (largest == 0 or need.total(largest) <= memory)


def test_frozen_tower_is_not_counted() -> None:
    frozen = model(tower={"source": "timm:test_efficientnet", "frozen": True})
    need, note = estimate_model_memory(frozen, SIGNATURE, False)
    assert note == "" and need.parameters < 4 * 200_000


@pytest.mark.parametrize(
    ("source", "note"),
    [
        ("gone/panderm_ll_data6.pth", "assuming a ViT-L/16 as tower"),
        ("local-dir:gone", "assuming a ViT-B/16 as tower"),
        ("hf-hub:unknown/unknown", "assuming a ViT-B/16 as tower"),
    ],
)
def test_remote_tower_is_estimated_as_a_vit(source: str, note: str) -> None:
    network, found = network_without_weights(model(tower={"source": source}), SIGNATURE)
    assert found == note and network.token_shape == TokenShape(16, {"L": 1024, "B": 768}[note[15]])
