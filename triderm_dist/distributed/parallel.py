"""Parallel strategies: one process, DDP, FSDP2 or DeepSpeed ZeRO, chosen by the config file of `accelerate launch`.

Only `wrap` wraps networks, in this order:

1. dropout by lesion (`models.dropout`), so that recomputed blocks repeat their masks without random state; on a CPU
   also depthwise convolutions with a faster gradient (`models.depthwise`);
2. the blocks (`distributed.blocks`): torch.compile, weights cast together, activation checkpointing;
3. autocast around the network (DeepSpeed does its own casting);
4. the strategy: nothing, DDP, `fully_shard` of each block and then of the rest (PyTorch's own: on a CPU Accelerate 1.15
   silently shards nothing), or the DeepSpeed engine;
5. the optimizer, with the parameters after step 4 (FSDP2 replaces them by shards).

Raises if Accelerate silently falls back to another strategy; `check_supported` rejects combinations that cannot work.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from triderm_dist.config import TrainConfig
from triderm_dist.data.threads import available_cores
from triderm_dist.distributed.blocks import prepare_blocks
from triderm_dist.distributed.collectives import all_reduce_sum, world_size
from triderm_dist.distributed.heartbeat import reports_nccl_errors, start_heartbeat
from triderm_dist.distributed.library_errors import permanent_fault
from triderm_dist.distributed.malloc import disable_malloc_trim, use_expandable_segments
from triderm_dist.models.depthwise import use_fast_depthwise
from triderm_dist.models.dropout import use_lesion_masks
from triderm_dist.models.network import Network
from triderm_dist.models.patches import use_linear_patches
from triderm_dist.optim import local_part
from triderm_dist.runtime.extras import DEEPSPEED, require
from triderm_dist.runtime.messages import one_line
from triderm_dist.runtime.rank_variables import OWN
from triderm_dist.schema import ConfigError, InputError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Strategy = Literal["single", "ddp", "fsdp2", "deepspeed"]

ATTEMPT = "TRIDERM_ATTEMPT"
"""Environment variable: number of restarts by `out_of_memory.restart`, equal on all ranks."""
_LAST = "_triderm_last"
"""Attribute of a network under FSDP2: whether it is set up for the last micro-batch of a step. Stored, since each
change visits all modules."""
_FSDP2 = "TRIDERM_FSDP2"
"""Environment variable, set if the launcher asks for FSDP, which is then hidden from Accelerate."""

HARMLESS = (
    # torch 2.14 renames an argument, and functions that DeepSpeed calls; torch 2.11 has the old names only.
    "`broadcast_buffers` is deprecated",
    r"`torch\.distributed\.\w+` is deprecated",
    # DeepSpeed's barriers; `start_inference` has chosen the device.
    r"barrier\(\): using the device under current context",
    # DDP: they differ in dimensions of size 1 only.
    "Grad strides do not match bucket view strides",
    # FSDP2: the features are a view, which nobody writes to.
    "FSDP2-wrapped module .* returned a view tensor",
    # Accelerate puts the optimizer's own `step` back after a scheduler has wrapped it, with fp16.
    r"Seems like `optimizer\.step\(\)` has been overridden",
)
"""Prefixes of expected warnings of libraries, which `wrap` hides."""


def choose_precision(wanted: Precision, device: torch.device | None = None) -> tuple[str, str]:
    """Return (precision, reason) for a device, by default the current one.

    auto on a CPU is fp32; trainings may use bf16 there (`engine.cpu_precision`).
    """
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    if wanted == "fp16" and not cuda:
        raise ConfigError("precision: fp16 needs a GPU; use fp32, bf16 or auto")
    if wanted != "auto":
        return wanted, "as set"
    if not cuda:
        return "fp32", "no GPU"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"{torch.cuda.get_device_name()} computes bf16"
    return "fp16", f"{torch.cuda.get_device_name()} has no bf16; fp16 with loss scaling"


def start_inference(precision: Precision, rank_timeout: float = 600.0) -> Accelerator:
    """Return the Accelerator of this process, for work without optimizer steps.

    rank_timeout: seconds that ranks wait for each other; later calls in a process keep the value of the first.
    Raises MissingPackage without DeepSpeed if the launcher asks for it.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        require("DeepSpeed ZeRO", *DEEPSPEED)
    chosen, _ = choose_precision(precision)
    _hide_fsdp_from_accelerate()
    share_compile_threads(os.environ, available_cores())
    _prepare_device()
    return _join_ranks(chosen, rank_timeout)


