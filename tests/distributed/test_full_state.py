"""Any optimizer's state is saved under canonical names and restored, so that the next step is the same."""

import json
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.distributed.full_state import full_optimizer_state, group_entries, load_optimizer_state
from triderm_dist.schema import CheckpointError, ConfigError


class Nested(torch.optim.Optimizer):
    """Keeps lists and numbers in its state, and changes entries of its groups, as Shampoo and Prodigy do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "seen": 0, "betas": (0.5, 0.9)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["seen"] += 1
            group["betas"] = (group["betas"][0] * 0.9, group["betas"][1])
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(factors=[torch.ones(p.shape[0]), torch.ones(1)], calls=0, name=None)
                state["calls"] += 1
                state["factors"][0].add_(p.grad.reshape(len(p), -1).sum(1))
                step = p.grad + group["betas"][0] * state["factors"][0].mean() * state["calls"]
                p.sub_(group["lr"] / (1 + group["seen"]) * step)


class Lookahead(torch.optim.SGD):
    """Creates its slow weights in the second step (Zhang et al. 2019)."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["calls"] = state.get("calls", 0) + 1
                if state["calls"] % 2 == 0:
                    state.setdefault("slow", p.clone()).lerp_(p, 0.5)
                    p.copy_(state["slow"])


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "plain sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
    "rmsprop": partial(torch.optim.RMSprop, centered=True, momentum=0.5),
    "nested": Nested,
    "lookahead": Lookahead,
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))


def take_steps(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        net(torch.randn(8, 6, generator=torch.Generator().manual_seed(number))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_optimizer_takes_the_same_steps(name):
    accelerator, build = Accelerator(cpu=True), OPTIMIZERS[name]
    net = network()
    optimizer = build(net.parameters(), lr=0.05)
    initial = group_entries(optimizer)
    take_steps(net, optimizer, 0, 3)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    saved = full_optimizer_state(accelerator, net, optimizer, initial)
    saved.values, saved.groups = json.loads(json.dumps([saved.values, saved.groups]))
    take_steps(net, optimizer, 3, 6)

    other = network()
    other.load_state_dict(weights)
    resumed = build(other.parameters(), lr=0.05)
    load_optimizer_state(accelerator, other, resumed, weights, saved)
    for key, value in other.state_dict().items():
        assert torch.equal(value, weights[key]), key
    take_steps(other, resumed, 3, 6)
    for key, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_optimizer_state_is_keyed_by_parameter_name():
    net = network()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    initial = group_entries(optimizer)
    assert not full_optimizer_state(Accelerator(cpu=True), net, optimizer, initial).tensors  # before the first step
    take_steps(net, optimizer, 0, 1)
    state = full_optimizer_state(Accelerator(cpu=True), net, optimizer, initial)
    keys = {f"{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name, _ in net.named_parameters()}
    assert set(state.tensors) == keys and not state.values and not state.groups


def test_state_of_a_different_optimizer_is_refused():
    net = network()
    optimizer = OPTIMIZERS["sgd"](net.parameters(), lr=0.1)
    take_steps(net, optimizer, 0, 1)
    saved = full_optimizer_state(Accelerator(cpu=True), net, optimizer, group_entries(optimizer))
    adamw = OPTIMIZERS["adamw"](net.parameters())
    with pytest.raises(
        CheckpointError, match=r"0\.weight: AdamW and the checkpoint differ in the optimizer state exp_a"
    ):
        load_optimizer_state(Accelerator(cpu=True), net, adamw, {}, saved)


def test_unserializable_optimizer_state_is_refused():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[net[0].weight]["history"] = object()
    with pytest.raises(ConfigError, match="SGD keeps a object as state 'history', which a checkpoint cannot hold"):
        full_optimizer_state(Accelerator(cpu=True), net, optimizer, group_entries(optimizer))
