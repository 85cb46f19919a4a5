"""The numbers of a GPU, in four parts that each keep to a time: python -m benchmarks.gpu part=1 [seconds=540] [...]

1: training steps of three networks, eager, compiled and as a CUDA graph, with 12 and 96 lesions and as many as fit;
   last the tests of tests/gpu. 2: against the build guide's sketch and timm's own ViT, the estimated memory beside the
   measured one, recovery from out of memory. 3: photos: loader, frozen tokens, test-time augmentation, predicting, two
   folds on one GPU. 4: a fold of MILK10k, and XGBoost on the GPU against the CPU.

Nothing is downloaded: towers have random weights. Each measurement (cell) is written to OUTPUT/partN.json as soon as it
is there, and is not repeated by a later call; a cell starts only where its expected time is left. What is compiled is
compiled first, for all cells at once. The last line is one JSON object. `python -m benchmarks.gpu_tables` writes the
tables into docs/benchmarks.md.

python -m benchmarks.gpu profile=base-96-compiled-graph

Prints what the device did in one step of a measured cell of part 1 or 2: kernels by kind, and those that took the most
time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.files import write_text
from triderm_dist.schema import InputError, one_line
from triderm_dist.settings import PathText, Section

RESULTS = "benchmarks/results/gpu"
COMPILING = 0.45
"""Share of the time after which compilations are ended; the cells that need one which was not ready come last."""
FACTS = ("commit", "date", "device", "torch", "peak_tflops", "size")
"""Values of a cell that tell where and when it was measured."""


class GpuBenchmark(Section):
    part: Literal[1, 2, 3, 4] = Field(1, description="part to measure")
    seconds: float = Field(540.0, gt=0, description="time for everything, from the start of the program")
    output: PathText = Field(RESULTS, description="folder of the results")
    cells: str = Field("", description="regular expression: measure only cells whose name it matches from its start")
    size: Literal["full", "tiny"] = Field("full", description="tiny: towers of a few weights, to rehearse")
    shards: PathText | None = Field(None, description="packed photos of MILK10k for parts 3 and 4; null: synthetic")
    weights: PathText | None = Field(None, description="weights of tf_efficientnet_lite0 for part 4; null: random")
    commit: str | None = Field(None, description="commit to record where there is no git")
    profile: str | None = Field(None, description="print the profile of this cell instead")


@dataclass(frozen=True)
class Cell:
    """One measurement: a call of a function of `benchmarks.gpu_cells` or `benchmarks.gpu_photos`.

    seconds: expected on an H100, without compilation.  compiles: the arguments of `compile_once` that it needs.
    """

    name: str
    function: str
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 8.0
    compiles: tuple[str, int] | None = None


def cells_of(config: GpuBenchmark) -> list[Cell]:
    """Return the cells of a part, the most valuable ones first."""
    return {1: steps, 2: comparisons, 3: photos, 4: fold}[config.part](config)


def steps(config: GpuBenchmark) -> list[Cell]:
    sizes: list[tuple[str, int | None]] = [
        ("base", 96), ("base", 12), ("large", 96), ("dual_cnn", 96), ("dual_cnn", 12), ("large", 12),
    ]  # fmt: skip
    cells = [
        training_cell(model, lesions, mode)
        for model, lesions in sizes
        for mode in ("compiled-graph", "eager", "compiled", "graph")
    ]
    most = [
        training_cell(model, None, mode)
        for model in ("base", "large", "dual_cnn")
        for mode in ("compiled-graph", "eager")
    ]
    counts = [Cell(f"flops-{model}", "flops", {"name": model}, 10.0) for model in ("base", "large", "dual_cnn")]
    return [*counts, *cells, *most, Cell("gpu-tests", "gpu_tests", {}, 180.0)]


def training_cell(model: str, lesions: int | None, mode: str) -> Cell:
    """Return the cell of a training step; without lesions, of the largest micro-batch, see `with_largest`."""
    seconds = {"base": 6.0, "large": 9.0, "dual_cnn": 7.0}[model] * (1.0 if lesions else 3.0)
    needs = (model, lesions) if lesions and mode.startswith("compiled") else None
    settings = {"name": model, "lesions": lesions, "mode": mode, "most": lesions is None}
    return Cell(f"{model}-{lesions or 'most'}-{mode}", "training", settings, seconds, needs)


def with_largest(cell: Cell, results: Results) -> Cell:
    """Return the cell with the micro-batch that was estimated to be the largest, where it asks for that."""
    if not cell.settings.get("most"):
        return cell
    largest = results.cells.get(f"flops-{cell.settings['name']}", {}).get("largest", 96)
    return replace(cell, settings={**cell.settings, "lesions": largest})


def comparisons(config: GpuBenchmark) -> list[Cell]:
    batch = 4 if config.size == "tiny" else 96
    against = [
        Cell("ours-compiled-graph", "ours_on_sketch", {"lesions": batch, "mode": "compiled-graph"}, 25.0),
        Cell("sketch-bf16", "guide_sketch", {"lesions": batch, "precision": "bf16"}, 9.0),
        Cell("sketch-fp32", "guide_sketch", {"lesions": batch, "precision": "fp32"}, 25.0),
        Cell("timm-frozen", "timm_vit", {"lesions": batch, "frozen": True}, 25.0),
        Cell("ours-compiled", "ours_on_sketch", {"lesions": batch, "mode": "compiled"}, 12.0),
        Cell("timm-all", "timm_vit", {"lesions": batch, "frozen": False}, 25.0),
        Cell("sketch-tf32", "guide_sketch", {"lesions": batch, "precision": "tf32"}, 12.0),
        Cell("ours-eager", "ours_on_sketch", {"lesions": batch, "mode": "eager"}, 8.0),
        Cell("bare-loop", "bare_loop_on_sketch", {"lesions": batch}, 12.0),
    ]
    recovery = Cell("out-of-memory", "out_of_memory", {}, 60.0)
    memory = memory_cells()
    estimates = [replace(cell, name=cell.name.replace("memory", "estimate"), function="estimate") for cell in memory]
    first = Cell("flops-sketch", "flops", {"name": "sketch"})
    return [first, *against[:5], recovery, *memory, *against[5:], *estimates]


def memory_cells() -> list[Cell]:
    """Return a cell for each different step of the experiment files for GPUs."""
    from triderm_dist.config import Experiment, load, shipped_names

    cells, seen = [], set[str]()
    names = [name for name in shipped_names("experiments") if re.match(r"(milk10k(_large)?$|a100|h100|rtx)", name)]
    for name in [name for name in names if "ddp" not in name]:
        for model, config in load(Experiment, name).models.items():
            train = config.train
            precision = "fp16" if train.precision == "fp16" else "bf16"
            key = f"{config.tower} {train.micro_batch} {train.activation_checkpointing} {precision}"
            if key not in seen:
                seen.add(key)
                settings = {"experiment": name, "model": model}
                cells.append(Cell(f"memory-{name}-{model}", "memory", settings, 8.0 if "large" in name else 5.0))
    return cells


def photos(config: GpuBenchmark) -> list[Cell]:
    batch = 8 if config.size == "tiny" else 96
    many = {"workers": 12}
    base, dual = ("base", batch), ("dual_cnn", batch)
    return [
        Cell("loader-base-8", "loading", {"name": "base", "workers": 8}, 8.0),
        Cell("loader-dual_cnn-8", "loading", {"name": "dual_cnn", "workers": 8}, 8.0),
        Cell("photos-base-8", "training_on_photos", {"name": "base", "lesions": batch, "workers": 8}, 15.0, base),
        Cell("photos-dual_cnn-12", "training_on_photos", {"name": "dual_cnn", "lesions": batch, **many}, 15.0, dual),
        Cell("tokens-base", "tokens", {"name": "base", "compiled": False, **many}, 6.0),
        Cell("tta-base", "test_time", {"name": "base", "transforms": 8, **many}, 12.0),
        Cell("two-base", "trainings_side_by_side", {"name": "base", "lesions": batch, "workers": 6}, 45.0, base),
        Cell("loader-base-4", "loading", {"name": "base", "workers": 4}, 8.0),
        Cell("loader-base-12", "loading", {"name": "base", **many}, 8.0),
        Cell("photos-base-4", "training_on_photos", {"name": "base", "lesions": batch, "workers": 4}, 15.0, base),
        Cell("tta-dual_cnn", "test_time", {"name": "dual_cnn", "transforms": 8, **many}, 12.0),
        Cell(
            "two-dual_cnn", "trainings_side_by_side", {"name": "dual_cnn", "lesions": batch, "workers": 6}, 60.0, dual
        ),
        Cell("tokens-base-compiled", "tokens", {"name": "base", "compiled": True, **many}, 25.0),
        Cell("predict", "predicting", {}, 90.0),
    ]


def fold(config: GpuBenchmark) -> list[Cell]:
    sizes = [(5_000, 60), (50_000, 60), (500_000, 60), (5_000, 1_600), (50_000, 400)]
    return [
        Cell("fold-dual_cnn", "fold", {"model": "dual_cnn", "weights": config.weights}, 120.0),
        *(
            Cell(f"xgboost-{rows}x{columns}", "xgboost", {"rows": rows, "columns": columns}, rows * columns / 1e6 + 5)
            for rows, columns in sizes
        ),
        Cell("fold-trimodal", "fold", {"model": "trimodal", "weights": config.weights}, 150.0),
    ]


class Results:
    """The cells of one part, in OUTPUT/partN.json; several threads may add to it."""

    def __init__(self, config: GpuBenchmark) -> None:
        self.file = Path(config.output) / f"part{config.part}.json"
        self.cells: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        if self.file.is_file():
            self.cells = json.loads(self.file.read_text(encoding="utf-8"))
        self.facts: dict[str, Any] = {"commit": config.commit or commit(), "date": f"{datetime.date.today()}"}
        if config.size == "tiny":
            self.facts["size"] = "tiny"

    def is_done(self, name: str) -> bool:
        return name in self.cells and "error" not in self.cells[name]

    def add(self, name: str, values: dict[str, Any]) -> None:
        gflop = values.get("gflop") or self.cells.get(f"flops-{values.get('model')}", {}).get("gflop")
        if gflop and "lesions_per_s" in values and values.get("peak_tflops"):
            values["mfu"] = round(values["lesions_per_s"] * gflop / (1e3 * values["peak_tflops"]), 4)
        with self._lock:
            self.cells[name] = {**values, **self.facts}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.cells.items())
            write_text(self.file, f"{{\n{text}\n}}\n")
        print(f"{name:<32}{summary(values)}", flush=True)


def summary(values: dict[str, Any]) -> str:
    """Return the values of a cell in one line, without the profile."""
    shown = {key: value for key, value in values.items() if isinstance(value, (int, float, str)) or value is None}
    return "  ".join(
        f"{key} {value}" for key, value in shown.items() if key not in ("commit", "date", "device", "torch")
    )


def main(config: GpuBenchmark) -> None:
    deadline = time.monotonic() + config.seconds
    if config.profile:
        return print_profile(Path(config.output), config.profile)
    results = Results(config)
    wanted = [cell for cell in cells_of(config) if re.match(config.cells, cell.name)]
    todo = [cell for cell in wanted if not results.is_done(cell.name)]
    todo = [with_largest(cell, results) for cell in measure_beforehand(config, results, todo, deadline)]
    while todo:
        todo = measure(config, results, todo, deadline)
    done = [cell.name for cell in wanted if results.is_done(cell.name)]
    left = [cell.name for cell in wanted if cell.name not in results.cells]
    failed = {name: values["error"] for name, values in results.cells.items() if "error" in values}
    print(json.dumps({"part": config.part, "measured": len(done), "not_measured": left, "failed": failed}))


def measure_beforehand(config: GpuBenchmark, results: Results, todo: list[Cell], deadline: float) -> list[Cell]:
    """Compile for all cells at once, and count FLOPs, each in a process of its own; return the cells that are left."""
    counts = [cell for cell in todo if cell.function == "flops"]
    needed = dict.fromkeys(cell.compiles for cell in todo if cell.compiles)
    compiling = [
        Cell(compilation(name, lesions), "compile_once", {"name": name, "lesions": lesions})
        for name, lesions in needed
        if config.size == "full"
    ]
    jobs = [*compiling, *counts]
    threads = max(1, (os.cpu_count() or 1) // max(1, len(jobs)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(2, threads)))
    at_once = len(jobs) if (os.cpu_count() or 1) > 4 else 1
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        found = pool.map(
            lambda job: in_process(config, [job], deadline, lambda name, values: results.add(name, values)), jobs
        )
        list(found)
    return [cell for cell in todo if cell not in counts]


def compilation(name: str, lesions: int) -> str:
    return f"compile-{name}-{lesions}"


def measure(config: GpuBenchmark, results: Results, todo: list[Cell], deadline: float) -> list[Cell]:
    """Measure cells in a new process until one of them fails; return those that are left."""
    reached = in_process(config, todo, deadline, results.add)
    return todo[reached:]


def in_process(config: GpuBenchmark, cells: list[Cell], deadline: float, add: Any) -> int:
    """Measure cells in a new process; return how many are dealt with: measured, failed, or without time left for them.

    A cell that fails ends the process, since an error may leave the device unusable; at the deadline it is killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(cells, config.size, config.shards, deadline, theirs))
    process.start()
    theirs.close()
    dealt, current = 0, None
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            kind, name, values = ours.recv()
            if kind == "start":
                current = name
                continue
            current, dealt = None, dealt + 1
            if kind == "done":
                add(name, values)
        if current:
            add(current, {"error": "the time was over"})
        dealt = len(cells)  # the time is over
    except EOFError:  # the process ended
        if current:
            process.join()
            add(current, {"error": f"its process ended with {process.exitcode}"})
            dealt += 1
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # what it has started, too
        process.kill()
        process.join()
    return dealt


