"""Findings on each model of an experiment: precision, batch, memory of a training step, tower weights."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from triderm_dist.config import Experiment, ModelConfig
from triderm_dist.doctor.findings import GIB, Finding, try_import
from triderm_dist.files import size_text
from triderm_dist.schema import InputError, Signature

if TYPE_CHECKING:
    from triderm_dist.distributed.parallel import Strategy

USABLE, USABLE_BY_GRAPH, CONTEXT = 0.92, 0.8, 1.0
"""Usable share of a GPU's memory, considering fragmentation, for eager steps and for CUDA graphs, which keep a memory
pool; and GiB of the CUDA context.
"""


@dataclass(frozen=True)
class Hardware:
    """The hardware of a training. ranks: number of processes.  gpu_memory: GiB of the GPU of each; None on the CPU.
    canvas: of the photos in the shards, see `MemoryEstimate`.
    """

    ranks: int
    strategy: Strategy
    gpu_memory: float | None
    canvas: tuple[int, int] | None = None


def network_findings(experiment: Experiment, signature: Signature, hardware: Hardware) -> list[Finding]:
    """Examine every model of an experiment."""
    return [
        finding
        for name, model in experiment.models.items()
        for finding in (
            _precision(name, model),
            _split(name, model, hardware.ranks),
            _tower(name, model),
            *_init(name, model),
            _memory(name, model, signature, hardware),
        )
    ]


def _precision(name: str, model: ModelConfig) -> Finding:
    parallel = try_import("triderm_dist.distributed.parallel")
    if parallel is None:
        return Finding(f"{name}: precision", "unknown without torch and accelerate")
    try:
        precision, why = parallel.choose_precision(model.train.precision)
    except InputError as error:
        return Finding(f"{name}: precision", str(error), "error", "train.precision=auto")
    return Finding(f"{name}: precision", f"{precision} ({why})")


def _split(name: str, model: ModelConfig, ranks: int) -> Finding:
    batch, micro = model.train.global_batch, model.train.micro_batch
    if batch % (ranks * micro):
        fitting = largest_micro_batch(batch, ranks, micro, model.train.smallest_micro_batch)
        advice = f"train.micro_batch={fitting}" if fitting else f"train.global_batch={ranks * micro}"
        text = f"global batch {batch} is not a multiple of {ranks} ranks x micro-batch {micro}"
        return Finding(f"{name}: batch", text, "error", advice)
    return Finding(f"{name}: batch", f"{batch} = {ranks} rank(s) x {micro} x {batch // (ranks * micro)} accumulated")


def _memory(name: str, model: ModelConfig, signature: Signature, hardware: Hardware) -> Finding:
    """Compare the memory of a training per rank with that of the GPU, if there is one."""
    title = f"{name}: memory"
    if try_import("torch") is None or try_import("timm") is None:
        return Finding(title, "unknown without torch and timm")
    from triderm_dist.monitoring.memory_estimate import estimate_model_memory

    micro, train = model.train.micro_batch, model.train
    half = train.precision in ("bf16", "fp16") or (train.precision == "auto" and hardware.gpu_memory is not None)
    estimate = partial(
        estimate_model_memory, signature=signature, half=half, ranks=hardware.ranks, strategy=hardware.strategy,
        canvas=hardware.canvas,
    )  # fmt: skip
    try:
        need, note = estimate(model)
    except InputError as error:
        return Finding(title, f"not estimated: {error}")
    memory = partial(size_text, binary=True)
    text = (
        f"a training takes about {memory(need.total(micro))} per rank at micro-batch {micro} (weights, their average "
        f"and optimizer {memory(need.fixed)}{', ' if note else ''}{note})"
    )
    if hardware.gpu_memory is None:
        return Finding(title, text)
    graphed = train.graph is not False and hardware.strategy in ("single", "ddp")
    usable = usable_bytes(hardware.gpu_memory, graphed)
    fitting = need.largest(usable, train.smallest_micro_batch)
    if need.total(micro) <= usable:
        fits = f"micro-batches up to {max(micro, fitting or 0)} fit into {hardware.gpu_memory:.0f} GiB"
        return Finding(title, f"{text}; {fits}")
    remedies = [f"train.micro_batch={fitting}"] if fitting else []
    if not train.activation_checkpointing:
        checkpointed = train.model_copy(update={"activation_checkpointing": True})
        if estimate(model.model_copy(update={"train": checkpointed}))[0].total(micro) <= usable:
            remedies.append("train.activation_checkpointing=true")
    advice = " or ".join(remedies) or "a larger GPU, deepspeed_zero3.yaml or fsdp2.yaml on several, or a smaller tower"
    return Finding(title, f"{text}, more than a GPU of {hardware.gpu_memory:.0f} GiB has", "warning", advice)


def usable_bytes(gpu_memory: float, graphed: bool) -> float:
    """Return the bytes of tensors that fit into `gpu_memory` GiB of a GPU. graphed: steps are CUDA graphs."""
    return ((USABLE_BY_GRAPH if graphed else USABLE) * gpu_memory - CONTEXT) * GIB


def largest_micro_batch(global_batch: int, ranks: int, limit: int, smallest: int = 1) -> int | None:
    """Return the largest micro-batch up to `limit`, a multiple of `smallest`, that divides a global batch over ranks;
    None if there is none.
    """
    candidates = range(min(limit, global_batch // ranks), 0, -1)
    fitting = (micro for micro in candidates if global_batch % (ranks * micro) == 0 and micro % smallest == 0)
    return next(fitting, None)


def _tower(name: str, model: ModelConfig) -> Finding:
    title, tower = f"{name}: tower", model.tower
    if try_import("torch") is None:
        return Finding(title, f"{tower.source}; not checked without torch")
    try:
        from triderm_dist.models.towers import locate_weights

        description, is_local = locate_weights(tower.source, tower.pretrained)
    except InputError as error:
        return Finding(title, str(error), "error", "put the weights there, or choose another models.NAME.tower.source")
    except ImportError as error:
        return Finding(title, f"{tower.source}; not checked without {error.name}")
    if is_local:
        return Finding(title, description)
    problem = _hub_problem()
    if problem is None:
        return Finding(title, f"{description}; the first run downloads them")
    advice = "download them elsewhere and use local-dir:PATH or timm:NAME@FILE, or choose tower.pretrained=false"
    return Finding(title, f"{description}, and {problem}", "error", advice)


def _init(name: str, model: ModelConfig) -> list[Finding]:
    """Name the networks from which a training may start, and those of the extra towers; [] without either."""
    if try_import("torch") is None:
        return [Finding(f"{name}: {key}", f"{init}; not checked without torch") for key, init in model.inits.items()]
    findings = []
    for key, init in model.inits.items():
        from triderm_dist.engine.warm_start import find_networks

        title = f"{name}: {key}"
        try:
            networks = find_networks(init, name, key)
        except InputError as error:
            advice = f"train that run first, or remove models.{name}.{key}"
            findings.append(Finding(title, str(error), "error", advice))
        else:
            findings.append(Finding(title, f"{networks[0].run}: {', '.join(each.name for each in networks)}"))
    return findings


def _hub_problem() -> str | None:
    """Return why the Hugging Face hub cannot be reached from this machine; None if it may be."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE forbids a download"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError:
        return f"{address.hostname} cannot be reached"
    return None
