"""Looks over a machine and an experiment for what would stop a run, and says what to do about it.

Nothing is downloaded, started or written. A check that needs a package says that it is missing instead of failing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import socket
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from triderm_dist.config import DataConfig, Experiment, ModelConfig, TowerConfig
from triderm_dist.schema import InputError

State = Literal["ok", "note", "missing"]
GIB = 2**30
LEAST_DISK = 5 * GIB
"""Below this, checkpoints and tokens of a run may not fit."""
USABLE, CONTEXT = 0.92, 1.0
"""Of a GPU's memory the share that an allocator fills before fragments stop it, and GiB that CUDA itself holds."""
LEAST_SHARED_MEMORY = GIB
"""NCCL between the GPUs of one machine needs about this much of /dev/shm."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination. `missing` stops a run, `note` may spoil one; both say what to do."""

    name: str
    text: str
    state: State = "ok"
    advice: str = ""


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees; memory in bytes."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int]


def examine(
    experiment: Experiment, clone: Path, ranks: int | None = None, gpu_memory: float | None = None
) -> dict[str, list[Finding]]:
    """All findings, by section. clone: the folder that holds launch/experiments and accelerate_configs. ranks: the
    processes to plan for; None takes the machine's GPUs, or one. gpu_memory: GiB of the GPU to plan for; None takes
    the smallest here.
    """
    gpus = find_gpus()
    ranks = ranks or max(1, len(gpus))
    return {
        "software": [*_versions(clone), _nccl(bool(gpus))],
        "machine": [*_devices(gpus), *_memory(len(gpus)), _disk(experiment.folder)],
        "experiment": [
            finding
            for name, model in experiment.models.items()
            for finding in (
                _precision(name, model),
                _split(name, model, ranks),
                _tower(name, model),
                _step_memory(name, model, ranks, gpu_memory or min((gpu.memory / GIB for gpu in gpus), default=None)),
            )
        ],
        "data": [_training_data(experiment), _test_data(experiment)],
        "suits this machine": suggest(gpus, clone),
    }


def missing(findings: dict[str, list[Finding]]) -> list[Finding]:
    """What has to be put right before a run can start."""
    return [finding for section in findings.values() for finding in section if finding.state == "missing"]


# --- software --------------------------------------------------------------------------------------------------------

NEEDED = ("torch", "torchvision", "accelerate", "timm", "open_clip_torch", "xgboost", "pyarrow", "simplejpeg")
OPTIONAL = {"deepspeed": "ZeRO runs", "ray": "tune.search", "optuna": "tune.search"}


def _versions(clone: Path) -> list[Finding]:
    ranges = _required(clone)
    findings = [
        Finding("python", f"{platform.python_version()}  {sys.executable}")
        if sys.version_info >= (3, 11)
        else Finding("python", platform.python_version(), "missing", "install Python 3.11 or newer")
    ]
    good = []
    for name in (*NEEDED, *OPTIONAL):
        found = _distribution(name)
        if found is None:
            if name in OPTIONAL:
                findings.append(
                    Finding(name, f"not installed; {OPTIONAL[name]} needs it", "note", f"pip install {name}")
                )
            else:
                findings.append(Finding(name, "not installed", "missing", f"pip install '{ranges.get(name, name)}'"))
            continue
        distribution, version = found
        text = f"{distribution} {version}"
        if name == "torch":
            text += f" ({_torch_build()})"
        wanted = ranges.get(name)
        if wanted and not _fits(version, wanted):
            advice = f"pip install '{wanted}'"
            findings.append(Finding(name, f"{text}; this version was not tried", "note", advice))
        else:
            good.append(text)
    return [*findings, Finding("packages", ", ".join(good))]


