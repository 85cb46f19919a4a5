"""Cost of a training step on the host: kernels launched, driver calls and their time, waits, compiled blocks.

python -m benchmarks.launches [experiment=h100x8] [micro_batch=12] [memory=false] [key=value ...]

Each mode (eager, compiled, one CUDA graph) is measured in a separate process, on the tri-modal and the dual CNN network
of an experiment, with small towers and without photos. On a GPU `torch.profiler` counts calls. If a module `nullgpu`
(a stub of the GPU's driver that counts calls) can be imported, it counts them, and times are of the host only. The last
line is one JSON object: the figures of the tri-modal network, with `host_waits` the maximum over the modes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import Section

Mode = Literal["eager", "compiled", "graph"]
MODES: tuple[Mode, ...] = ("eager", "compiled", "graph")
WARM_UP = 6
"""Steps before the counted ones: compilation, optimizer states, the capture of the graph."""
GOALS = {"launches_eager": 1300, "launches_compiled": 900, "graph_host_calls": 40, "graph_host_ms": 1.5}
"""At 12 lesions, for the tri-modal network; see docs/benchmarks.md."""


class LaunchesRun(Section):
    experiment: str = Field("h100x8", description="experiment of launch/experiments")
    networks: tuple[str, ...] = Field(("trimodal", "dual_cnn"), description="models of the experiment")
    modes: tuple[Mode, ...] = Field(MODES, description="how steps are executed")
    micro_batch: int = Field(12, ge=1, description="lesions at once")
    micro_batches: int = Field(1, ge=1, description="micro-batches per step")
    steps: int = Field(5, ge=1, description="steps whose host time is measured; the least is taken")
    memory: bool = Field(True, description="also compare the memory estimate with the peaks, by benchmarks.memory")
    part: str | None = Field(None, description="NETWORK:MODE or NETWORK:blocks, in this process; null: all of them")


@dataclass(frozen=True)
class Calls:
    """What the host asked of the GPU. kernels: launched by the host.  calls: of all kinds.  waits: for the GPU."""

    kernels: int
    calls: int
    waits: int


def main(settings: LaunchesRun) -> None:
    import torch

    from triderm_dist.schema import InputError

    if not torch.cuda.is_available():
        raise InputError("benchmarks.launches needs a GPU, or a program that stands in for its driver")
    if settings.part:
        network, _, what = settings.part.partition(":")
        found = compiled_share(settings, network) if what == "blocks" else measure(settings, network, what)  # type: ignore[arg-type]
        print(json.dumps(found))
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; counted by {counter()[0]}")
    print(f"a step of {settings.micro_batches} x {settings.micro_batch} lesions, bf16\n")
    print(f"{'':<24}{'kernels':>9}{'calls':>8}{'waits':>7}{'host ms':>9}{'ms':>9}{'peak GiB':>10}")
    table: dict[str, dict[str, Any]] = {}
    for network in settings.networks:
        for mode in settings.modes:
            row = table[f"{network} {mode}"] = in_a_process(settings, f"{network}:{mode}")
            print(
                f"{network + ', ' + mode:<24}{row['kernels']:>9,}{row['calls']:>8,}{row['waits']:>7}"
                f"{row['host_ms']:>9.2f}{row['ms']:>9.2f}{row['peak_gib']:>10.2f}",
                flush=True,
            )
    shares = [in_a_process(settings, f"{network}:blocks")["share"] for network in settings.networks]
    print(f"\nblocks that run compiled in training, first pass and evaluation: {min(shares):.0%}")
    first, graph = settings.networks[0], table.get(f"{settings.networks[0]} graph", {})
    result = {
        "launches_eager": table.get(f"{first} eager", {}).get("kernels"),
        "launches_compiled": table.get(f"{first} compiled", {}).get("kernels"),
        "graph_host_calls": graph.get("calls"),
        "graph_host_ms": graph.get("host_ms"),
        "host_waits": max((row["waits"] for row in table.values()), default=None),
        "memory_worst_error": memory_error() if settings.memory else None,
        "blocks_compiled": round(min(shares), 4),
    }
    missed = [name for name, goal in GOALS.items() if result[name] is not None and result[name] > goal]
    print(f"above the goal: {', '.join(f'{name} (goal {GOALS[name]})' for name in missed) or 'nothing'}")
    print(json.dumps(result))


def in_a_process(settings: LaunchesRun, part: str) -> dict[str, Any]:
    """Return what the program prints for one part, run as a process of its own."""
    words = [
        f"{name}={json.dumps(value)}" for name, value in settings.model_dump(mode="json").items() if name != "part"
    ]
    return last_line("benchmarks.launches", *words, f"part={part}")


def memory_error() -> float:
    """Return the largest error of the memory estimate; strategies of several ranks need a stub of their GPUs."""
    from benchmarks.memory import is_stub

    words = [] if is_stub() else ["strategies=[single]"]
    return float(last_line("benchmarks.memory", *words)["memory_worst_error"])


def last_line(module: str, *words: str) -> dict[str, Any]:
    """Run a program; return the JSON object that it prints last."""
    from triderm_dist.schema import InputError

    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{module} {' '.join(words)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(settings: LaunchesRun, name: str, mode: Mode) -> dict[str, Any]:
    """Take steps; return the calls of one, and the least host time, time and peak memory of a step."""
    import torch

    take_step = build_step(settings, name, mode)
    for _ in range(WARM_UP):
        take_step()
    torch.cuda.synchronize()
    _, counting = counter()
    with counting() as found:
        take_step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    host, whole = [], []
    for _ in range(settings.steps):
        torch.cuda.synchronize()
        began, cpu = time.perf_counter(), time.process_time()
        take_step()
        host.append(time.process_time() - cpu)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - began)
    (calls,) = found
    return {
        "kernels": calls.kernels,
        "calls": calls.calls,
        "waits": calls.waits,
        "host_ms": round(min(host) * 1e3, 3),
        "ms": round(statistics.median(whole) * 1e3, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
    }


def build_step(settings: LaunchesRun, name: str, mode: Mode) -> Callable[[], Any]:
    """Return a function that takes an optimizer step of a model of the experiment, as the trainer does."""
    from functools import partial

    import numpy as np

    from triderm_dist.data.loader import Step
    from triderm_dist.distributed import parallel
    from triderm_dist.engine.finite import NonFiniteGuard
    from triderm_dist.engine.graph import GraphedStep, on_graph_stream
    from triderm_dist.engine.step import TrainStep
    from triderm_dist.losses import CompoundLoss
    from triderm_dist.monitoring.memory_estimate import network_without_weights
    from triderm_dist.optim import build_optimizer

    model = model_of(settings, name)
    config = model.train
    accelerator = parallel.start_training(config)
    network, _ = network_without_weights(model, signature())
    network = network.to(accelerator.device)
    batches = [synthetic_batch(network, settings.micro_batch) for _ in range(settings.micro_batches)]
    context: AbstractContextManager[None] = on_graph_stream(accelerator.device) if mode == "graph" else nullcontext()
    with context:
        compiled = config.model_copy(update={"compile": mode != "eager"})
        wrapped, prepared, optimizer = parallel.wrap(
            accelerator, network, partial(build_optimizer, config=config.optim), compiled
        )
    wrapped.train()
    classes, heads = len(signature().diagnoses), 1 + len(signature().views)
    loss = CompoundLoss(config.loss, model.head, np.ones(classes), heads).to(accelerator.device)
    train_step: Any = TrainStep(accelerator, wrapped, prepared, loss, config, NonFiniteGuard(accelerator, optimizer))
    if mode == "graph":
        train_step = GraphedStep(train_step, optimizer)
    step = Step(0, config.global_batch, batches, np.arange(settings.micro_batch))
    number, sums = 0, None

    def take_step() -> None:
        nonlocal number, sums
        sums = train_step(step, number, sums).sums
        number += 1

    return take_step


def model_of(settings: LaunchesRun, name: str) -> Any:
    """Return the settings of a model of the experiment, in bf16, for one GPU."""
    from triderm_dist.config import Experiment, load

    model = load(Experiment, f"launch/experiments/{settings.experiment}.yaml", []).models[name]
    sizes = {"micro_batch": settings.micro_batch, "global_batch": settings.micro_batch * settings.micro_batches}
    return model.model_copy(update={"train": model.train.model_copy(update={**sizes, "precision": "bf16"})})


def signature() -> Any:
    """Return what a network of MILK10k's task with MONET's seven concepts per view gets."""
    from triderm_dist.schema import VIEWS
    from triderm_dist.tasks import milk10k_task

    return milk10k_task().signature(tuple(f"{view}/{number}" for view in VIEWS for number in range(7)))


def synthetic_batch(network: Any, lesions: int) -> Any:
    """Return a batch on the network's device, with dropout drawn by lesion."""
    import numpy as np
    import torch

    from triderm_dist.monitoring.flops import example_inputs
    from triderm_dist.schema import Batch

    clinical, dermoscopic, present, concepts, metadata = example_inputs(network, lesions)
    device, random = present.device, np.random.default_rng(0)
    return Batch(
        lesion_ids=[str(number) for number in range(lesions)],
        clinical=clinical.contiguous(memory_format=torch.channels_last),
        dermoscopic=dermoscopic.contiguous(memory_format=torch.channels_last),
        view_present=present.contiguous(),
        concepts=concepts,
        metadata=metadata,
        labels=torch.arange(lesions, device=device) % len(signature().diagnoses),
        valid=torch.ones(lesions, dtype=torch.bool, device=device),
        draws=lambda names: random.integers(0, 2**64, (lesions, len(names)), np.uint64),
    )


