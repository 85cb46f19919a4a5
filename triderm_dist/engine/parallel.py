"""How a network is spread over ranks: one process, DDP or DeepSpeed, as `accelerate launch` says.

The order of wrapping is stated once, here: activation checkpointing of each block, torch.compile of each block, then
DDP or ZeRO around the whole. Checkpointing sits inside compile so that the compiler sees it; compiling block by block
keeps compile time flat with depth and never changes a key of the state dict.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.utils.checkpoint import checkpoint

from triderm_dist.models.network import Network
from triderm_dist.schema import ConfigError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def choose_precision(wanted: Precision, device: torch.device | None = None) -> tuple[str, str]:
    """(precision, why) for a device; the default device if none is given."""
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    if wanted == "fp16" and not cuda:
        raise ConfigError("precision: fp16 needs a GPU; use fp32, bf16 or auto")
    if wanted != "auto":
        return wanted, "as set"
    if not cuda:
        return "fp32", "no GPU: bf16 is slower than fp32 on a CPU"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"{torch.cuda.get_device_name()} computes bf16"
    return "fp16", f"{torch.cuda.get_device_name()} has no bf16; fp16 with loss scaling"


def start(precision: Precision, micro_batch: int, global_batch: int, clip_norm: float) -> Accelerator:
    """The Accelerator of this process, with the precision and the batch split set for every way to run.

    Raises ConfigError where the global batch does not split into ranks times micro-batches.
    """
    chosen, _ = choose_precision(precision)
    on_cpu = not torch.cuda.is_available()
    if on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # Compiling this op takes most of a minute and a C++ compiler; gloo does the same work.
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    elif on_cpu:
        # A launcher that was told of several GPUs starts the processes; this makes them use gloo on the CPU.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = Accelerator(
        mixed_precision="no" if chosen == "fp32" else chosen,
        # Without the backend by name DeepSpeed on CPU lets every rank believe that it is alone.
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and "WORLD_SIZE" in os.environ else [],
    )
    if accelerator.num_processes != world():
        raise ConfigError(
            f"the launcher started {world()} processes but this one sees {accelerator.num_processes}; "
            "use a file of accelerate_configs/"
        )
    accumulation = split_batch(global_batch, micro_batch, accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = micro_batch
        settings["gradient_accumulation_steps"] = accumulation
        settings["gradient_clipping"] = clip_norm
        accelerator.gradient_accumulation_steps = accumulation
    return accelerator


def world() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is rank 0, also before `start`."""
    return int(os.environ.get("RANK", "0")) == 0


def split_batch(global_batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches a rank and step. Raises ConfigError where the split is uneven."""
    if global_batch % (world * micro_batch):
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of {world} ranks x micro_batch {micro_batch}; "
            f"change train.global_batch or train.micro_batch"
        )
    return global_batch // (world * micro_batch)


def wrap(
    accelerator: Accelerator,
    network: Network,
    optimizer: torch.optim.Optimizer,
    activation_checkpointing: bool,
    compile_blocks: bool,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network and optimiser ready to train; raises ConfigError if the result is not what the launcher asked for."""
    for block in network.blocks():
        if activation_checkpointing:
            block.forward = _checkpointed(block.forward)
        if compile_blocks:
            block.compile(dynamic=False)  # shapes never change: the last batch is padded
    prepared: tuple[Any, Any] = accelerator.prepare(network, optimizer)
    # By name, since importing DeepSpeed takes seconds. A way of running that silently became another is an error.
    expected = {
        DistributedType.NO: type(network).__name__,
        DistributedType.MULTI_GPU: "DistributedDataParallel",
        DistributedType.MULTI_CPU: "DistributedDataParallel",
        DistributedType.DEEPSPEED: "DeepSpeedEngine",
    }.get(accelerator.distributed_type)
    if type(prepared[0]).__name__ != expected:
        raise ConfigError(
            f"{accelerator.distributed_type.value} gave a {type(prepared[0]).__name__}; this toolkit runs one process, "
            "DDP or DeepSpeed: see accelerate_configs/"
        )
    return prepared


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, recomputed in the backward pass. A plain function: the compiler skips a partial, silently."""

    def recomputed(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False)

    return recomputed


def unwrap(wrapped: nn.Module) -> nn.Module:
    """The network inside DDP or a DeepSpeed engine, whose state dict has canonical keys."""
    return wrapped.module if hasattr(wrapped, "module") else wrapped  # type: ignore[return-value]


def whole_state(accelerator: Accelerator, wrapped: nn.Module) -> dict[str, torch.Tensor]:
    """All weights under canonical keys; call on all ranks, for ZeRO 3 gathers them."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.get_state_dict(wrapped)
    return unwrap(wrapped).state_dict()


def accumulate(accelerator: Accelerator, wrapped: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients are exchanged at the last micro-batch of a step only."""
    accelerator.sync_gradients = last
    if last or accelerator.distributed_type == DistributedType.DEEPSPEED:
        return nullcontext()
    return accelerator.no_sync(wrapped)


def backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Backpropagate a rank's share of a loss that is a sum over ranks and micro-batches.

    DDP and ZeRO average over ranks, and Accelerate or DeepSpeed divide by the micro-batches: both are undone here,
    once.
    """
    accelerator.backward(loss * (accelerator.num_processes * accelerator.gradient_accumulation_steps))


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