def work(cells: list[Cell], size: str, shards: str | None, deadline: float, pipe: Connection) -> None:
    """Measure cells in this process, a group of its own, and send (kind, name, values): start, skip, done."""
    os.setsid()
    from benchmarks import gpu_cells, gpu_photos

    facts, is_started = gpu_cells.device_facts(), False
    for cell in cells:
        if time.monotonic() + (cell.seconds if size == "full" else 0.0) > deadline:
            pipe.send(("skip", cell.name, None))
            continue
        pipe.send(("start", cell.name, None))
        if not is_started and cell.function not in ("flops", "compile_once"):
            gpu_cells.start_profiler()
            is_started = True
        started = time.perf_counter()
        try:
            settings = {**cell.settings, "size": size}
            if cell.function in gpu_photos.READS_SHARDS:
                settings["shards"] = shards
            function = getattr(gpu_cells, cell.function, None) or getattr(gpu_photos, cell.function)
            values = function(**settings)
        except Exception as error:
            traceback.print_exc()
            pipe.send(("done", cell.name, {"error": one_line(error, 300, with_type=True), **facts}))
            return
        pipe.send(("done", cell.name, {**values, **facts, "cell_s": round(time.perf_counter() - started, 1)}))
        gpu_cells.free_memory()


def print_profile(folder: Path, name: str) -> None:
    """Print the kernels of a measured cell."""
    cells: dict[str, Any] = {}
    for file in sorted(folder.glob("part*.json")):
        cells |= json.loads(file.read_text(encoding="utf-8"))
    if "kinds" not in cells.get(name, {}):
        known = ", ".join(key for key, values in cells.items() if "kinds" in values) or "none"
        raise InputError(f"profile: {name} is not measured in {folder}; with a profile are: {known}")
    print("\n".join(profile_lines(name, cells[name])))


def profile_lines(name: str, cell: dict[str, Any]) -> Iterable[str]:
    yield (
        f"{name} on {cell['device']}: step {cell['step_ms']} ms, device busy {cell['device_ms']} of "
        f"{cell['device_span_ms']} ms, {cell['kernels']} kernels, {cell['copies']} copies, "
        f"{cell['host_calls']} calls by the host"
    )
    total = sum(ms for ms, _ in cell["kinds"].values())
    for kind, (ms, number) in cell["kinds"].items():
        yield f"{ms:>10.3f} ms {ms / total:>6.1%} {number:>6}  {kind}"
    for kernel, number, ms in cell["top"]:
        yield f"{ms:>10.3f} ms {ms / total:>6.1%} {number:>6}  {kernel}"


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    run(GpuBenchmark, main, __doc__)
