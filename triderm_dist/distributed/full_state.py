"""Weights and optimizer state of a running training, whole and by name, whatever the way of running; and back.

Names are those of the network itself (no `module.`, no `_orig_mod.`), tensors are fp32 and whole. So a checkpoint
belongs to no way of running and no number of ranks:

| saved under, resumed under | one process, DDP, FSDP2 | DeepSpeed ZeRO 1, 2, 3 |
| --- | --- | --- |
| one process, DDP, FSDP2 | everything | everything but the average, which DeepSpeed can't keep |
| DeepSpeed ZeRO 1, 2, 3 | everything | everything |

Everything: weights, AdamW's moments and steps, schedule, averaged weights, place in the plan. fp16's loss scale is kept
where Accelerate does the scaling; DeepSpeed starts its own anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from triderm_dist.distributed.parallel import strategy_of, unwrap

Tensors = dict[str, torch.Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, with all shards of a DTensor; call on all ranks."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu()


def participates(accelerator: Accelerator) -> bool:
    """Whether this rank has work in making tensors whole: rank 0 keeps them, and shards need all ranks. Under DDP each
    rank has everything, so that the others would copy it to their host for nothing.
    """
    return accelerator.is_main_process or strategy_of(accelerator) != "ddp"


def local_shard(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, on the device and with the sharding of `like`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device, like.dtype)
    if isinstance(like, DTensor):
        # Every rank has the whole tensor: nothing is sent.
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value.clone()


@torch.no_grad()
def full_weights(accelerator: Accelerator, wrapped: nn.Module) -> Tensors:
    """Everything that the network's own `state_dict` names, in fp32 where DeepSpeed keeps masters; nothing on ranks
    that do not take part. Call on all ranks.
    """
    if not participates(accelerator):
        return {}
    network = unwrap(wrapped)
    if strategy_of(accelerator) != "deepspeed":
        return {name: full_tensor(tensor) for name, tensor in network.state_dict().items()}
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    parameters, result = dict(network.named_parameters()), {}
    for name, tensor in network.state_dict().items():
        parameter = parameters.get(name)
        if parameter is None:
            result[name] = full_tensor(tensor)
        elif parameter.requires_grad:
            result[name] = full_tensor(safe_get_full_fp32_param(parameter))
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                result[name] = full_tensor(parameter).float().clone()
    return result


@torch.no_grad()
def full_optimizer_state(accelerator: Accelerator, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's state as `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME` of each trained parameter; empty before the
    first step and on ranks that do not take part. optimizer: the plain one. Call on all ranks.
    """
    result: Tensors = {}
    if not participates(accelerator):
        return result
    if strategy_of(accelerator) == "deepspeed":
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [state["step"] for state in optimizer.state.values() if "step" in state]
        if not steps:
            return result
        _link_moments(wrapped.optimizer)
        for name, parameter in _trained(wrapped).items():
            result |= {f"{key}/{name}": full_tensor(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}
            result[f"step/{name}"] = torch.tensor(float(steps[0]))
        return result
    for name, parameter in _trained(wrapped).items():
        result |= {f"{key}/{name}": full_tensor(value).clone() for key, value in optimizer.state[parameter].items()}
    return result


@torch.no_grad()
def load_optimizer(
    accelerator: Accelerator, wrapped: nn.Module, optimizer: torch.optim.Optimizer, weights: Tensors, saved: Tensors
) -> None:
    """Load what `full_optimizer_state` gave into a fresh optimizer; `weights` also become the masters that DeepSpeed
    keeps in fp32. optimizer: the plain one. Call on all ranks.
    """
    if strategy_of(accelerator) == "deepspeed":
        _load_deepspeed(wrapped, optimizer, weights, saved)
        return
    for name, parameter in _trained(wrapped).items() if saved else ():
        optimizer.state[parameter] = {
            "step": saved[f"step/{name}"].to(parameter.device),
            **{key: local_shard(saved[f"{key}/{name}"], parameter) for key in MOMENTS},
        }


def _load_deepspeed(
    wrapped: nn.Module, optimizer: torch.optim.Optimizer, weights: Tensors, saved: Mapping[str, torch.Tensor]
) -> None:
    zero: Any = wrapped.optimizer
    device: Any = wrapped.device
    # ZeRO 3 lends its flat partitions to the optimizer for the time of a step only.
    lent = getattr(zero, "fp32_partitioned_groups_flat", None)
    flat = lent or [partition for group in optimizer.param_groups for partition in group["params"]]
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
    """Let ZeRO 1 and 2 find the moments of every group's parameters: DeepSpeed 0.19.8 links them once, after the step
    of the first group, when those of the others do not exist.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _set_deepspeed(parameter: Any, value: torch.Tensor, key: str | None) -> None:
    """Write this rank's part of a parameter's fp32 master, or of a moment of it."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if hasattr(parameter, "ds_id"):  # ZeRO 3; DeepSpeed's own function fails where a part is padded
        size = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        parameter._z3_optimizer.set_local_hp_param(padded.narrow(0, size * dist.get_rank(), size), parameter, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _trained(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in unwrap(wrapped).named_parameters() if parameter.requires_grad}
