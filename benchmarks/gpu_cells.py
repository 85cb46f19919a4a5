"""The measurements of `benchmarks.gpu`: each function measures one cell and returns its values, ready for JSON."""

from __future__ import annotations

import copy
import functools
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.step import GIB, TOWERS, Size, TakeStep, bare_loop, random_batch, signature, sketch, training_step
from benchmarks.step import our_network as open_clip_network
from triderm_dist.config import Experiment, ModelConfig, TrainConfig, load
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.monitoring.flops import peak_flops, training_flops
from triderm_dist.monitoring.memory_estimate import estimate_model_memory, network_without_weights

MODELS = {"base": ("milk10k", "trimodal"), "large": ("milk10k_large", "trimodal"), "dual_cnn": ("milk10k", "dual_cnn")}
"""Experiment and model of the experiment."""
MODES = {
    "eager": {"compile": False, "graph": False},
    "compiled": {"compile": True, "graph": False},
    "graph": {"compile": False, "graph": True},
    "compiled-graph": {"compile": True, "graph": True},
}
WARM_UP = 14
"""Steps before a measurement: compilation, and the steps before a graph is captured."""
ROUNDS, ROUND_SECONDS = 3, 0.6
LEFT_FREE = 9 * GIB
"""Memory that `out_of_memory` leaves to the training: enough for a micro-batch of 48 lesions, too little for 96."""
USABLE = 0.92
"""Share of the free memory that the largest batch is to fill."""
GROUPS = {
    "attention": r"flash|fmha|sdpa|attention",
    "convolution": r"conv|wgrad|dgrad|implicit_gemm|cudnn(?!.*softmax)",
    "matrix products": r"gemm|cutlass|nvjet|sm\d+_xmma|cublas",
    "optimizer and clipping": r"multi_tensor|adam|lpnorm",
    "compiled element-wise": r"^triton",
    "copies and casts": r"copy|memcpy|memset|fill|cat",
    "batch and layer norms": r"norm|batch_norm|welford",
    "reductions": r"reduce",
    "element-wise": r"elementwise|vectorized",
}
"""Kinds of kernels by the first pattern that their name matches."""


def device_of(size: str) -> torch.device:
    """Return the GPU; the CPU for a tiny rehearsal where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if size == "tiny":
        return torch.device("cpu")
    raise RuntimeError("there is no GPU; size=tiny rehearses on a CPU")


def device_facts() -> dict[str, Any]:
    """Return what each cell records of the device and the versions."""
    if not torch.cuda.is_available():
        return {"device": "CPU", "torch": torch.__version__}
    device = torch.device("cuda")
    peak = peak_flops(device)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "peak_tflops": peak and round(peak / 1e12),
    }


def model_settings(name: str, size: str, **train: Any) -> ModelConfig:
    """Return the settings of one of `MODELS` with other values of `train`; size: full, or tiny for a rehearsal."""
    experiment, key = MODELS[name]
    model = load(Experiment, experiment).models[key]
    if size == "tiny":
        model = tiny(model)
    return model.model_copy(update={"train": model.train.model_copy(update={"trackers": (), **train})})


def tiny(model: ModelConfig) -> ModelConfig:
    """Return the settings with towers of a few thousand weights."""
    source = "timm:test_efficientnet" if model.kind == "dual_cnn" else "timm:test_vit"
    few = {"source": source, "image_size": 32, "freeze_clinical": 1, "freeze_dermoscopic": 1, "drop_path": None}
    few |= {"lora": None, "pretrained": False}
    return model.model_copy(update={"width": 32, "heads": 2, "tower": model.tower.model_copy(update=few)})


@functools.lru_cache(maxsize=1)
def network_of(model: ModelConfig) -> nn.Module:
    """Build a network with random weights on the CPU; the last one is kept, for copies."""
    torch.manual_seed(0)
    return network_without_weights(model, signature())[0]


def image_side(network: nn.Module) -> int:
    return int(next(iter(network.towers.values())).input_shape[-1])  # type: ignore[operator]


def plain_settings(name: str, size: str) -> ModelConfig:
    """Return the settings by which networks are built and kept; those of `train` do not change them."""
    return model_settings(name, size)


# ------------------------------------------------------------------------------------------------- before measuring


def flops(name: str, size: str) -> dict[str, Any]:
    """Count the FLOPs of one lesion in training, of one of `MODELS` or of ours on the towers of the sketch; for the
    former also estimate the largest micro-batch of an eager step on this device.
    """
    if name == "sketch":
        with tempfile.TemporaryDirectory() as folder:
            network: Any = open_clip_network(sketch_size(size, 2), Path(folder))
        return {"gflop": round(training_flops(network) / 1e9, 3)}
    model = plain_settings(name, size)
    network, values = network_of(model), {}
    if size == "tiny":
        values["largest"] = 16
    elif torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        estimate, _ = estimate_model_memory(model, signature(), half=True)
        values["largest"] = max(8, estimate.largest_of_one(USABLE * total) // 8 * 8)
    return {"gflop": round(training_flops(network) / 1e9, 3), **values}


def compile_once(name: str, lesions: int, size: str) -> dict[str, Any]:
    """Compile a network for one micro-batch, so that a later process finds the kernels in the cache on disk.

    name: one of `MODELS`, sketch (ours on the towers of the sketch), timm-frozen or timm-all.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        if name == "sketch":
            step, _ = step_on_sketch(lesions, "compiled", size, folder)
        elif name.startswith("timm"):
            step = timm_step(lesions, name == "timm-frozen", size)[0]
        else:
            step, _ = trained(name, lesions, size, folder, compile=True, graph=False)
        step()
        synchronize()
    return {"seconds": round(time.perf_counter() - started, 1)}


