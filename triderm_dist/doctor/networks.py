"""Each network of an experiment: precision, batch, memory of a step, weights."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from triderm_dist.config import Experiment, ModelConfig, TowerConfig
from triderm_dist.doctor.findings import GIB, Finding, imported
from triderm_dist.schema import InputError

USABLE, CONTEXT = 0.92, 1.0
"""Of a GPU's memory the share that an allocator fills before fragments stop it, and GiB that CUDA itself holds."""


def network_findings(experiment: Experiment, ranks: int, gpu_memory: float | None) -> list[Finding]:
    """All of an experiment's networks for so many ranks, each with a GPU of so many GiB, or on the CPU."""
    return [
        finding
        for name, model in experiment.models.items()
        for finding in (
            _precision(name, model),
            _split(name, model, ranks),
            _tower(name, model),
            _step_memory(name, model, ranks, gpu_memory),
        )
    ]


def _precision(name: str, model: ModelConfig) -> Finding:
    parallel = imported("triderm_dist.distributed.parallel")
    if parallel is None:
        return Finding(f"{name}: precision", "not known without torch and accelerate")
    try:
        precision, why = parallel.choose_precision(model.train.precision)
    except InputError as error:
        return Finding(f"{name}: precision", str(error), "missing", "train.precision=auto")
    return Finding(f"{name}: precision", f"{precision} ({why})")


def _split(name: str, model: ModelConfig, ranks: int) -> Finding:
    batch, micro = model.train.global_batch, model.train.micro_batch
    if batch % (ranks * micro):
        fitting = largest_micro(batch, ranks, micro)
        advice = f"train.micro_batch={fitting}" if fitting else f"train.global_batch={ranks * micro}"
        text = f"global batch {batch} is no multiple of {ranks} ranks x micro-batch {micro}"
        return Finding(f"{name}: batch", text, "missing", advice)
    return Finding(f"{name}: batch", f"{batch} = {ranks} rank(s) x {micro} x {batch // (ranks * micro)} accumulated")


def _step_memory(name: str, model: ModelConfig, ranks: int, gpu_memory: float | None) -> Finding:
    """What a training step takes on each GPU by DDP, against `gpu_memory` GiB, or a PC's memory where that is None."""
    title = f"{name}: memory"
    if imported("torch") is None or imported("timm") is None:
        return Finding(title, "not known without torch and timm")
    from triderm_dist.monitoring.memory_estimate import estimate_model_memory

    micro, train = model.train.micro_batch, model.train
    half = train.precision in ("bf16", "fp16") or (train.precision == "auto" and gpu_memory is not None)
    try:
        need, said = estimate_model_memory(model, half)
    except InputError as error:
        return Finding(title, f"not estimated: {error}")
    text = (
        f"a step takes about {_size(need.total(micro))} at micro-batch {micro} on each rank (parameters and optimizer "
        f"{_size(need.parameters + need.optimizer)}, {_size(need.a_lesion)} for each lesion"
        f"{', ' if said else ''}{said})"
    )
    if gpu_memory is None:
        return Finding(title, text)
    usable = USABLE * gpu_memory - CONTEXT
    fitting = largest_micro(train.global_batch, ranks, need.largest(usable * GIB))
    if need.total(micro) <= usable * GIB:
        return Finding(title, f"{text}; micro-batches up to {max(micro, fitting or 0)} fit into {gpu_memory:.0f} GiB")
    ways = [f"train.micro_batch={fitting}"] if fitting else []
    if not train.activation_checkpointing:
        lean = estimate_model_memory(
            model.model_copy(update={"train": train.model_copy(update={"activation_checkpointing": True})}), half
        )[0]
        if lean.total(micro) <= usable * GIB:
            ways.append("train.activation_checkpointing=true")
    advice = " or ".join(ways) or "a larger GPU, deepspeed_zero3.yaml or fsdp2.yaml on several, or a smaller tower"
    return Finding(title, f"{text}, more than a GPU of {gpu_memory:.0f} GiB holds", "note", advice)


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def largest_micro(batch: int, ranks: int, most: int) -> int | None:
    """The largest micro-batch up to `most` that splits a global batch over ranks."""
    return next((micro for micro in range(min(most, batch // ranks), 0, -1) if batch % (ranks * micro) == 0), None)


def _tower(name: str, model: ModelConfig) -> Finding:
    title = f"{name}: tower"
    if imported("torch") is None:
        return Finding(title, f"{model.tower.source}; not checked without torch")
    try:
        text, reachable = tower_weights(model.tower)
    except InputError as error:
        return Finding(
            title, str(error), "missing", "put the weights there, or choose another models.NAME.tower.source"
        )
    except ImportError as error:
        return Finding(title, f"{model.tower.source}; not checked without {error.name}")
    if reachable:
        return Finding(title, text)
    offline = _hub_problem()
    if offline is None:
        return Finding(title, f"{text}; the first run downloads them")
    advice = "download them elsewhere and use local-dir:PATH or timm:NAME@FILE, or choose tower.pretrained=false"
    return Finding(title, f"{text}, and {offline}", "missing", advice)


def tower_weights(tower: TowerConfig) -> tuple[str, bool]:
    """What a tower will be loaded from, and whether all of it is on this machine.

    Raises InputError where it neither is nor can be downloaded: a file, folder or package that is not there, an unknown
    timm name or source.
    """
    from triderm_dist.models.towers import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
    from triderm_dist.models.weights import WEIGHT_SUFFIXES, weight_file

    source, pretrained = tower.source, tower.pretrained
    kind, _, rest = source.partition(":")
    if kind == "timm":
        import timm

        model, _, file = rest.partition("@")
        if not timm.is_model(model):
            raise InputError(f"{source}: timm {timm.__version__} has no model {model!r}")
        if not pretrained:
            return f"{source}: random weights", True
        if file:
            return f"{source}: found {_existing(weight_file(file)).name}", True
        about = timm.get_pretrained_cfg(model)
        if about is None or not (about.hf_hub_id or about.url or about.file):
            raise InputError(f"{source}: timm has no weights of this model; use timm:NAME@FILE or pretrained=false")
        names = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        cached = about.hf_hub_id and _cached(about.hf_hub_id, names)
        return f"{source}: weights {'cached' if cached else 'not cached'}", bool(cached)
    if kind == "hf-hub":
        cached = _cached(rest, (OPEN_CLIP_CONFIG,)) and (not pretrained or _cached(rest, OPEN_CLIP_WEIGHTS))
        return f"{source}: {'cached' if cached else 'not cached'}", bool(cached)
    if kind == "local-dir":
        folder = Path(rest)
        _existing(folder / OPEN_CLIP_CONFIG)
        weights = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
        if pretrained and not weights:
            raise InputError(f"{source}: the folder has no weight file, {' or '.join(OPEN_CLIP_WEIGHTS[::2])}")
        return f"{source}: found", True
    if Path(source).suffix in WEIGHT_SUFFIXES:
        return f"{_existing(Path(source))}: found", True
    raise InputError(f"tower source {source!r} is unknown: hf-hub:ID, local-dir:PATH, timm:NAME or a checkpoint file")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


def _cached(repository: str, names: Sequence[str]) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)
    except HFValidationError:
        raise InputError(f"hf-hub:{repository}: not a repository id; write hf-hub:OWNER/NAME") from None


def _hub_problem() -> str | None:
    """Why the hub can't be asked from here; None where it may be."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE forbids a download"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError:
        return f"{address.hostname} can't be reached"
    return None