def compiled_share(settings: LaunchesRun, name: str) -> dict[str, float]:
    """Return the least share of blocks and other parts that run compiled, in a first pass, training and evaluation.

    The compiler is the real one; its backend only counts the calls of what it captured.
    """
    import torch

    from triderm_dist.distributed.blocks import prepare_blocks
    from triderm_dist.models.dropout import use_lesion_masks
    from triderm_dist.monitoring.flops import example_inputs
    from triderm_dist.monitoring.memory_estimate import network_without_weights

    calls = 0

    def counting_backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def counted(*inputs: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph.forward(*inputs)

        return counted

    model = model_of(settings, name)
    network = network_without_weights(model, signature())[0].to("cuda")
    use_lesion_masks(network)
    checkpointing = model.train.activation_checkpointing
    prepare_blocks(network, checkpointing, compile_blocks=True, backend=counting_backend)
    inputs, shares = example_inputs(network, 2), []
    for training, gradients in ((True, False), (True, True), (False, False)):
        calls = 0
        network.train(training)
        with torch.set_grad_enabled(gradients), torch.autocast("cuda", torch.bfloat16):
            network(*inputs)
        shares.append(calls / (len(network.all_blocks()) + len(network.compiled_methods)))
    return {"share": min(shares)}


def counter() -> tuple[str, Callable[[], AbstractContextManager[list[Calls]]]]:
    """Return what counts calls, and a context that yields a list, to which the calls are added at its end."""
    try:
        import nullgpu
    except ImportError:
        return "torch.profiler", _profiled
    return "nullgpu: no kernel runs, and times are of the host", lambda: _stubbed(nullgpu)


@contextmanager
def _stubbed(stub: Any) -> Iterator[list[Calls]]:
    found: list[Calls] = []
    with stub.counting() as counted:
        yield found
    number: Mapping[str, int] = {name: times for name, (times, _) in counted.items()}
    calls = ("kernels", "graph launches", "cudaM", "copy: ", "event", "stream")
    found.append(
        Calls(
            number.get("kernels", 0),
            sum(times for name, times in number.items() if name.startswith(calls) and name != "kernels captured"),
            sum(times for name, times in number.items() if name.startswith("wait: ")),
        )
    )


_NOT_A_CALL = ("cudaGetDevice", "cudaSetDevice", "cudaGetLastError", "cudaPeekAtLastError", "cudaStreamIsCapturing")
"""Calls of the runtime that only ask the host."""
_LAUNCH = ("cudaLaunchKernel", "cuLaunchKernel")
_WAIT = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")


@contextmanager
def _profiled() -> Iterator[list[Calls]]:
    """Count by PyTorch's profiler, between two marks: it waits for the device itself before and after."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    found: list[Calls] = []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        with record_function("step"):
            yield found
        torch.cuda.synchronize()
    events = profiled.events() or []
    marks = [event.time_range for event in events if event.name == "step" and event.device_type.name == "CPU"]
    begin, end = marks[0].start, marks[0].end
    names = [event.name for event in events if event.name.startswith("cu") and begin <= event.time_range.start <= end]
    found.append(
        Calls(
            sum(name.startswith(_LAUNCH) for name in names),
            sum(not name.startswith(_NOT_A_CALL) for name in names),
            sum(name.startswith(_WAIT) for name in names),
        )
    )


if __name__ == "__main__":
    run(LaunchesRun, main, __doc__)