# ------------------------------------------------------------------------------------------------------ part 1: MFU


def trained(name: str, lesions: int, size: str, folder: Path, **train: Any) -> tuple[TakeStep, torch.device]:
    """Return the step of a training of one of `MODELS`, its recipe included, on photos in the device's memory."""
    device = device_of(size)
    settings = {"micro_batch": lesions, "global_batch": lesions, "precision": "bf16", **train}
    model = model_settings(name, size, **settings)
    bare = network_of(plain_settings(name, size))
    network = copy.deepcopy(bare).to(device)
    batch = random_batch(lesions, image_side(bare), device)
    return training_step(model, network, [batch], device, folder), device


def training(name: str, lesions: int, mode: str, size: str, most: bool = False) -> dict[str, Any]:
    """Measure a training step; lesions: of the one micro-batch.  most: they are as many as are estimated to fit."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        step, device = trained(name, lesions, size, Path(folder), **MODES[mode])
        reset_peak()
        values = measured(step, lesions, device, started, few_steps=most)
    return {"model": name, "lesions": lesions, "mode": mode, "most": most, **values}


def measured(
    step: TakeStep, lesions: int, device: torch.device, started: float, few_steps: bool = False
) -> dict[str, Any]:
    """Return throughput, host time, memory and the kernels of a step."""
    step()
    synchronize()
    first = time.perf_counter() - started
    for _ in range(WARM_UP if not few_steps else 5):
        step()
    synchronize()
    seconds = round_times(step, 1.5 if few_steps else ROUND_SECONDS)
    median = statistics.median(seconds)
    enqueue, cpu = host_times(step)
    values = {
        "lesions_per_s": round(lesions / median, 1),
        "step_ms": round(1e3 * median, 3),
        "spread": round((max(seconds) - min(seconds)) / median, 4),
        "enqueue_ms": round(1e3 * enqueue, 3),
        "host_cpu_ms": round(1e3 * cpu, 3),
        "first_step_s": round(first, 1),
        "peak_gib": gib("max_memory_allocated"),
        "reserved_gib": gib("max_memory_reserved"),
    }
    return values | profile(step)


def round_times(step: TakeStep, seconds: float) -> list[float]:
    """Return the seconds per step of `ROUNDS` rounds, each of about `seconds`."""
    started = time.perf_counter()
    for _ in range(2):
        step()
    synchronize()
    steps = max(2, round(seconds / ((time.perf_counter() - started) / 2)))
    rounds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        rounds.append((time.perf_counter() - started) / steps)
    return rounds


def host_times(step: TakeStep) -> tuple[float, float]:
    """Return the least wall and CPU seconds, all threads, until the host has given a step to an idle device."""
    wall, cpu = [], []
    for _ in range(6):
        synchronize()
        started, before = time.perf_counter(), time.process_time()
        step()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - before)
    return min(wall), min(cpu)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def gib(name: str) -> float | None:
    """Return one of the allocator's numbers in GiB, None without a GPU."""
    return round(getattr(torch.cuda, name)() / GIB, 2) if torch.cuda.is_available() else None


