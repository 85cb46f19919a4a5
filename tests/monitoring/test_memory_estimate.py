"""Estimated memory of a training step compared with a real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from triderm_dist.config import ModelConfig, TrainConfig
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.dropout import use_lesion_masks
from triderm_dist.models.network import Network
from triderm_dist.models.towers import TokenShape
from triderm_dist.monitoring.flops import example_inputs, training_flops
from triderm_dist.monitoring.memory_estimate import (
    MemoryEstimate,
    _LiveBytes,
    _simulate,
    bare_network,
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


def _peak(*arguments: Any, **keywords: Any) -> int:
    return _simulate(*arguments, **keywords)[0]


def estimate(network: Network, *, half: bool = False, ranks: int = 1, strategy: Any = "single", **train: object):
    settings = TrainConfig.model_validate({"global_batch": 8, "micro_batch": 8, "compile": False, **train})
    return MemoryEstimate(network, settings, half, ranks, strategy)


def test_estimates_of_one_network_keep_their_settings_apart() -> None:
    """They share what is simulated; those of new networks share nothing."""
    network = network_of(model())
    settings: list[dict[str, Any]] = [{}, {"half": True}, {"activation_checkpointing": True}, {"strategy": "ddp"}]
    totals = [estimate(network, **each).total(8) for each in settings]
    assert totals == [estimate(network_of(model()), **each).total(8) for each in settings]
    assert len({*totals}) == len(totals)


def real_step(network: Network, lesions: int, kept: bool) -> int:
    """Return the peak of a forward and backward pass on this device, as `_LiveBytes` counts it."""
    use_lesion_masks(network)
    inputs = example_inputs(network, lesions)
    if kept:
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    with _LiveBytes([*network.parameters(), *network.buffers(), *inputs, *gradients]) as live:
        outputs = network(*inputs)
        torch.stack([logits.float().sum() for logits in outputs.heads]).sum().backward()
    return live.peak


@pytest.mark.parametrize("kept", [False, True])
def test_memory_estimate_equals_a_real_step(kept: bool) -> None:
    network = network_of(model()).train()
    expected = _peak(network, 4, half=False, checkpointing=False, kept=kept)
    assert expected == pytest.approx(real_step(network, 4, kept), rel=0.02)


def test_gradients_are_beside_the_activations_with_several_micro_batches_and_under_ddp() -> None:
    network = network_of(model())
    alone, ddp = estimate(network), estimate(network, ranks=2, strategy="ddp", global_batch=16)
    freed = _peak(network, 8, False, False) - _peak(network, 8, False, False, kept=True)
    assert ddp.step(8) - alone.step(8) == alone.gradients - freed > 0
    accumulated = alone.step(4) - _peak(network, 4, False, False, kept=True)
    assert accumulated == alone.fixed + alone.gradients + 8 * alone.photos


def test_fsdp2_shards_weights_average_and_optimizer_states() -> None:
    network = network_of(model())
    whole, sharded = estimate(network, ema_decay=0.9), estimate(network, ranks=4, strategy="fsdp2", ema_decay=0.9)
    for part in ("average", "optimizer", "gradients"):
        assert getattr(sharded, part) == getattr(whole, part) // 4
    assert sharded.weights < whole.weights and sharded._gathered > 0


def test_average_is_of_trained_weights_only() -> None:
    network = network_of(model(tower={"freeze_clinical": 6, "freeze_dermoscopic": 6}))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    need = estimate(network, ema_decay=0.9)
    assert (need.average, need.optimizer, need.gradients) == (4 * trained, 8 * trained, 4 * trained)
    assert need.weights >= 4 * sum(p.numel() for p in network.parameters()) > 1.2 * need.average
    assert estimate(network).average == 0


def test_evaluation_under_transforms_holds_their_photos() -> None:
    need = estimate(network_of(model()))
    assert need.evaluation(4, 8) - need.evaluation(4) == 4 * need.photos
    assert need.evaluation(4) < need.step(4) == need.total(4)


def test_checkpointing_half_precision_and_freezing_save_memory() -> None:
    network = network_of(model())
    frozen = network_of(model(tower={"freeze_clinical": 6, "freeze_dermoscopic": 6}))

    def per_lesion(network: Network, half: bool = False, checkpointing: bool = False) -> float:
        low, high = (_peak(network, lesions, half, checkpointing) for lesions in (64, 128))
        return (high - low) / 64

    plain = per_lesion(network)
    assert per_lesion(network, checkpointing=True) < plain / 2
    assert per_lesion(network, half=True) < 0.8 * plain
    assert per_lesion(frozen) < plain / 2


def test_largest_micro_batch_is_the_last_that_fits() -> None:
    need = estimate(network_of(model()), global_batch=12, micro_batch=12)
    need.total = {1: 20, 2: 30, 3: 40, 4: 50, 6: 70, 12: 60}.get  # type: ignore[assignment,method-assign]
    assert [need.largest(memory) for memory in (19, 20, 39, 40, 59, 60)] == [None, 1, 2, 3, 4, 12]
    assert [need.largest(memory, smallest=2) for memory in (29, 30, 49)] == [None, 2, 2]


@pytest.mark.parametrize("tower", [{}, {"lora": {"rank": 2}}, {"frozen": True}])
def test_network_that_is_kept_for_estimates_has_no_memory(tower: dict[str, Any]) -> None:
    config = model(tower=tower)
    kept, real = bare_network(config, SIGNATURE)[0], network_without_weights(config, SIGNATURE)[0]
    assert all(each.is_meta for each in (*kept.parameters(), *kept.buffers()))
    assert estimate(kept).total(8) == estimate(real).total(8)
    assert estimate(kept).largest_of_one(2**32) == estimate(real).largest_of_one(2**32)
    assert training_flops(kept) == training_flops(real)


def test_frozen_tower_is_not_counted() -> None:
    frozen = model(tower={"source": "timm:test_efficientnet", "frozen": True})
    need, note = estimate_model_memory(frozen, SIGNATURE, False)
    assert note == "" and need.weights < 4 * 200_000


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
