"""Optimizers over parameter groups with layer-wise learning rates, and learning-rate schedules in optimizer steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from triderm_dist.config import OptimConfig
from triderm_dist.models.network import Network
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import ConfigError
from triderm_dist.schema.plugins import check_known


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor; other tensors unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class FusedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`, the same bit for bit, that counts the steps of all groups together: a step takes
    a launch for each group and two more, not three for each group. DTensors are updated as plain shards: otherwise each
    operation is dispatched for hundreds of them one by one.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        parameters = [p for _, each in groups for p in each]
        fused = all(group["fused"] for group in self.param_groups)
        alike = len({(p.device, p.dtype) for p in parameters}) == 1
        # The first step creates the states; DeepSpeed has looked for them before.
        if closure is not None or not (fused and alike) or any(not self.state.get(p) for p in parameters):
            return super().step(closure)
        found_inf, steps = getattr(self, "found_inf", None), [self.state[p]["step"] for p in parameters]
        torch._foreach_add_(steps, 1)
        for group, own in groups:
            if own:
                self._update(group, own, found_inf)
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        return None

    def _update(self, group: dict[str, Any], parameters: list[Any], found_inf: torch.Tensor | None) -> None:
        states = [self.state[p] for p in parameters]

        def moments(key: str) -> list[torch.Tensor]:
            return [local_part(state[key]) for state in states]

        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [local_part(p) for p in parameters],
            [local_part(p.grad) for p in parameters],
            moments("exp_avg"),
            moments("exp_avg_sq"),
            moments("max_exp_avg_sq") if group["amsgrad"] else [],
            [state["step"] for state in states],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=found_inf,
        )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    # The fused implementation takes a fifth of the default one's time, also on two CPU cores.
    "adamw": partial(FusedAdamW, fused=True),
}
"""Optimizers by name (train.optim.name), called as f(parameter_groups, lr=..., **train.optim.settings); plugins add
theirs. Any torch optimizer whose `step` needs no closure works."""


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine}
"""Shapes of the learning rate after the warm-up, by name (train.optim.schedule): progress from 0 to 1 -> a factor from
0 (train.optim.min_lr) to 1 (train.optim.lr). Plugins add theirs."""
_DECAYED = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def parameter_groups(
    network: Network, lr: float, layer_decay: float, weight_decay: float, head_lr_multiple: float = 1.0
) -> list[dict[str, Any]]:
    """Return parameter groups with lr * layer_decay ** depth (`network.parameter_depths`), heads first; those of depth
    0, all after the towers, have lr * head_lr_multiple.

    Only weights of linear layers and convolutions decay: biases, norms, layer scales, embeddings, learned tokens,
    queries and positions do not. Every trainable parameter is in exactly one group.
    """
    decayed = {
        f"{path}.{name}" if path else name
        for path, module in network.named_modules()
        if isinstance(module, _DECAYED)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }
    depths = network.parameter_depths()
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in trained.items():
        depth, decays = depths[name], name in decayed
        group = groups.setdefault(
            (depth, not decays),
            {
                "params": [],
                "lr": lr * layer_decay**depth if depth else lr * head_lr_multiple,
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"depth {depth}, {'decay' if decays else 'no decay'}",
                "depth": depth,
            },
        )
        group["params"].append(parameter)
    ordered = [groups[key] for key in sorted(groups)]
    grouped = [id(parameter) for group in ordered for parameter in group["params"]]
    assert sorted(grouped) == sorted({id(parameter) for parameter in trained.values()}), (
        "a parameter is in no group, or in two"
    )
    return ordered


def describe_groups(groups: Sequence[dict[str, Any]]) -> str:
    """Format the groups as a table."""
    lines = [f"{'group':<20} {'lr':>10} {'weight decay':>12} {'tensors':>8} {'parameters':>12}"]
    for group in groups:
        numbers = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{group['name']:<20} {group['lr']:>10.3g} {group['weight_decay']:>12.3g} "
            f"{len(group['params']):>8} {numbers:>12,}"
        )
    return "\n".join(lines)


def build_optimizer(network: Network, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the settings over `parameter_groups`.

    Raises ConfigError for an unknown name, settings that the optimizer does not take, or a fully frozen network.
    """
    groups = parameter_groups(network, config.lr, config.layer_decay, config.weight_decay, config.head_lr_multiple)
    if not groups:
        raise ConfigError(
            "every parameter of the network is frozen: lower tower.freeze_clinical and freeze_dermoscopic"
        )
    return _new_optimizer(groups, config)


def _new_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    check_known("train.optim.name", config.name, OPTIMIZERS, "an optimizer")
    if misplaced := sorted({"lr", "weight_decay"} & set(config.settings)):
        raise ConfigError(f"train.optim.settings: set {misplaced[0]} as train.optim.{misplaced[0]}")
    try:
        optimizer = OPTIMIZERS[config.name](groups, lr=config.lr, **config.settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"train.optim.settings: {config.name}: {one_line(error)}") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"train.optim.name: {config.name} builds no torch.optim.Optimizer")
    return optimizer


