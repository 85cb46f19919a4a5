"""LoRA: training begins at the tower itself, trains products only, and ends in weights of the plain architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import triderm_dist
from tests.inference.small_run import train
from tests.inference.small_tower import SMALL_TOWER
from triderm_dist.config import LoraConfig, ModelConfig, TowerConfig, build
from triderm_dist.engine.network_files import read_weights
from triderm_dist.models import build_towers
from triderm_dist.models.lora import add_lora, merge_lora
from triderm_dist.models.panderm import build_panderm, split_panderm
from triderm_dist.models.tower import InputSpec, Tower
from triderm_dist.models.towers import TOWER_SOURCES
from triderm_dist.monitoring.memory_estimate import estimate_model_memory
from triderm_dist.schema import ConfigError
from triderm_dist.tasks import milk10k_task


def timm_vit() -> Tower:
    return build_towers(TowerConfig(source="timm:test_vit", pretrained=False, image_size=32, shared=True))[0]


def panderm() -> Tower:
    """BEiT's attention uses the weight of `qkv` without calling the layer."""
    half = (0.5,) * 3
    return split_panderm(build_panderm(128, 2, 16, 32), InputSpec(32, half, half), None, "")  # type: ignore[arg-type]


def open_clip_vit() -> Tower:
    """PyTorch's attention has one matrix for queries, keys and values, `in_proj_weight`."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    from triderm_dist.models.open_clip_tower import _split_vit

    visual = _build_vision_tower(16, CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=16, image_size=32))
    half = (0.5,) * 3
    return _split_vit(visual, InputSpec(32, half, half), None, "open_clip", "")  # type: ignore[arg-type]


TOWERS = {"timm": timm_vit, "panderm": panderm, "open_clip": open_clip_vit}


@pytest.mark.parametrize("kind", TOWERS)
def test_tower_begins_as_it_was_and_ends_as_a_plain_one(kind: str) -> None:
    torch.manual_seed(0)
    tower, pixels = TOWERS[kind](), torch.rand(2, 3, 32, 32)
    tower.freeze(1)
    plain = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    tower.eval()
    before = tower(pixels).detach()
    add_lora(tower, LoraConfig(rank=2))
    assert torch.equal(tower(pixels), before)

    tower.train()
    tower(pixels).square().sum().backward()
    trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    assert {name.rpartition(".")[2] for name in trained} == {"a", "b"}
    blocks = {name.split(".")[1] for name in trained}
    assert "0" not in blocks and len(blocks) == len(tower.blocks) - 1
    assert len(trained) == 2 * 4 * len(blocks)  # qkv, projection and two of the MLP
    for name, parameter in tower.named_parameters():
        if name in trained:
            assert parameter.grad is not None and (name.endswith("a") or parameter.grad.abs().max() > 0), name
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            assert parameter.grad is None, name

    weights, other = merge_lora(tower.state_dict()), TOWERS[kind]()
    assert weights.keys() == plain.keys()
    other.load_state_dict(weights)
    with torch.no_grad():
        after = tower.eval()(pixels)
        assert torch.equal(other.eval()(pixels), after) and not torch.allclose(after, before, atol=1e-3)
    changed = {name for name in plain if not torch.equal(plain[name], weights[name])}
    assert len(changed) == 4 * len(blocks)


def test_targets_and_alpha() -> None:
    tower = timm_vit()
    tower.freeze(0)
    add_lora(tower, LoraConfig(rank=4, alpha=2.0, targets=("attention",)))
    places = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert places and all(".attn." in name for name in places)
    scales = {tensor.item() for name, tensor in tower.state_dict().items() if name.endswith("scale")}
    assert scales == {0.5}
    cnn = build_towers(TowerConfig(source="timm:test_resnet", pretrained=False, image_size=32, shared=True))[0]
    with pytest.raises(ConfigError, match=r"tower\.lora: test_resnet has no attention or mlp layer in a block"):
        add_lora(cnn, LoraConfig(rank=4))
    with pytest.raises(ConfigError, match="lora: has no effect on a frozen tower"):
        build(TowerConfig, {"frozen": True, "lora": {"rank": 2}})


@pytest.mark.slow
def test_rank_above_that_of_every_matrix_is_refused() -> None:
    tower = timm_vit()
    add_lora(tower, LoraConfig(rank=64))
    with pytest.raises(ConfigError, match=r"tower\.lora\.rank: 65 is above the full rank of every matrix.* at most 64"):
        add_lora(timm_vit(), LoraConfig(rank=65))


def test_less_memory_is_estimated() -> None:
    tower = {"source": "timm:test_vit", "pretrained": False, "image_size": 32, "freeze_clinical": 1}
    settings = ({**tower, "freeze_dermoscopic": 1, **more} for more in ({}, {"lora": {"rank": 2}}))
    plain, lora = (build(ModelConfig, {"width": 16, "heads": 2, "tower": each}) for each in settings)
    signature = milk10k_task().signature(("a", "b"))
    (full, _), (small, _) = (estimate_model_memory(each, signature, False) for each in (plain, lora))
    assert small.optimizer < full.optimizer and small.gradients < full.gradients


def test_run_with_lora_predicts_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOWER_SOURCES, "small", SMALL_TOWER)
    tower = "{source: 'timm:test_vit', pretrained: false, image_size: 32, shared: true, freeze_clinical: 1, "
    tower += "lora: {rank: 2}}"
    folder = train(tmp_path, [f"models.vit={{width: 16, heads: 2, tower: {tower}}}", "stack.enabled=false"])
    assert not [name for name in read_weights(folder / "vit" / "fold-0" / "weights") if "parametrizations" in name]
    assert sum(triderm_dist.load(folder, device="cpu").predict(age=50).probabilities.values()) == pytest.approx(1)