def start_training(config: TrainConfig, rank_timeout: float = 600.0) -> Accelerator:
    """Return the Accelerator of a training, see `start_inference`, with its batch split for every strategy, and with
    deterministic algorithms if they are asked for.

    Raises ConfigError if the global batch does not split evenly into ranks times micro-batches.
    """
    if torch.cuda.is_available():
        _use_deterministic_algorithms(config.deterministic)
    accelerator = start_inference(config.precision, rank_timeout)
    accumulation = split_batch(config.global_batch, config.micro_batch, accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.micro_batch
        settings["gradient_accumulation_steps"] = accumulation
        settings["gradient_clipping"] = config.optim.clip_norm
        # torch's fused AdamW steps offloaded states, since DeepSpeed's compiles C++ for minutes.
        settings["zero_force_ds_cpu_optimizer"] = False
        if accelerator.mixed_precision == "bf16" and zero_stage(accelerator) > 1:
            # Otherwise micro-batches and ranks are summed in bf16. (ZeRO 1 would use another optimizer class.)
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            settings["communication_data_type"] = "fp32"
        if config.gradient_precision == "bf16":
            settings["communication_data_type"] = "bf16"
        accelerator.gradient_accumulation_steps = accumulation
    return accelerator


def _prepare_device() -> None:
    """Set up the memory allocator and this rank's GPU; without a GPU, Accelerate and DeepSpeed for the CPU."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        disable_malloc_trim()
    else:
        use_expandable_segments()
        # Before any other use of a GPU: otherwise each rank creates a context of 0.5 GiB on GPU 0.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # Compiling this op takes most of a minute and needs a C++ compiler; gloo does the same.
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.pop("ACCELERATE_USE_CPU", None)  # makes Accelerate silently use DDP instead
    elif on_cpu:
        # Config files are written for GPUs; this lets their processes use gloo on the CPU.
        os.environ["ACCELERATE_USE_CPU"] = "true"


def _join_ranks(precision: str, rank_timeout: float) -> Accelerator:
    """Create the Accelerator, which joins the process group, and start the heartbeat.

    Raises ConfigError if ranks are missing.
    """
    on_cpu = not torch.cuda.is_available()
    # Without an explicit backend DeepSpeed on CPU gives every rank a world size of 1.
    backend = "gloo" if on_cpu else "nccl"
    if reports_nccl_errors():
        # NCCL's watchdog only reports; `heartbeat` ends the process with the right exit code.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    # Versions of NCCL without this option end the process by SIGABRT, a minute later than `heartbeat` does.
    patience = 0 if on_cpu or reports_nccl_errors() else 60
    # Plus a millisecond, since Accelerate passes on only values that differ from its default, which is not gloo's.
    timeout = timedelta(seconds=rank_timeout + patience, milliseconds=1)
    _join_attempt_group(backend, timeout)
    ranks = InitProcessGroupKwargs(backend=backend, timeout=timeout)
    AcceleratorState._reset_state()  # otherwise all models of a run get the first model's precision
    with _naming_missing_ranks():
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[ranks] if "WORLD_SIZE" in os.environ else [],
        )
    start_heartbeat(rank_timeout)
    if accelerator.num_processes != world_size():
        raise ConfigError(
            f"the launcher started {world_size()} processes but this one sees {accelerator.num_processes}; "
            "use one of accelerate_configs/"
        )
    return accelerator


def share_compile_threads(environment: MutableMapping[str, str], cpus: int) -> None:
    """Divide this host's CPUs among its ranks for torch.compile, which by default starts up to 32 processes per rank.

    A number that is already set is kept.
    """
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1:
        environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, max(1, cpus // ranks))))


@contextmanager
def _naming_missing_ranks() -> Iterator[None]:
    """Wrap the rendezvous of the ranks. Raises ConfigError if other ranks are missing and no launcher started this one:
    its environment variables are left over, and a rerun would fail again.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if dist.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ or world_size() == 1 or permanent_fault(error):
            raise
        shown = " ".join(f"{name}={os.environ.get(name, '')}" for name in OWN)
        raise ConfigError(
            f"{shown}: the other ranks did not connect ({one_line(error, 120)}); unset these variables for one "
            "process, or start all ranks by triderm ranks"
        ) from None


def _use_deterministic_algorithms(wanted: bool) -> None:
    """Let PyTorch, cuDNN and cuBLAS use deterministic algorithms on a GPU if `wanted`, else any.

    An operation without a deterministic algorithm raises an error that names it.
    """
    if not wanted and not torch.are_deterministic_algorithms_enabled():
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # Otherwise a kernel fills each new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if wanted:
        import torch._inductor.config as inductor

        torch.backends.cudnn.benchmark = False
        if hasattr(inductor, "deterministic"):  # since PyTorch 2.10: no autotuning, which changes the order of sums
            inductor.deterministic = True


def _join_attempt_group(backend: str, timeout: timedelta) -> None:
    """Create the process group of a restarted attempt.

    The launcher's store survives the replacement of a process and still holds the addresses of the broken group, so
    each attempt uses a different prefix.
    """
    attempt = os.environ.get(ATTEMPT)
    if attempt is None or dist.is_initialized():
        return
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    prefixed = dist.PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=ranks, timeout=timeout)