def _of_one_matrix(config: OptimConfig) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """Return a small weight matrix with a gradient of 0, and the optimizer of the settings for it alone."""
    parameter = nn.Parameter(torch.zeros(8, 8))
    parameter.grad = torch.zeros_like(parameter)
    return parameter, _new_optimizer([{"params": [parameter], "weight_decay": config.weight_decay}], config)


def check_names(config: OptimConfig) -> None:
    """Raise ConfigError for an unknown optimizer or schedule, settings that the optimizer does not take, or an
    optimizer that a checkpoint cannot hold.
    """
    parameter, optimizer = _of_one_matrix(config)
    _check_schedule(config.schedule)
    attributes, tensors = _numbers(vars(optimizer)), copy.deepcopy(_tensors(optimizer.param_groups[0]))
    try:
        optimizer.step()  # some settings fail here only
    except Exception as error:  # an optimizer of a plugin may raise any type
        raise ConfigError(f"train.optim.settings: {config.name}: {one_line(error, 200)}") from None
    lost = [
        *(f"state[{key!r}]" for key in optimizer.state if key is not parameter),
        *(f"the attribute {key}" for key, value in _numbers(vars(optimizer)).items() if value != attributes.get(key)),
        *(
            f"the tensor {key} of its groups"
            for key, value in _tensors(optimizer.param_groups[0]).items()
            if not torch.equal(value, tensors[key])
        ),
    ]
    if lost:
        raise ConfigError(
            f"train.optim.name: {config.name} changes {lost[0]} in a step, which no checkpoint holds; keep it in the "
            "state of each parameter, or as a number in the groups"
        )


def _check_schedule(name: str) -> None:
    check_known("train.optim.schedule", name, SCHEDULES, "a schedule")
    for progress in (0.0, 0.5, 1.0):
        try:
            factor = float(SCHEDULES[name](progress))
        except Exception as error:  # a function of a plugin may raise any type
            got = one_line(error, 200, with_type=True)
        else:
            if 0 <= factor < math.inf:
                continue
            got = f"{factor:g}"
        raise ConfigError(
            f"train.optim.schedule: {name}({progress:g}) gives {got}; a schedule is a function from progress, 0 to 1, "
            "to a factor of at least 0"
        )


def is_plain(value: object) -> bool:
    """Return whether state.json holds a value of an optimizer's state or groups."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return isinstance(value, int | float | str | None)


def _tensors(group: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a parameter group."""
    return {key: value for key, value in group.items() if isinstance(value, torch.Tensor)}


def _numbers(attributes: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among attributes; PyTorch's optimizers note in a bool that they have checked parameters."""
    return {key: value for key, value in attributes.items() if type(value) in (int, float)}


def state_size(config: OptimConfig) -> float:
    """Return the number of state values per element of a weight matrix: 2 for AdamW, its moments."""
    parameter, optimizer = _of_one_matrix(config)
    optimizer.step()
    tensors = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() for tensor in tensors if tensor.ndim) / parameter.numel()


def is_capturable(config: OptimConfig) -> bool:
    """Return whether a CUDA graph can capture the optimizer's step, including the skip of non-finite steps."""
    _, optimizer = _of_one_matrix(config)
    return getattr(optimizer, "_step_supports_amp_scaling", False) and "capturable" in optimizer.defaults


def lr_factor(
    step: int, total_steps: int, warmup_steps: int, min_factor: float, shape: Callable[[float], float] = cosine
) -> float:
    """Return the factor of the learning rate in optimizer step `step`, counted from 0.

    Linear from 1 / (warmup + 1) in step 0 to 1 in step `warmup`, then `shape` from 1 to `min_factor` in the last step.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return min_factor + (1 - min_factor) * shape(progress)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, total_steps: int, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Build a scheduler that applies `lr_factor` to every group; step it once per optimizer step. With gradual
    unfreezing the rate of a group of depth d is 0 in the first d * `config.unfreeze_epochs` epochs.

    A rate of `config.lr` ends at `config.min_lr`; those of all groups fall by the same factor. Raises ConfigError
    for an unknown schedule, or if `config.min_lr` is above `config.lr`.
    """
    check_known("train.optim.schedule", config.schedule, SCHEDULES, "a schedule")
    if config.min_lr > config.lr:
        raise ConfigError(f"train.optim.min_lr {config.min_lr:g} is above train.optim.lr {config.lr:g}; lower it")
    shared = partial(
        lr_factor,
        total_steps=total_steps,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        min_factor=config.min_lr / config.lr,
        shape=SCHEDULES[config.schedule],
    )
    begins = [
        round(group.get("depth", 0) * config.unfreeze_epochs * steps_per_epoch) for group in optimizer.param_groups
    ]
    factors: list[Callable[[int], float]] = [
        partial(_from_step, begin, shared) if begin else shared for begin in begins
    ]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def _from_step(begin: int, factor: Callable[[int], float], step: int) -> float:
    return factor(step) if step >= begin else 0.0
