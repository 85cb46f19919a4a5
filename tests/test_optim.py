"""Parameter groups of every kind of tower, and the learning rate schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triderm_dist.config import ModelConfig, OptimConfig
from triderm_dist.models import build_network, build_towers
from triderm_dist.models.network import Network
from triderm_dist.optim import (
    OPTIMIZERS,
    SCHEDULES,
    build_optimizer,
    build_scheduler,
    check_names,
    describe_groups,
    lr_factor,
    parameter_groups,
)
from triderm_dist.schema import ConfigError
from triderm_dist.tasks import milk10k_task


def network(
    kind: str = "trimodal", tower: str = "test_vit", clinical: int = 0, dermoscopic: int = 0, shared: bool = False
) -> Network:
    config = ModelConfig.model_validate({
        "kind": kind, "width": 16, "heads": 2,
        "tower": {
            "source": f"timm:{tower}", "pretrained": False, "image_size": 64, "shared": shared,
            "freeze_clinical": clinical, "freeze_dermoscopic": dermoscopic,
        },
    })  # fmt: skip
    return build_network(config, milk10k_task().signature(("a", "b")), build_towers(config.tower))


def rates(net: Network, lr: float = 1.0, decay: float = 0.5) -> dict[str, tuple[float, float]]:
    """Return {name: (learning rate, weight decay)} of trained parameters; each must be in exactly one group."""
    names = {id(p): name for name, p in net.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in parameter_groups(net, lr, decay, 0.05):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert set(found) == {name for name, p in net.named_parameters() if p.requires_grad}
    return found


@pytest.mark.parametrize("kind", ["trimodal", "dual_cnn"])
@pytest.mark.parametrize("tower", ["test_vit", "test_efficientnet", "test_convnext", "test_resnet"])
@pytest.mark.parametrize("shared", [False, True])
def test_learning_rates_of_every_kind_of_tower(kind: str, tower: str, shared: bool) -> None:
    net = network(kind, tower, clinical=2, dermoscopic=1, shared=shared)
    blocks = len(next(iter(net.towers.values())).blocks)
    seen = set()
    for name, (lr, _) in rates(net).items():
        parts = name.split(".")
        if parts[0] != "towers":
            assert lr == 1.0, name
        elif parts[2] == "blocks":
            assert lr == 0.5 ** (blocks - int(parts[3])), name
            seen.add((parts[1], int(parts[3])))
        else:
            assert parts[2] == "tail" and lr == 0.5, name
    first = {"shared": 1} if shared else {"clinical": 2, "dermoscopic": 1}
    # Depth counts from the last block, so that its rate is independent of the number of frozen blocks.
    assert seen == {(view, i) for view, start in first.items() for i in range(start, blocks)}


def test_exact_depths_of_a_vit() -> None:
    depths = network(clinical=0, dermoscopic=0).parameter_depths()
    assert depths["towers.clinical.stem.model.patch_embed.proj.weight"] == 7
    assert depths["towers.clinical.stem.model.cls_token"] == 7
    assert depths["towers.clinical.blocks.0.attn.qkv.weight"] == 6
    assert depths["towers.dermoscopic.blocks.5.attn.qkv.weight"] == 1
    assert depths["towers.dermoscopic.tail.0.weight"] == 1
    assert {depths[n] for n in depths if not n.startswith("towers.")} == {0}


def test_heads_have_a_multiple_of_the_learning_rate() -> None:
    optimizer = build_optimizer(network(), OptimConfig(lr=1e-4, layer_decay=0.5, head_lr_multiple=10))
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-3 if group["depth"] == 0 else 1e-4 * 0.5 ** group["depth"])


def test_weight_decay_applies_to_weight_matrices_only() -> None:
    found = rates(network())
    for name in (
        "towers.clinical.stem.model.pos_embed", "towers.clinical.stem.model.cls_token",
        "towers.clinical.blocks.0.norm1.weight", "towers.clinical.blocks.0.attn.qkv.bias",
        "semantic.null", "semantic.concepts.name", "semantic.concepts.missing",
        "semantic.categories.site.embedding.weight", "pooling.query", "pooling.norm.weight", "views.clinical.missing",
        "head.linear.bias",
    ):  # fmt: skip
        assert found[name][1] == 0.0, name
    for name in (
        "towers.clinical.stem.model.patch_embed.proj.weight", "towers.clinical.blocks.0.attn.qkv.weight",
        "fusion.0.semantic_gating.attention.query.weight", "views.clinical.project.1.weight", "head.linear.weight",
    ):  # fmt: skip
        assert found[name][1] == 0.05, name


def test_weight_decay_applies_to_open_clip_attention() -> None:
    net = network()
    net.add_module("extra", torch.nn.MultiheadAttention(8, 2))
    found = rates(net)
    assert found["extra.in_proj_weight"][1] == found["extra.out_proj.weight"][1] == 0.05
    assert found["extra.in_proj_bias"][1] == 0.0


def test_optimizer_table_and_error_without_parameters() -> None:
    net = network("dual_cnn", "test_resnet")
    optimizer = build_optimizer(net, OptimConfig(lr=1e-3, layer_decay=0.5))
    table = describe_groups(optimizer.param_groups).splitlines()
    assert len(table) == 1 + len(optimizer.param_groups) and "depth 0, decay" in table[1]
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in net.parameters()
    )
    net.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        build_optimizer(net, OptimConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"foreach": True}, "adamw: `fused` and `foreach`"),
        ({"differentiable": True}, "adamw: `fused` does not support"),
        ({"amsgrad": 5}, "adamw: _fused_adamw_"),
        ({"betas": [2, 3]}, "adamw: Invalid beta"),
    ],
)
def test_settings_that_fail_when_built_or_in_the_first_step_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"train\.optim\.settings: {message}"):
        check_names(OptimConfig(settings=settings))


class Descent(torch.optim.Optimizer):
    """Gradient descent, which keeps a number or a tensor of its own in `place`."""

    def __init__(self, groups: list, lr: float, place: str) -> None:
        super().__init__(groups, {"lr": lr, "scale": torch.ones(2)})
        self.place, self.steps = place, 0

    def step(self, closure: object = None) -> None:
        match self.place:
            case "state":
                self.state["all"] = {"steps": 1}
            case "attribute":
                self.steps += 1
            case "tensor":
                self.param_groups[0]["scale"].mul_(0.5)
            case "mode":
                raise Exception("Optimizer was not in train mode")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("state", r"train.optim.name: descent changes state\['all'\] in a step, which no checkpoint holds; keep it in"),
        ("attribute", "train.optim.name: descent changes the attribute steps in a step, which no checkpoint holds"),
        ("tensor", "train.optim.name: descent changes the tensor scale of its groups in a step, which no checkpoint"),
        ("mode", "train.optim.settings: descent: Optimizer was not in train mode"),
    ],
)
def test_optimizers_that_no_checkpoint_holds_are_refused(
    place: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "descent", Descent)
    check_names(OptimConfig(name="descent", settings={"place": ""}))
    with pytest.raises(ConfigError, match=message):
        check_names(OptimConfig(name="descent", settings={"place": place}))


def test_functions_that_build_no_optimizer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "nothing", lambda groups, lr: None)
    with pytest.raises(ConfigError, match=r"train\.optim\.name: nothing builds no torch\.optim\.Optimizer"):
        check_names(OptimConfig(name="nothing"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            lambda step, total: step / total,
            r"wrong\(0\) gives TypeError: .*'total'; a schedule is a function from progress",
        ),
        (
            lambda progress: 0.75 - progress,
            r"wrong\(1\) gives -0\.25; a schedule is a function from progress, 0 to 1, to a",
        ),
        (lambda progress: math.nan, r"wrong\(0\) gives nan"),
        (lambda progress: math.log(1 - progress) + 1, r"wrong\(1\) gives ValueError"),
        (1.0, r"wrong\(0\) gives TypeError: 'float' object is not callable"),
    ],
)
def test_schedules_that_give_no_factor_are_refused(
    shape: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCHEDULES, "wrong", shape)
    with pytest.raises(ConfigError, match=rf"train\.optim\.schedule: {message}"):
        check_names(OptimConfig(schedule="wrong"))


def test_lr_factor_values() -> None:
    values = [lr_factor(step, total_steps=9, warmup_steps=4, min_factor=0.1) for step in range(11)]
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine, 0.1, 0.1])


@given(st.integers(1, 200), st.integers(0, 250), st.floats(0, 1))
def test_lr_factor_rises_then_falls_within_bounds(total: int, warmup: int, least: float) -> None:
    values = [lr_factor(step, total, warmup, least) for step in range(total)]
    assert all(0 < value <= 1 or value == least == 0 for value in values)
    peak = min(warmup, total - 1)
    assert all(a < b for a, b in itertools.pairwise(values[: peak + 1]))
    assert all(a >= b for a, b in itertools.pairwise(values[peak:]))
    if warmup < total:
        assert values[warmup] == pytest.approx(1.0)
    if warmup < total - 1:
        assert values[-1] == pytest.approx(least)


def test_scheduler_scales_all_groups_alike() -> None:
    config = OptimConfig(lr=1e-2, layer_decay=0.5, min_lr=1e-4, warmup_epochs=1.5)
    optimizer = build_optimizer(network("dual_cnn", "test_resnet"), config)
    scheduler = build_scheduler(optimizer, config, total_steps=10, steps_per_epoch=2)
    history = []
    for _ in range(10):
        history.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    heads = [rates[0] for rates in history]
    assert heads == pytest.approx([1e-2 * lr_factor(step, 10, 3, 0.01) for step in range(10)])
    assert heads[-1] == pytest.approx(1e-4)
    for rates_now in history:
        expected = [rates_now[0] * 0.5 ** group["depth"] for group in optimizer.param_groups]
        assert rates_now == pytest.approx(expected)
    with pytest.raises(ConfigError, match="min_lr"):
        build_scheduler(optimizer, OptimConfig(lr=1e-5, min_lr=1e-4), 10, 2)


def test_blocks_are_unfrozen_from_the_last_one_on() -> None:
    config = OptimConfig(lr=1e-2, layer_decay=1.0, warmup_epochs=0, unfreeze_epochs=1.5)
    optimizer = build_optimizer(network("dual_cnn", "test_resnet"), config)
    scheduler = build_scheduler(optimizer, config, total_steps=20, steps_per_epoch=2)
    depths = [group["depth"] for group in optimizer.param_groups]
    assert {0, 1, 2} <= set(depths)
    for step in range(20):
        factor = lr_factor(step, 20, 0, config.min_lr / config.lr)
        expected = [1e-2 * factor * (step >= 3 * depth) for depth in depths]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True, "betas": (0.8, 0.9)}, {"fused": False}])
def test_adamw_steps_as_pytorch_does(settings: dict) -> None:
    networks = [network(clinical=1), network(clinical=1)]
    networks[1].load_state_dict(networks[0].state_dict())
    ours = build_optimizer(networks[0], OptimConfig(settings=settings))
    for p in networks[0].parameters():
        assert not ours.state[p]  # DeepSpeed looks for states, which leaves an empty one for each parameter
    groups = parameter_groups(networks[1], 1e-4, 0.65, 0.05)
    for group, own in zip(groups, ours.param_groups, strict=True):
        group |= {"lr": own["lr"], "weight_decay": own["weight_decay"]}
    theirs = torch.optim.AdamW(groups, lr=1e-4, **{"fused": True, **settings})
    for step in range(4):
        for net, optimizer in zip(networks, (ours, theirs), strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
            if optimizer.param_groups[0]["fused"]:
                optimizer.found_inf = torch.tensor(float(step == 2))  # type: ignore[attr-defined]
            optimizer.step()
    for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(a, b)
        mine, other = ours.state.get(a, {}), theirs.state.get(b, {})
        assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