def _hide_fsdp_from_accelerate() -> None:
    """Record that the launcher asks for FSDP2 and let Accelerate see plain ranks: `wrap` shards."""
    if os.environ.pop("ACCELERATE_USE_FSDP", "false") != "true":
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("fsdp_version: FSDP 1 is not supported; set it to 2, as in accelerate_configs/fsdp2.yaml")
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false") == "true":
        raise ConfigError("fsdp_offload_params: not supported; use accelerate_configs/deepspeed_zero3_offload.yaml")
    os.environ[_FSDP2] = "true"


def strategy_of(accelerator: Accelerator) -> Strategy:
    """Return the parallel strategy of this run. Raises ConfigError for one that is not supported."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return "deepspeed"
    if kind == DistributedType.NO:
        return "single"
    if kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        return "fsdp2" if os.environ.get(_FSDP2) == "true" else "ddp"
    raise ConfigError(f"{kind.value} is not supported; use one process, DDP, FSDP2 or DeepSpeed: accelerate_configs/")


def split_batch(global_batch: int, micro_batch: int, world: int) -> int:
    """Return the micro-batches per rank and step. Raises ConfigError if the split is uneven."""
    if global_batch % (world * micro_batch):
        raise ConfigError(
            f"global_batch {global_batch} is not a multiple of {world} ranks x micro_batch {micro_batch}; "
            "change train.global_batch or train.micro_batch"
        )
    return global_batch // (world * micro_batch)


def zero_stage(accelerator: Accelerator) -> int:
    """Return DeepSpeed's ZeRO stage, 0 for other strategies."""
    plugin = accelerator.state.deepspeed_plugin if strategy_of(accelerator) == "deepspeed" else None
    return int(plugin.zero_stage) if plugin else 0


def check_supported(accelerator: Accelerator, config: TrainConfig) -> None:
    """Raise ConfigError, with the reason, for settings that cannot work with the parallel strategy."""
    chosen, stage = strategy_of(accelerator), zero_stage(accelerator)
    averaged = "ema_decay" if config.ema_decay else "swa_epochs" if config.swa_epochs else None
    if averaged and chosen == "deepspeed":
        raise ConfigError(
            f"train.{averaged}: not supported with DeepSpeed, which keeps the fp32 weights inside its engine; "
            "use DDP or FSDP2, or set it to 0"
        )
    if chosen == "deepspeed" and (config.optim.name != "adamw" or config.optim.settings.get("amsgrad")):
        raise ConfigError(
            "train.optim.name: DeepSpeed flattens the weights, so only adamw (without amsgrad) is supported, not "
            f"{config.optim.name} {config.optim.settings}; use DDP or FSDP2"
        )
    if stage == 3 and config.compile:
        raise ConfigError(
            "train.compile: ZeRO 3 gathers weights in hooks inside each block, which torch.compile cannot trace; "
            "use FSDP2, or set it to false"
        )
    if chosen == "deepspeed" and _offloads(accelerator) and accelerator.device.type == "cpu":
        raise ConfigError("offloading to the host needs a GPU; use accelerate_configs/deepspeed_zero3.yaml")