def free_memory() -> None:
    """Give back what a finished cell held."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------- profile


def start_profiler() -> None:
    """Let torch.profiler start the device's tracing, before any graph is captured."""
    if torch.cuda.is_available():
        traced(lambda: torch.ones(8, device="cuda") * 2)


def traced(step: Callable[[], object]) -> list[dict[str, Any]]:
    """Return the events of the device and of CUDA's calls in one step."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            synchronize()
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text(encoding="utf-8"))["traceEvents"]


def profile(step: TakeStep) -> dict[str, Any]:
    """Return what the device does in one step, nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    step()
    synchronize()
    return profile_of(traced(step))


def profile_of(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the kernels among the events of a trace: their number, time, kinds, and those that take the most time."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if event.get("cat") in ("gpu_memcpy", "gpu_memset")]
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    if not kernels:
        return {"host_calls": len(calls) or None}
    work = kernels + copies
    busy, end = 0.0, 0.0
    for event in sorted(work, key=lambda event: event["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    first, last = min(event["ts"] for event in work), max(event["ts"] + event["dur"] for event in work)
    return {
        "kernels": len(kernels),
        "copies": len(copies),
        "host_calls": len(calls),
        "calls": dict(Counter(event["name"] for event in calls).most_common(6)),
        "device_ms": round(busy / 1e3, 3),
        "device_span_ms": round((last - first) / 1e3, 3),
        "kinds": kinds(work),
        "top": top_kernels(work),
    }


def kinds(events: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """Return milliseconds and number of the device's work by kind, most time first."""
    time_of: Counter[str] = Counter()
    number_of: Counter[str] = Counter()
    for event in events:
        name = event["name"].lower()
        kind = next((kind for kind, pattern in GROUPS.items() if re.search(pattern, name)), "other")
        time_of[kind] += event["dur"]
        number_of[kind] += 1
    return {kind: [round(total / 1e3, 3), number_of[kind]] for kind, total in time_of.most_common()}


def top_kernels(events: Iterable[dict[str, Any]], number: int = 16) -> list[list[Any]]:
    """Return name, number and milliseconds of the kernels that take the most time."""
    time_of: Counter[str] = Counter()
    number_of: Counter[str] = Counter()
    for event in events:
        time_of[event["name"]] += event["dur"]
        number_of[event["name"]] += 1
    return [[name[:110], number_of[name], round(total / 1e3, 3)] for name, total in time_of.most_common(number)]


# -------------------------------------------------------------------- part 2: sketch, ceiling, memory, out of memory


def sketch_size(size: str, lesions: int, **changes: Any) -> Size:
    width, layers, side = (64, 7, 32) if size == "tiny" else (*TOWERS["base"], 224)
    settings = {"precision": "bf16", "compile": False, **changes}
    return Size(width, layers, image=side, batch=lesions, **settings)


def guide_sketch(lesions: int, precision: str, size: str) -> dict[str, Any]:
    """Measure the build guide's step: fp32, tf32 (fp32 with TF32 matrix products) or bf16."""
    device, started = device_of(size), time.perf_counter()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        step = sketch(sketch_size(size, lesions), device, bf16=precision == "bf16")
        reset_peak()
        return {"lesions": lesions, **measured(step, lesions, device, started)}
    finally:
        torch.set_float32_matmul_precision("highest")


def ours_on_sketch(lesions: int, mode: str, size: str) -> dict[str, Any]:
    """Measure this toolkit's step on the towers of the sketch, without mixup, EMA and drop path, which it lacks."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        step, device = step_on_sketch(lesions, mode, size, Path(folder))
        reset_peak()
        return {"model": "sketch", "lesions": lesions, "mode": mode, **measured(step, lesions, device, started)}


def step_on_sketch(lesions: int, mode: str, size: str, folder: Path) -> tuple[TakeStep, torch.device]:
    device = device_of(size)
    chosen = sketch_size(size, lesions, compile=MODES[mode]["compile"])
    model = chosen.model(folder)
    train = model.train.model_copy(update={"graph": MODES[mode]["graph"] and device.type == "cuda"})
    model = model.model_copy(update={"train": train})
    network = open_clip_network(chosen, folder).to(device)
    return training_step(model, network, [random_batch(lesions, chosen.image, device)], device, folder), device


def bare_loop_on_sketch(lesions: int, size: str) -> dict[str, Any]:
    """Measure a loop without an engine over this toolkit's network on the towers of the sketch, compiled."""
    device, started = device_of(size), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        step = bare_loop(sketch_size(size, lesions, compile=size != "tiny"), device, Path(name))
        reset_peak()
        return {"lesions": lesions, **measured(step, lesions, device, started)}


def timm_vit(lesions: int, frozen: bool, size: str) -> dict[str, Any]:
    """Measure a plain training step of timm's ViT-B/16 on both photos of each lesion."""
    started = time.perf_counter()
    step, towers, inputs = timm_step(lesions, frozen, size)
    reset_peak()
    values = {"lesions": lesions, "photos": 2 * lesions, **measured(step, lesions, device_of(size), started)}
    return values | {"gflop": round(timm_flops(towers, inputs) / lesions / 1e9, 3)}


def timm_step(lesions: int, frozen: bool, size: str) -> tuple[TakeStep, list[Any], list[torch.Tensor]]:
    """Build a training step in bf16, compiled, with fused AdamW; return also its towers and their photos.

    frozen: two towers, with the patches' embedding and the first 6 and 4 blocks frozen, as in ours; else one tower that
    is trained as a whole on all photos.
    """
    import timm

    device = device_of(size)
    name, side = ("test_vit", 160) if size == "tiny" else ("vit_base_patch16_224", 224)
    torch.manual_seed(0)
    towers: list[Any] = [timm.create_model(name, num_classes=11).to(device) for _ in range(2 if frozen else 1)]
    for tower, blocks in zip(towers, (6, 4) if frozen else (0,), strict=True):
        parts = [tower.patch_embed, *tower.blocks[:blocks]] if blocks else []
        for parameter in [*(p for part in parts for p in part.parameters())]:
            parameter.requires_grad_(False)
        for parameter in (tower.pos_embed, tower.cls_token) if blocks else ():
            if parameter is not None:
                parameter.requires_grad_(False)
    trained_weights = [p for tower in towers for p in tower.parameters() if p.requires_grad]
    gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(trained_weights, lr=1e-4, weight_decay=0.05, fused=True)
    photos = 2 * lesions // len(towers)
    inputs = [torch.randn(photos, 3, side, side, device=device) for _ in towers]
    labels = torch.arange(photos, device=device) % 11
    run = [torch.compile(tower.train(), dynamic=False) if gpu else tower.train() for tower in towers]

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = [nn.functional.cross_entropy(tower(x), labels) for tower, x in zip(run, inputs, strict=True)]
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained_weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, towers, inputs


def timm_flops(towers: list[Any], inputs: list[torch.Tensor]) -> float:
    """Count the FLOPs of a step of plain towers, counted as `training_flops` does."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    total = 0.0
    for tower, x in zip(towers, inputs, strict=True):
        counter = FlopCounterMode(display=False)
        with FakeTensorMode() as mode, sdpa_kernel(SDPBackend.MATH), counter:
            named = [*tower.named_parameters(), *tower.named_buffers()]
            state: dict[str, torch.Tensor] = {name: mode.from_tensor(tensor) for name, tensor in named}
            two = torch.zeros(2, *x.shape[1:], device=x.device)
            torch.func.functional_call(tower, state, (two,)).float().sum().backward()
        total += counter.get_total_flops() / 2 * len(x)
    return total


def of_experiment(experiment: str, model: str, size: str) -> ModelConfig:
    """Return a model of an experiment file whose step is neither compiled nor a graph."""
    config = load(Experiment, experiment).models[model]
    update: dict[str, Any] = {"compile": False, "graph": False, "trackers": ()}
    if size == "tiny":
        config, update = tiny(config), {**update, "micro_batch": 4, "global_batch": 8}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def memory(experiment: str, model: str, size: str) -> dict[str, Any]:
    """Measure the peak memory of a step as an experiment file sets it, on one GPU."""
    device, config = device_of(size), of_experiment(experiment, model, size)
    train = config.train
    accumulation = max(1, train.global_batch // train.micro_batch)
    bare = network_of(config.model_copy(update={"train": TrainConfig()}))
    with tempfile.TemporaryDirectory() as folder:
        network = copy.deepcopy(bare).to(device)
        side = image_side(bare)
        batches = [random_batch(train.micro_batch, side, device) for _ in range(accumulation)]
        step = training_step(config, network, batches, device, Path(folder))
        step()
        reset_peak()
        for _ in range(2):
            step()
        synchronize()
    return {
        "experiment": experiment, "model": model, "micro_batch": train.micro_batch, "accumulation": accumulation,
        "precision": train.precision, "checkpointing": train.activation_checkpointing,
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if device.type == "cuda" else None,
    }  # fmt: skip


def estimate(experiment: str, model: str, size: str) -> dict[str, Any]:
    """Estimate the peak memory of the step that `memory` measures; needs no GPU."""
    config = of_experiment(experiment, model, size)
    found, _ = estimate_model_memory(config, signature(), config.train.precision != "fp32")
    return {"estimate_gib": round(found.step(config.train.micro_batch) / GIB, 3)}


def out_of_memory(size: str) -> dict[str, Any]:
    """Train with a micro-batch that does not fit, since another process holds the rest of the device's memory.

    Recovery is what `triderm train` prints and writes: it halves the micro-batch and ends well.
    """
    device = device_of(size)
    full = size == "full"
    lesions, side = (200, 256) if full else (100, 32)
    source = "timm:vit_base_patch16_224" if full else "timm:test_vit"
    words = [
        "data.folds=2", "train.epochs=1", "train.compile=false", "train.trackers=[]", "train.micro_batch=96",
        "train.global_batch=96", "train.sampling.kind=shuffle", f"models.trimodal.tower.source={source}",
        "models.trimodal.tower.pretrained=false", "model=trimodal",
    ]  # fmt: skip
    if not full:
        words += ["models.trimodal.width=32", "models.trimodal.heads=2", "models.trimodal.tower.image_size=32"]
        words += ["models.trimodal.tower.freeze_clinical=1", "models.trimodal.tower.freeze_dermoscopic=1"]
        words += ["train.micro_batch=8", "train.global_batch=8"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic_shards(folder / "shards", lesions, side)
        held = None
        if device.type == "cuda" and full:
            free, _ = torch.cuda.mem_get_info()
            held = torch.empty(max(0, free - LEFT_FREE), dtype=torch.uint8, device=device)
        started = time.perf_counter()
        command = [sys.executable, "-m", "triderm_dist", "train", "--config", "milk10k", *words]
        command += [f"output={folder / 'run'}", f"data.shards={folder / 'shards'}"]
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        del held
        found = list(folder.glob("run/**/micro_batch.json"))
        kept = json.loads(found[0].read_text(encoding="utf-8"))["micro_batch"] if found else None
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    said = next((line for line in lines if re.search("out of memory|does not fit", line, re.IGNORECASE)), "")
    values = {"exit": done.returncode, "micro_batch_kept": kept, "said": said[:200], "seconds": round(seconds, 1)}
    if done.returncode:
        values["end"] = " | ".join(lines[-3:])[:400]
    return values
