"""Gather full weights and optimizer state of a training by canonical name under any strategy, and load them back.

Names are the network's own (no `module.`, no `_orig_mod.`), tensors are full, weights fp32. So a checkpoint
depends neither on the strategy nor on the number of ranks:

| saved under, resumed under | one process, DDP, FSDP2 | DeepSpeed ZeRO 1, 2, 3 |
| --- | --- | --- |
| one process, DDP, FSDP2 | everything | everything but the EMA, which DeepSpeed cannot keep |
| DeepSpeed ZeRO 1, 2, 3 | everything | everything |

Everything: weights, optimizer state, schedule, EMA, position in the epoch plan. fp16's loss scale is kept where
Accelerate scales; DeepSpeed restarts its own. DeepSpeed flattens the weights and supports AdamW only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from triderm_dist.distributed.collectives import is_main
from triderm_dist.distributed.parallel import strategy_of, unwrap
from triderm_dist.optim import is_plain
from triderm_dist.schema import CheckpointError, ConfigError

Tensors = dict[str, torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state under DeepSpeed."""


@dataclass
class OptimizerState:
    """The full state of an optimizer.

    tensors, values: by `KEY/NAME` of each trained parameter, such as `exp_avg/head.linear.weight`; values are plain
    numbers and the like.  groups: entries of the parameter groups that the optimizer has changed.
    """

    tensors: Tensors = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)


def host_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> Tensors:
    """Gather named tensors one after the other and copy each to the host, on rank 0 alone, which is to write them.

    The copies share no memory with the training; empty on other ranks. Call on all ranks.
    """
    result: Tensors = {}
    for name, tensor in tensors:
        full = gathered(tensor)
        if is_main():
            result[name] = full.clone() if full.device.type == "cpu" else full.cpu()
    return result


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor as a full tensor, and any other as it is, without gradient. Call on all ranks."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def participates(accelerator: Accelerator) -> bool:
    """Return whether this rank gathers full tensors.

    Rank 0 writes them, and gathering shards needs all ranks. Under DDP every rank has them, and ranks other than 0
    would only copy them to the host.
    """
    return accelerator.is_main_process or strategy_of(accelerator) != "ddp"


def local_shard(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a full tensor, with the device, dtype and sharding of `like`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device, like.dtype)
    if isinstance(like, DTensor):
        # Every rank has the full tensor: no communication.
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value.clone()


def untrained_tensors(network: nn.Module) -> Tensors:
    """Return the frozen parameters and the buffers of a network by name, as copies on the host of rank 0 alone.

    Call on all ranks before `wrap`: DeepSpeed then casts them to 16 bits.
    """
    trained = _trained(network)
    return host_tensors((name, tensor) for name, tensor in network.state_dict().items() if name not in trained)


def frozen_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are not trained, by name."""
    return {name: each for name, each in network.named_parameters(remove_duplicate=False) if not each.requires_grad}


def full_weights(accelerator: Accelerator, wrapped: nn.Module, untrained: Tensors) -> Tensors:
    """Return the network's full state dict: `changing_weights`, and the frozen parameters out of `untrained`.

    Empty on ranks other than 0. Call on all ranks.
    """
    weights = changing_weights(accelerator, wrapped, untrained)
    return {**{name: untrained[name] for name in frozen_parameters(unwrap(wrapped))}, **weights} if is_main() else {}


@torch.no_grad()
def changing_weights(accelerator: Accelerator, wrapped: nn.Module, untrained: Tensors) -> Tensors:
    """Return the network's full state dict without its frozen parameters, in fp32 where DeepSpeed keeps master weights.

    untrained: what `untrained_tensors` returned. Empty on ranks other than 0. Call on all ranks.
    """
    network = unwrap(wrapped)
    frozen = frozen_parameters(network)
    changing = [(name, tensor) for name, tensor in network.state_dict().items() if name not in frozen]
    if strategy_of(accelerator) == "deepspeed":
        return host_tensors(_deepspeed_weights(network, changing, untrained))
    return host_tensors(changing) if participates(accelerator) else {}


def _deepspeed_weights(
    network: nn.Module, changing: Iterable[tuple[str, torch.Tensor]], untrained: Tensors
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield trained parameters, gathered, and buffers in fp32 by name."""
    from deepspeed.utils import safe_get_full_fp32_param

    trained = _trained(network)
    for name, tensor in changing:
        if name in trained:
            yield name, safe_get_full_fp32_param(trained[name])
        elif is_main():
            yield name, _unrounded(tensor, untrained[name])