def _distribution(name: str) -> tuple[str, str] | None:
    """(distribution, version) under which a package is installed; xgboost comes under three names."""
    names = ("xgboost-cu13", "xgboost-cpu", "xgboost") if name == "xgboost" else (name,)
    for each in names:
        try:
            return each, importlib.metadata.version(each)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _required(clone: Path) -> dict[str, str]:
    """The ranges of pyproject.toml by package name; empty where they can't be read."""
    try:
        project = tomllib.loads((clone / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        from packaging.requirements import Requirement
    except (OSError, KeyError, ValueError, ImportError):
        return {}
    wanted = {}
    for line in project["dependencies"]:
        requirement = Requirement(line)
        name = requirement.name.removesuffix("-cu13")
        wanted[name] = f"{requirement.name}{requirement.specifier}"
    return wanted


def _fits(version: str, wanted: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(wanted).specifier.contains(version, prereleases=True)


def _torch_build() -> str:
    torch = _import("torch")
    if torch is None:
        return "does not import"
    if torch.version.cuda is None:
        return "CPU build"
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else ()
    return f"CUDA {torch.version.cuda}" + (f", NCCL {'.'.join(map(str, nccl))}" if nccl else "")


def _import(name: str) -> Any:
    """A module, or None where it is not installed or breaks on import."""
    try:
        return importlib.import_module(name)
    except Exception:  # a broken installation raises anything, from ImportError to OSError of a shared library
        return None


def _nccl(gpu: bool) -> Finding:
    """Whether several packages write nvidia/nccl/lib/libnccl.so.2, so that torch may load another's."""
    return nccl_finding(
        sorted(
            f"{distribution.name} {distribution.version}"
            for distribution in importlib.metadata.distributions()
            if (distribution.name or "").startswith("nvidia-nccl")
        ),
        gpu,
    )


def nccl_finding(packages: Sequence[str], gpu: bool) -> Finding:
    """What installed NCCL packages, as `name version`, mean for torch and xgboost."""
    if len(packages) < 2:
        return Finding("NCCL", packages[0] if packages else "none installed; needed by several GPUs only")
    return Finding(
        "NCCL",
        f"{' and '.join(packages)} overwrite each other's libnccl.so.2: xgboost's may replace torch's",
        "missing" if gpu else "note",
        "pip uninstall xgboost nvidia-nccl-cu12; pip install --force-reinstall --no-deps xgboost-cu13 nvidia-nccl-cu13",
    )


# --- machine ---------------------------------------------------------------------------------------------------------


def find_gpus() -> list[Gpu]:
    """The GPUs that torch can use."""
    torch = _import("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    gpus = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        gpus.append(Gpu(about.name, about.total_memory, torch.cuda.mem_get_info(i)[0], (about.major, about.minor)))
    return gpus


def _devices(gpus: Sequence[Gpu]) -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    found = [
        Finding(
            f"GPU {i}",
            f"{gpu.name}, {gpu.free / GIB:.0f} of {gpu.memory / GIB:.0f} GiB free",
            "note" if gpu.free < gpu.memory / 2 else "ok",
            "another process holds it; see nvidia-smi" if gpu.free < gpu.memory / 2 else "",
        )
        for i, gpu in enumerate(gpus)
    ]
    if not gpus and Path("/proc/driver/nvidia/version").exists():
        torch = _import("torch")
        advice = (
            "this torch is a CPU build: install one for CUDA, see pytorch.org"
            if torch and torch.version.cuda is None
            else "see nvidia-smi and CUDA_VISIBLE_DEVICES; a driver older than torch's CUDA gives the same sign"
        )
        found.append(Finding("GPU", "there is one, but torch does not see it", "note", advice))
    elif not gpus:
        found.append(Finding("GPU", "none; runs on the CPU"))
    return [*found, Finding("CPU", f"{cores} cores")]


def _memory(gpus: int) -> list[Finding]:
    psutil = _import("psutil")
    if psutil is None:
        findings = [Finding("memory", "not known without psutil", "note", "pip install psutil")]
    else:
        about = psutil.virtual_memory()
        total, free = about.total, about.available
        if (limit := _cgroup("memory.max")).isdigit() and int(limit) < total:
            used = _cgroup("memory.current")
            total, free = int(limit), min(free, int(limit) - int(used if used.isdigit() else 0))
        low = free < 2 * GIB
        findings = [
            Finding(
                "memory",
                f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
                "note" if low else "ok",
                "close other programs" if low else "",
            )
        ]
    shared = Path("/dev/shm")
    if gpus > 1 and shared.is_dir() and (size := shutil.disk_usage(shared).total) < LEAST_SHARED_MEMORY:
        advice = "start the container with --shm-size=8g"
        findings.append(Finding("/dev/shm", f"{size / 2**20:.0f} MiB, NCCL needs about 1 GiB", "missing", advice))
    return findings


def _cgroup(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _disk(output: Path) -> Finding:
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding("disk", f"{folder} can't be written", "missing", "choose another output=FOLDER")
    free = shutil.disk_usage(folder).free
    low = free < LEAST_DISK
    return Finding(
        "disk",
        f"{free / GIB:.0f} GiB free at {output}",
        "note" if low else "ok",
        "checkpoints and tokens may take more" if low else "",
    )


# --- experiment ------------------------------------------------------------------------------------------------------


def _precision(name: str, model: ModelConfig) -> Finding:
    parallel = _import("triderm_dist.engine.parallel")
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
        fitting = _largest_micro(batch, ranks, micro)
        advice = f"train.micro_batch={fitting}" if fitting else f"train.global_batch={ranks * micro}"
        text = f"global batch {batch} is no multiple of {ranks} ranks x micro-batch {micro}"
        return Finding(f"{name}: batch", text, "missing", advice)
    return Finding(f"{name}: batch", f"{batch} = {ranks} rank(s) x {micro} x {batch // (ranks * micro)} accumulated")


def _step_memory(name: str, model: ModelConfig, ranks: int, gpu_memory: float | None) -> Finding:
    """What a training step takes on each GPU by DDP, against `gpu_memory` GiB, or a PC's memory where that is None."""
    title = f"{name}: memory"
    if _import("torch") is None or _import("timm") is None:
        return Finding(title, "not known without torch and timm")
    from triderm_dist.engine.footprint import of_model

    micro, train = model.train.micro_batch, model.train
    half = train.precision in ("bf16", "fp16") or (train.precision == "auto" and gpu_memory is not None)
    try:
        need, said = of_model(model, half)
    except InputError as error:
        return Finding(title, f"not estimated: {error}")
    text = (
        f"a step takes about {need.total(micro) / GIB:.1f} GiB at micro-batch {micro} on each rank "
        f"(parameters and optimiser {(need.parameters + need.optimizer) / GIB:.1f}, {need.a_lesion / GIB:.3f} for each "
        f"lesion{', ' if said else ''}{said})"
    )
    if gpu_memory is None:
        return Finding(title, text)
    usable = USABLE * gpu_memory - CONTEXT
    fitting = _largest_micro(train.global_batch, ranks, need.largest(usable * GIB))
    if need.total(micro) <= usable * GIB:
        return Finding(title, f"{text}; micro-batches up to {fitting} fit into {gpu_memory:.0f} GiB")
    ways = [f"train.micro_batch={fitting}"] if fitting else []
    if not train.activation_checkpointing:
        lean = of_model(
            model.model_copy(update={"train": train.model_copy(update={"activation_checkpointing": True})}), half
        )[0]
        if lean.total(micro) <= usable * GIB:
            ways.append("train.activation_checkpointing=true")
    advice = " or ".join(ways) or "a larger GPU, deepspeed_zero3.yaml or fsdp2.yaml on several, or a smaller tower"
    return Finding(title, f"{text}, more than a GPU of {gpu_memory:.0f} GiB holds", "note", advice)


def _largest_micro(batch: int, ranks: int, most: int) -> int | None:
    """The largest micro-batch up to `most` that splits a global batch over ranks."""
    return next((micro for micro in range(min(most, batch // ranks), 0, -1) if batch % (ranks * micro) == 0), None)


def _tower(name: str, model: ModelConfig) -> Finding:
    title = f"{name}: tower"
    if _import("torch") is None:
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


# --- data ------------------------------------------------------------------------------------------------------------


def _training_data(experiment: Experiment) -> Finding:
    data = experiment.data
    title, packed = "training", _shards(experiment.train_shards, data)
    if isinstance(packed, str) and (data.shards or Path(experiment.train_shards).exists()):
        return Finding(title, packed, "missing", "pack the challenge folder again, or name other data.shards")
    if not isinstance(packed, str):
        few = min((count for name, count in packed.items() if name != "unlabelled"), default=0)
        text = f"{sum(packed.values())} lesions packed in {experiment.train_shards}; the rarest diagnosis has {few}"
        if packed["unlabelled"] == sum(packed.values()):
            return Finding(title, f"{text}, none has a label", "missing", "pack the folder with its ground truth")
        if few < data.folds:
            return Finding(title, text, "note", f"fewer than data.folds {data.folds}: some folds will lack it")
        return Finding(title, text)
    if data.source is None:
        advice = "data.source=CHALLENGE_FOLDER, data.shards=PACKED_FOLDER, or make a synthetic one: make demo"
        return Finding(title, "neither a challenge folder nor packed shards are named", "missing", advice)
    return _folder(title, data.source, data.missing_view, labels=True)


def _test_data(experiment: Experiment) -> Finding:
    data, title = experiment.data, "test"
    if data.test_truth and not Path(data.test_truth).is_file():
        return Finding(title, f"{data.test_truth}: no such file", "missing", "leave data.test_truth away or correct it")
    packed = _shards(experiment.test_shards, data)
    if not isinstance(packed, str):
        return Finding(title, f"{sum(packed.values())} lesions packed in {experiment.test_shards}")
    if data.test_shards:
        return Finding(title, packed, "missing", "pack the test folder again, or name other data.test_shards")
    if data.test is None:
        return Finding(title, "none named; out-of-fold predictions and report only, no submission")
    return _folder(title, data.test, data.missing_view, labels=False)


def _shards(where: str, data: DataConfig) -> dict[str, int] | str:
    """Lesions by diagnosis of a packed set, or why it can't be read."""
    cache = _import("triderm_dist.data.cache")
    if cache is None:
        return f"{where}: can't be read without pyarrow and pillow"
    try:
        return cache.open_index(where, data.remote).counts()
    except InputError as error:
        return str(error)


def _folder(title: str, folder: str, missing_view: Literal["refuse", "mark"], labels: bool) -> Finding:
    from triderm_dist.data.milk10k import read_challenge

    try:
        dataset = read_challenge(folder, missing_view)
    except InputError as error:
        advice = f"correct data.{'source' if labels else 'test'}; the official layout is expected"
        return Finding(title, str(error), "missing", advice)
    text = f"{len(dataset.lesions)} lesions in {folder}, not packed yet: launch.pipeline does it"
    if labels and not dataset.labelled:
        return Finding(title, f"{folder}: no ground truth", "missing", "put the *_GroundTruth.csv beside the metadata")
    return Finding(title, text)


# --- advice ----------------------------------------------------------------------------------------------------------


def suggest(gpus: Sequence[Gpu], clone: Path) -> list[Finding]:
    """The experiment and the accelerate file of this clone for a machine with these GPUs, and a command to start."""
    count, memory = len(gpus), min((gpu.memory for gpu in gpus), default=0)
    overrides: list[str] = []
    if not gpus:
        experiment = "milk10k_cpu"
    elif count == 1:
        # 70 and 20: what cards sold as 80 and 24 GB hold, with room for a driver's share.
        large, old = memory > 70 * GIB, gpus[0].capability < (8, 9)
        experiment = "a100" if large else "rtx3090" if old or memory < 20 * GIB else "rtx4090"
        if memory < 20 * GIB:
            overrides.append(f"train.micro_batch={_power_of_two(16 * memory / (24 * GIB))}")
    else:
        experiment = "h100x8" if count == 8 and memory > 70 * GIB else "milk10k"
        if experiment == "milk10k":
            fitting = _largest_micro(96, count, _power_of_two(32 * memory / (24 * GIB)))
            overrides += [f"train.micro_batch={fitting}"] if fitting else [f"train.global_batch={count * 16}"]
            overrides += [] if fitting else ["train.micro_batch=16"]
    launcher = "single" if count < 2 else "ddp"
    files = [Path("launch/experiments", f"{experiment}.yaml"), Path("accelerate_configs", f"{launcher}.yaml")]
    findings = [
        Finding(name, f"{file}" if (clone / file).is_file() else f"{file} (not in {clone})")
        for name, file in zip(("experiment", "accelerate file"), files, strict=True)
    ]
    words = ["python -m launch.pipeline", f"--config {files[0]}", *overrides, "data.source=FOLDER"]
    if count > 1:
        words.append(f"launcher={files[1]}")
        if count != 8:
            findings[1] = Finding("accelerate file", f"{files[1]} with num_processes: {count}")
    return [*findings, Finding("start", " ".join(words))]


def _power_of_two(value: float) -> int:
    """The largest power of two up to `value`, at least 1."""
    return 2 ** max(0, math.floor(math.log2(max(1.0, value))))


# --- terminal --------------------------------------------------------------------------------------------------------

MARKS: dict[State, str] = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "missing": "[bold red]✗[/]"}


def print_findings(findings: dict[str, list[Finding]]) -> None:
    """The findings on the terminal, a table a section."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for section, rows in findings.items():
        console.print(f"\n[bold]{section}[/]")
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=3, justify="right")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            text = escape(row.text) + (f"\n[yellow]→ {escape(row.advice)}[/]" if row.advice else "")
            table.add_row(MARKS[row.state], escape(row.name), text)
        console.print(table)
    console.print()
