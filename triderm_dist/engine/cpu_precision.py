"""Choose the precision of training on a CPU if `train.precision` is auto: bf16 if a step is measured to be faster.

CPUs without bf16 instructions train in fp32, and so do networks with short steps. For other networks some steps are
timed when the first training of a model starts. The choice is stored in RUN/MODEL/precision.json and is used by all
trainings of the model in this run, also by concurrent ones and by ones that resume on another machine.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from pydantic import BaseModel
from torch import nn

from triderm_dist.checksums import DamagedFile, read_checked_json, write_checked_json
from triderm_dist.config import TrainConfig
from triderm_dist.distributed.parallel import strategy_of
from triderm_dist.environment import cpu_model
from triderm_dist.files import lock_file
from triderm_dist.models.depthwise import use_fast_depthwise
from triderm_dist.models.dropout import use_lesion_masks
from triderm_dist.models.network import Network
from triderm_dist.monitoring.flops import example_inputs
from triderm_dist.schema import CheckpointError

FILE, LOCK = "precision.json", ".precision.lock"
LEAST_GAIN = 1.2
"""Least speed-up of a step in bf16 over fp32 for which bf16 is chosen."""
LEAST_SECONDS = 0.08
"""Least CPU time of a step in fp32 for which bf16 is tried; shorter steps are not dominated by matrix products."""
SECONDS = 1.0
"""Duration of the measurement, after the first steps."""
MAX_PHOTOS = 4
"""Lesions per measured step of a network that takes photos."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Choice(BaseModel):
    precision: Literal["fp32", "bf16"]
    reason: str
    parameters: list[int]


def is_measured(config: TrainConfig, accelerator: Accelerator) -> bool:
    """Return whether the precision of a training is measured. Not with DeepSpeed, whose bf16 changes the weights."""
    on_cpu = accelerator.device.type == "cpu" and strategy_of(accelerator) != "deepspeed"
    return config.precision == "auto" and on_cpu


def choose(network: Network, micro_batch: int, folder: Path) -> tuple[str, str]:
    """Return the precision of the trainings of a model in a run, and the reason.

    Waits if another process is measuring. Trainings of earlier versions without precision.json keep fp32.
    network: not wrapped, on the CPU.  folder: RUN/MODEL.
    Raises CheckpointError for a damaged precision.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        with suppress(OSError):  # a file system without locks
            lock_file(lock)
        return _choose(network, micro_batch, folder)


def _choose(network: Network, micro_batch: int, folder: Path) -> tuple[str, str]:
    file, parameters = folder / FILE, _parameters(network)
    try:
        kept = _Choice.model_validate(read_checked_json(file, _Choice))
        if kept.parameters == parameters:
            return kept.precision, f"{kept.reason}; kept in {FILE}"
    except FileNotFoundError:
        if any(folder.glob("*/fold.json")) or any(folder.glob("*/checkpoints/*")):
            return "fp32", "no GPU; as the earlier trainings of this run"
    except DamagedFile as error:
        raise CheckpointError(f"{file}: {error}; delete it, and set train.precision") from None
    if not has_bf16():
        return "fp32", "no GPU, and this CPU has no instructions for bf16"
    lesions = min(micro_batch, MAX_PHOTOS) if network.holds_towers else micro_batch
    seconds = measure(network, lesions)
    precision, reason = "fp32", "no GPU, and steps are too short to gain from bf16"
    if "bf16" in seconds:
        gain = seconds["fp32"] / seconds["bf16"]
        precision = "bf16" if gain >= LEAST_GAIN else "fp32"
        reason = f"no GPU; bf16 is {gain:.2f} times as fast as fp32 on this CPU"
    about = {"cpu": cpu_model(), "torch": torch.__version__, "seconds": seconds, "parameters": parameters}
    write_checked_json(file, {"precision": precision, "reason": reason, **about})
    return precision, f"{reason}; kept in {FILE}"


def has_bf16() -> bool:
    """Return whether the CPU has instructions for matrix products in bf16."""
    return any(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))


def measure(network: Network, lesions: int) -> dict[str, float]:
    """Return {precision: CPU seconds of a forward and backward pass}, the minimum over alternating runs.

    Only fp32 is measured if it takes less than `LEAST_SECONDS`. CPU time of one thread is independent of the machine's
    load.
    """
    network = copy.deepcopy(network).train()
    use_lesion_masks(network)
    use_fast_depthwise(network)
    with torch.random.fork_rng(devices=[]), _one_thread():
        inputs = [
            torch.rand_like(each) if each.is_floating_point() else each for each in example_inputs(network, lesions)
        ]

        def seconds_of(dtype: torch.dtype) -> float:
            started = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                outputs = network(*inputs)
            torch.stack([logits.square().mean() for logits in outputs.heads]).sum().backward()
            network.zero_grad()
            return time.process_time() - started

        seconds = {"fp32": min(seconds_of(torch.float32) for _ in range(2))}
        if seconds["fp32"] < LEAST_SECONDS:
            return seconds
        seconds["bf16"] = min(seconds_of(torch.bfloat16) for _ in range(2))
        started = time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            for name, dtype in DTYPES.items():
                seconds[name] = min(seconds[name], seconds_of(dtype))
    return seconds


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _parameters(network: nn.Module) -> list[int]:
    """Return the numbers of trained and of all parameters; a stored choice applies to networks with equal numbers."""
    sizes = [(each.numel(), each.requires_grad) for each in network.parameters()]
    return [sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)]