def _offloads(accelerator: Accelerator) -> bool:
    settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return any(
        settings.get(part, {}).get("device", "none") != "none" for part in ("offload_optimizer", "offload_param")
    )


class Prepared(NamedTuple):
    """A wrapped network and its optimizer. optimizer: that of Accelerate, which takes the steps.  torch_optimizer: the
    one inside it, whose learning rates schedulers set.
    """

    network: nn.Module
    optimizer: Any
    torch_optimizer: torch.optim.Optimizer


def wrap(
    accelerator: Accelerator,
    network: Network,
    build_optimizer: Callable[[Network], torch.optim.Optimizer],
    config: TrainConfig,
) -> Prepared:
    """Wrap a network, and build its optimizer. config: of the training; that of the optimizer is not read.

    Raises ConfigError if the result is not the strategy that the launcher asked for.
    """
    use_lesion_masks(network)
    if accelerator.device.type == "cpu" and not config.compile:
        use_fast_depthwise(network)
    if accelerator.device.type == "cuda":
        use_linear_patches(network)
    prepare_blocks(network, config.activation_checkpointing, config.compile)
    chosen = strategy_of(accelerator)
    wrapped: Any
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)
    if chosen == "deepspeed":
        _refuse_batch_norms(accelerator, network)
        optimizer = build_optimizer(network)
        wrapped, prepared = accelerator.prepare(network, optimizer)
    else:
        wrapped = accelerator.prepare_model(network, evaluation_mode=True)  # adds autocast only
        if chosen == "fsdp2":
            _shard(network, accelerator, config)
        optimizer = build_optimizer(network)
        prepared = accelerator.prepare_optimizer(optimizer, device_placement=False)
        if chosen == "ddp":
            wrapped = _data_parallel(wrapped, accelerator, config)
    _assert_wrapped(chosen, network, wrapped)
    return Prepared(wrapped, prepared, optimizer)


def _refuse_batch_norms(accelerator: Accelerator, network: Network) -> None:
    """Raise ConfigError if DeepSpeed would cast running statistics to 16 bits, in which small updates are lost."""
    if accelerator.mixed_precision != "no" and any(isinstance(each, _BatchNorm) for each in network.modules()):
        raise ConfigError(
            f"train.precision: DeepSpeed would keep the running statistics of batch norms in "
            f"{accelerator.mixed_precision}, where their updates are lost; use DDP or FSDP2, or set it to fp32"
        )