def _unrounded(tensor: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return a buffer in its own precision: as it was before DeepSpeed cast it, unless training has changed it."""
    return before if torch.equal(tensor.cpu(), before.to(tensor.dtype)) else tensor.to(before.dtype)


@torch.no_grad()
def full_optimizer_state(
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    initial_groups: list[dict[str, Any]],
) -> OptimizerState:
    """Return the full state of any optimizer; without tensors before the first step and on ranks other than 0.

    optimizer: the plain one.  initial_groups: `group_entries` of it before its first step. Call on all ranks.
    """
    result = OptimizerState()
    if not participates(accelerator):
        return result
    if strategy_of(accelerator) == "deepspeed":
        result.tensors = _full_deepspeed_state(wrapped, optimizer)
        return result
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _trained(wrapped).items():
        for key, value in _leaves(optimizer.state.get(parameter, {})):
            if isinstance(value, torch.Tensor):
                tensors[f"{key}/{name}"] = value
            elif isinstance(value, int | float | str | None):
                result.values[f"{key}/{name}"] = value
            else:
                raise ConfigError(
                    f"train.optim.name: {type(optimizer).__name__} keeps a {type(value).__name__} as state {key!r}, "
                    "which a checkpoint cannot hold; use another optimizer"
                )
    result.tensors = host_tensors(tensors.items())
    groups = [
        {key: value for key, value in now.items() if value != before.get(key)}
        for now, before in zip(group_entries(optimizer), initial_groups, strict=True)
    ]
    result.groups = groups if any(groups) else []
    return result


def group_entries(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the plain entries of each parameter group, such as `betas`, without those that the scheduler sets."""
    return [
        {key: value for key, value in group.items() if key not in ("lr", "initial_lr") and is_plain(value)}
        for group in optimizer.param_groups
    ]


@torch.no_grad()
def load_optimizer_state(
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Tensors,
    saved: OptimizerState,
) -> None:
    """Load what `full_optimizer_state` returned into a fresh optimizer. Call on all ranks.

    optimizer: the plain one.  weights: also become the fp32 master weights that DeepSpeed keeps. Raises CheckpointError
    if the optimizer keeps other state than was saved.
    """
    if strategy_of(accelerator) == "deepspeed":
        _load_deepspeed(wrapped, optimizer, weights, saved.tensors)
        return
    if not saved.tensors and not saved.values:
        return  # saved before the first step
    _create_state(optimizer)
    everything: dict[str, Any] = {**saved.tensors, **saved.values}
    keys_of: dict[str, set[str]] = {}
    for saved_key in everything:
        key, _, name = saved_key.partition("/")
        keys_of.setdefault(name, set()).add(key)
    for name, parameter in _trained(wrapped).items():
        fresh, known = optimizer.state[parameter], keys_of.get(name)
        if not known:
            del optimizer.state[parameter]  # it had no gradient yet
            continue
        created = {key for key, _ in _leaves(fresh)}
        later = {key: everything[f"{key}/{name}"] for key in known - created}
        if created - known or not all(_is_later(key, value, parameter) for key, value in later.items()):
            raise CheckpointError(
                f"{name}: {type(optimizer).__name__} and the checkpoint differ in the optimizer state "
                f"{', '.join(sorted(known ^ created))}; resume with the optimizer that saved it, or set another output"
            )
        optimizer.state[parameter] = _restored(fresh, name, everything) | {
            key: local_shard(value, torch.empty_like(parameter, dtype=value.dtype)) for key, value in later.items()
        }
    for group, entries in zip(optimizer.param_groups, saved.groups or [{}] * len(optimizer.param_groups), strict=True):
        for key, value in entries.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value  # JSON has lists


def _is_later(key: str, value: Any, parameter: torch.Tensor) -> bool:
    """Return whether a part of the state may be one that the optimizer creates after its first step, such as the slow
    weights of Lookahead.
    """
    return "." not in key and isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer create its state, with its own dtypes, devices and sharding.

    It takes one step with gradients and rates of 0, whose effect on weights and groups is undone.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights = [parameter.detach().clone() for parameter in parameters]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
    for group, entries in zip(optimizer.param_groups, groups, strict=True):
        group.update(entries)


def _leaves(state: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, leaf) of nested mappings, lists and tuples."""
    if isinstance(state, Mapping | list | tuple):
        for name, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, state


def _restored(fresh: Any, name: str, saved: Mapping[str, Any], key: str = "") -> Any:
    """Return `fresh`, the state of parameter `name`, with its leaves replaced by the saved ones."""
    prefix = f"{key}." if key else ""
    if isinstance(fresh, Mapping):
        return {part: _restored(value, name, saved, f"{prefix}{part}") for part, value in fresh.items()}
    if isinstance(fresh, list | tuple):
        return type(fresh)(_restored(value, name, saved, f"{prefix}{i}") for i, value in enumerate(fresh))
    value = saved[f"{key}/{name}"]
    return local_shard(value, fresh) if isinstance(fresh, torch.Tensor) else value


def _full_deepspeed_state(wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    from deepspeed.utils import safe_get_full_optimizer_state

    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    if not steps:
        return {}
    _link_moments(wrapped.optimizer)
    trained, step = _trained(wrapped), torch.tensor(float(steps[0]))
    moments = (
        (f"{key}/{name}", safe_get_full_optimizer_state(parameter, key))
        for name, parameter in trained.items()
        for key in MOMENTS
    )
    return host_tensors(moments) | ({f"step/{name}": step.clone() for name in trained} if is_main() else {})


def _load_deepspeed(
    wrapped: nn.Module, optimizer: torch.optim.Optimizer, weights: Tensors, saved: Mapping[str, torch.Tensor]
) -> None:
    zero: Any = wrapped.optimizer
    device: Any = wrapped.device
    # ZeRO 3 gives its flat partitions to the optimizer during a step only.
    zero3 = getattr(zero, "fp32_partitioned_groups_flat", None)
    flat = zero3 or [partition for group in optimizer.param_groups for partition in group["params"]]
    steps = [value for name, value in saved.items() if name.startswith("step/")]
    for partition in flat if steps else ():
        moments = {key: torch.zeros_like(partition) for key in MOMENTS}
        optimizer.state[partition] = {"step": steps[0].clone().to(partition.device), **moments}
    if steps:
        _link_moments(zero)
    for name, parameter in _trained(wrapped).items():
        _set_deepspeed(parameter, weights[name].to(device, torch.float32), None)
        for key in MOMENTS if steps else ():
            _set_deepspeed(parameter, saved[f"{key}/{name}"].to(device), key)


def _link_moments(zero: Any) -> None:
    """Link the moments of every group's parameters under ZeRO 1 and 2: DeepSpeed 0.19.8 links them once, after the
    step of the first group, when the moments of other groups do not exist yet.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set_deepspeed(parameter: Any, value: torch.Tensor, key: str | None) -> None:
    """Write this rank's shard of a parameter's fp32 master weight (key None) or of a moment (key in `MOMENTS`)."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if hasattr(parameter, "ds_id"):  # ZeRO 3; DeepSpeed's own function fails where a shard is padded
        size = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        parameter._z3_optimizer.set_local_hp_param(padded.narrow(0, size * dist.get_rank(), size), parameter, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _trained(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in unwrap(wrapped).named_parameters() if parameter.requires_grad}