def _data_parallel(network: nn.Module, accelerator: Accelerator, config: TrainConfig) -> nn.Module:
    """Wrap a network in DDP, also with one rank, where Accelerate would not.

    Gradients are views of the all-reduce buckets, which saves a copy. `RunningStatistics` synchronizes buffers.
    """
    devices = [accelerator.device] if accelerator.device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(
        network,
        device_ids=devices,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        bucket_cap_mb=config.bucket_mb,
    )
    if config.gradient_precision == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def _shard(network: Network, accelerator: Accelerator, config: TrainConfig) -> None:
    """`fully_shard` each trained block and then the rest. Frozen weights stay unsharded on every rank: gathering them
    in each forward pass would cost more time than the saved memory is worth.

    Weights and all-gathers are fp32, under autocast, as in DDP: with 16-bit weights a norm would get weights and inputs
    of different precision, which not every device supports. bf16 gradients of micro-batches are summed in bf16, too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "mp_policy": MixedPrecisionPolicy(
            reduce_dtype=torch.bfloat16 if config.gradient_precision == "bf16" else None, cast_forward_inputs=False
        ),
    }
    if "ignored_params" in signature(fully_shard).parameters:  # not in the oldest supported torch: all are sharded
        options["ignored_params"] = {each for each in network.parameters() if not each.requires_grad}
    for block in network.blocks():
        fully_shard(block, reshard_after_forward=_reshards_after_forward(), **options)
    fully_shard(network, **options)


def _reshards_after_forward() -> bool:
    """Return the launcher's `fsdp_reshard_after_forward`: whether blocks free gathered weights after the forward pass
    and gather them again in the backward pass.
    """
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false"


def _assert_wrapped(chosen: Strategy, network: Network, wrapped: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    # By name, since importing DeepSpeed takes seconds.
    expected = {"ddp": "DistributedDataParallel", "deepspeed": "DeepSpeedEngine"}.get(chosen, type(network).__name__)
    sharded = [isinstance(parameter, DTensor) for parameter in wrapped.parameters() if parameter.requires_grad]
    if type(wrapped).__name__ != expected or (not all(sharded) if chosen == "fsdp2" else any(sharded)):
        raise ConfigError(
            f"{chosen}: got a {type(wrapped).__name__} with {sum(sharded)} of {len(sharded)} parameters sharded; "
            "use one of accelerate_configs/"
        )


def unwrap(wrapped: nn.Module) -> nn.Module:
    """Return the network inside DDP or a DeepSpeed engine, whose state dict has canonical keys."""
    return wrapped.module if hasattr(wrapped, "module") else wrapped  # type: ignore[return-value]


def accumulate(accelerator: Accelerator, wrapped: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Return the context of a micro-batch: gradients are all-reduced only in the last one of a step, and until then
    FSDP2 keeps gathered weights.
    """
    accelerator.sync_gradients = last
    chosen = strategy_of(accelerator)
    if chosen == "fsdp2" and getattr(wrapped, _LAST, True) != last:
        wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        wrapped.set_reshard_after_backward(last)  # type: ignore[operator]
        setattr(wrapped, _LAST, last)
    if last or chosen != "ddp":
        return nullcontext()
    return accelerator.no_sync(wrapped)


def backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Backpropagate this rank's part of a loss that is a sum over ranks and micro-batches.

    DDP, FSDP2 and ZeRO average over ranks, and Accelerate or DeepSpeed divide by the micro-batches; the factor undoes
    both. A non-finite loss makes the gradient NaN, so that the norm of the reduced gradient, the same on all
    ranks, shows both.
    """
    factor = accelerator.num_processes * accelerator.gradient_accumulation_steps
    with naming_smallest_scale():
        accelerator.backward(loss * (factor + 0 * loss.detach()))


@contextmanager
def naming_smallest_scale() -> Iterator[None]:
    """Raise InputError in the block instead of the plain Exception of DeepSpeed's fp16 loss scaler."""
    try:
        yield
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise InputError(
            "fp16 gradients are infinite even at DeepSpeed's smallest loss scale; set train.precision=bf16 or fp32"
        ) from None


def clip_grad_norm(accelerator: Accelerator, wrapped: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip the global gradient norm and return the norm before, a scalar on the device, without synchronization.

    DeepSpeed clips inside its engine.
    """
    if strategy_of(accelerator) == "fsdp2":
        accelerator.unscale_gradients()
        return _clip_shards([p.grad for p in wrapped.parameters() if p.grad is not None], max_norm)
    norm = accelerator.clip_grad_norm_(wrapped.parameters(), max_norm)
    return norm if isinstance(norm, torch.Tensor) else torch.tensor(float(norm or 0.0), device=accelerator.device)


@torch.no_grad()
def _clip_shards(gradients: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Clip sharded gradients as `torch.nn.utils.clip_grad_norm_`, with one all-reduce and few kernels."""
    local = [local_part(gradient) for gradient in gradients]
    squares = torch.stack(torch._foreach_norm(local)).square().sum()
    norm = all_reduce_sum(squares).sqrt()
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def reshard_after_write(wrapped: nn.Module) -> None:
    """Free gathered weights under FSDP2, so that the next forward pass uses weights that were written to the shards."""
    if hasattr(wrapped, "reshard"):
        wrapped.reshard()  # type: ignore[operator]
