"""The numbers of a GPU, in four parts: python -m benchmarks.gpu [part=1,2,3,4] [seconds=540] [key=value ...]

1: training steps of three networks, eager, compiled and as a CUDA graph, with 12 and 96 lesions and as many as fit.
2: against the build guide's sketch and timm's own ViT; the memory of the experiment files, estimated and measured;
   recovery from out of memory.
3: photos: loader, frozen tokens, test-time augmentation, predicting, two trainings on one GPU.
4: a fold of MILK10k, and XGBoost on the GPU against the CPU.

Nothing is downloaded: towers have random weights. Each measurement (cell) is written to OUTPUT/partN.json as soon as it
is there, and is not repeated by a later call. The most valuable cells of all parts come first, and a cell starts only
where its expected time is left. Before, all that is to be compiled is compiled at once, in processes of their own. The
last line is one JSON object. `python -m benchmarks.gpu_tables` writes the tables into docs/benchmarks.md.

python -m benchmarks.gpu profile=base-96-compiled-graph

Prints what the device did in one step of a measured cell of part 1 or 2: kernels by kind, and those that took the most
time.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.environment import describe_commit
from triderm_dist.files import write_text
from triderm_dist.runtime.child_processes import environment_variables
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import InputError
from triderm_dist.settings import PathText, Section

RESULTS = "benchmarks/results/gpu"
COMPILING = 0.45
"""Share of the time after which compilations are ended; the cells that need one which was not ready come last."""
COMPILE_THREADS = 4
"""Cores for each of the compilations that run at once."""
SECONDS_TO_END = 4.0
"""Time that a training which does not end in time, and the traceback of a cell that does not, are given."""
FACTS = ("commit", "date", "device", "torch", "peak_tflops", "size")
"""Values of a cell that tell where and when it was measured."""


class GpuBenchmark(Section):
    part: tuple[Literal[1, 2, 3, 4], ...] = Field((1, 2, 3, 4), min_length=1, description="parts to measure")
    seconds: float = Field(540.0, gt=0, description="time for everything, from the start of the program")
    output: PathText = Field(RESULTS, description="folder of the results")
    cells: str = Field("", description="regular expression: measure only cells whose name it matches from its start")
    size: Literal["full", "tiny"] = Field("full", description="tiny: towers of a few weights, to rehearse")
    shards: PathText | None = Field(None, description="packed photos of MILK10k for parts 3 and 4; null: synthetic")
    weights: PathText | None = Field(None, description="weights of tf_efficientnet_lite0 for part 4; null: random")
    prepare: bool = Field(False, description="only do what comes before measuring: compile, and count FLOPs")
    commit: str | None = Field(None, description="commit to record where there is no git")
    profile: str | None = Field(None, description="print the profile of this cell instead")


@dataclass(frozen=True)
class Cell:
    """One measurement: a call of a function of `benchmarks.gpu_cells` or `benchmarks.gpu_photos`.

    seconds: expected on an H100, without compilation.  compiles: the arguments of `compile_once` that it needs.
    rank: 0 and 1 are measured first.
    """

    part: int
    rank: int
    name: str
    function: str
    settings: dict[str, Any]
    seconds: float
    compiles: tuple[str, int] | None = None


def cells_of(config: GpuBenchmark) -> list[Cell]:
    """Return the cells of the parts, the most valuable ones first."""
    cells = [cell for part in config.part for cell in {1: steps, 2: comparisons, 3: photos, 4: fold}[part](config)]
    return sorted(cells, key=lambda cell: cell.rank)


def steps(config: GpuBenchmark) -> list[Cell]:
    cells = [Cell(1, 0, f"flops-{model}", "flops", {"name": model}, 10.0) for model in ("base", "large", "dual_cnn")]
    for model, lesions, best, others in (
        ("base", 96, 1, 1), ("base", 12, 1, 1), ("large", 96, 1, 4), ("dual_cnn", 96, 1, 4), ("dual_cnn", 12, 4, 5),
        ("large", 12, 4, 5), ("base", None, 4, 5), ("large", None, 4, 5), ("dual_cnn", None, 4, 5),
    ):  # fmt: skip
        for mode in ("compiled-graph", "eager", "compiled", "graph"):
            if lesions or mode in ("compiled-graph", "eager"):
                rank = best if mode in ("compiled-graph", "eager") else others
                cells.append(training_cell(rank, model, lesions, mode))
    return cells


def training_cell(rank: int, model: str, lesions: int | None, mode: str) -> Cell:
    """Return the cell of a training step; without lesions, of the largest micro-batch, see `with_largest`."""
    seconds = {"base": 6.0, "large": 10.0, "dual_cnn": 8.0}[model] * (1.0 if lesions else 3.0)
    needs = (model, lesions) if lesions and mode.startswith("compiled") else None
    settings = {"name": model, "lesions": lesions, "mode": mode, "most": lesions is None}
    return Cell(1, rank, f"{model}-{lesions or 'most'}-{mode}", "training", settings, seconds, needs)


def with_largest(cell: Cell, results: Results) -> Cell:
    """Return the cell with the micro-batch that was estimated to be the largest, where it asks for that."""
    if not cell.settings.get("most"):
        return cell
    largest = results.cells.get(f"flops-{cell.settings['name']}", {}).get("largest", 96)
    return replace(cell, settings={**cell.settings, "lesions": largest})


def comparisons(config: GpuBenchmark) -> list[Cell]:
    batch = 4 if config.size == "tiny" else 96
    compiles = {name: (name, batch) for name in ("sketch", "timm-frozen", "timm-all")}

    def cell(rank: int, name: str, function: str, seconds: float, compiled: str = "", **settings: Any) -> Cell:
        return Cell(2, rank, name, function, {"lesions": batch, **settings}, seconds, compiles.get(compiled))

    memory = memory_cells()
    return [
        Cell(2, 0, "flops-sketch", "flops", {"name": "sketch"}, 10.0),
        cell(1, "ours-compiled-graph", "ours_on_sketch", 12.0, "sketch", mode="compiled-graph"),
        cell(1, "sketch-bf16", "guide_sketch", 8.0, precision="bf16"),
        cell(1, "timm-frozen", "timm_vit", 12.0, "timm-frozen", frozen=True),
        cell(1, "sketch-fp32", "guide_sketch", 20.0, precision="fp32"),
        cell(4, "ours-compiled", "ours_on_sketch", 8.0, "sketch", mode="compiled"),
        cell(4, "timm-all", "timm_vit", 12.0, "timm-all", frozen=False),
        cell(4, "sketch-tf32", "guide_sketch", 12.0, precision="tf32"),
        cell(4, "ours-eager", "ours_on_sketch", 7.0, mode="eager"),
        cell(4, "bare-loop", "bare_loop_on_sketch", 8.0, "sketch"),
        *memory,
        Cell(2, 3, "out-of-memory", "out_of_memory", {}, 45.0),
        *(
            replace(each, rank=6, name=each.name.replace("memory", "estimate"), function="estimate", seconds=20.0)
            for each in memory
        ),
    ]


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
                seconds = 8.0 if "large" in name else 5.0
                cells.append(Cell(2, 2, f"memory-{name}-{model}", "memory", settings, seconds))
    return cells


def photos(config: GpuBenchmark) -> list[Cell]:
    batch = 8 if config.size == "tiny" else 96

    def cell(rank: int, name: str, function: str, model: str, workers: int, seconds: float, **settings: Any) -> Cell:
        trains = function in ("training_on_photos", "trainings_side_by_side")
        settings |= {"name": model, "workers": workers} | ({"lesions": batch} if trains else {})
        return Cell(3, rank, name, function, settings, seconds, (model, batch) if trains else None)

    return [
        cell(2, "loader-base-8", "loading", "base", 8, 8.0),
        cell(2, "loader-dual_cnn-8", "loading", "dual_cnn", 8, 8.0),
        cell(2, "photos-base-8", "training_on_photos", "base", 8, 16.0),
        cell(2, "photos-dual_cnn-8", "training_on_photos", "dual_cnn", 8, 18.0),
        cell(2, "tokens-base", "tokens", "base", 12, 6.0, compiled=False),
        cell(2, "tta-base", "test_time", "base", 12, 12.0, transforms=8),
        cell(4, "two-base", "trainings_side_by_side", "base", 6, 45.0),
        cell(4, "loader-base-4", "loading", "base", 4, 8.0),
        cell(4, "loader-base-12", "loading", "base", 12, 8.0),
        cell(4, "photos-base-4", "training_on_photos", "base", 4, 16.0),
        cell(4, "tta-dual_cnn", "test_time", "dual_cnn", 12, 12.0, transforms=8),
        cell(5, "two-dual_cnn", "trainings_side_by_side", "dual_cnn", 6, 50.0),
        cell(5, "tokens-base-compiled", "tokens", "base", 12, 25.0, compiled=True),
        Cell(3, 5, "predict", "predicting", {}, 90.0),
    ]


def fold(config: GpuBenchmark) -> list[Cell]:
    fits = [(2, 5_000, 60), (2, 500_000, 60), (4, 50_000, 60), (4, 5_000, 1_600), (4, 50_000, 400)]
    return [
        *(
            Cell(4, rank, f"xgboost-{rows}x{columns}", "xgboost", {"rows": rows, "columns": columns}, 6 + rows / 50_000)
            for rank, rows, columns in fits
        ),
        Cell(4, 3, "fold-dual_cnn", "fold", {"model": "dual_cnn", "weights": config.weights}, 80.0),
        Cell(4, 5, "fold-trimodal", "fold", {"model": "trimodal", "weights": config.weights}, 100.0),
    ]


class Results:
    """The cells of all parts, in OUTPUT/partN.json; several threads may add to them."""

    def __init__(self, config: GpuBenchmark) -> None:
        self.folder = Path(config.output)
        self._lock = threading.Lock()
        self.parts: dict[int, dict[str, dict[str, Any]]] = {part: self._read(part) for part in range(1, 5)}
        self.facts: dict[str, Any] = {
            "commit": config.commit or describe_commit() or "unknown",
            "date": f"{datetime.date.today()}",
        }
        if config.size == "tiny":
            self.facts["size"] = "tiny"

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        return {name: values for cells in self.parts.values() for name, values in cells.items()}

    def is_done(self, name: str) -> bool:
        return "error" not in self.cells.get(name, {"error": ""})

    def add(self, part: int, name: str, values: dict[str, Any]) -> None:
        trained = values.get("model") if "mode" in values else None
        gflop = values.get("gflop") or self.cells.get(f"flops-{trained}", {}).get("gflop")
        if gflop and "lesions_per_s" in values and values.get("peak_tflops"):
            values["mfu"] = round(values["lesions_per_s"] * gflop / (1e3 * values["peak_tflops"]), 4)
        with self._lock:
            cells = self.parts[part]
            cells[name] = {**values, **self.facts}
            self.folder.mkdir(parents=True, exist_ok=True)
            text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in cells.items())
            write_text(self._file(part), f"{{\n{text}\n}}\n")
        print(f"{name:<28}{summary(values)}", flush=True)

    def _file(self, part: int) -> Path:
        return self.folder / f"part{part}.json"

    def _read(self, part: int) -> dict[str, dict[str, Any]]:
        file = self._file(part)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def summary(values: dict[str, Any]) -> str:
    """Return the values of a cell in one line, without the profile."""
    shown = {key: value for key, value in values.items() if isinstance(value, (int, float, str))}
    return "  ".join(f"{key} {value}" for key, value in shown.items() if key not in FACTS)


def main(config: GpuBenchmark) -> None:
    deadline = time.monotonic() + config.seconds
    if config.profile:
        return print_profile(Path(config.output), config.profile)
    results = Results(config)
    wanted = [cell for cell in cells_of(config) if re.match(config.cells, cell.name)]
    todo = [cell for cell in wanted if not results.is_done(cell.name)]
    todo = [with_largest(cell, results) for cell in measure_beforehand(config, results, todo, deadline)]
    while todo and not config.prepare:
        todo = todo[in_process(config, results, todo, deadline) :]
    done = [cell.name for cell in wanted if results.is_done(cell.name)]
    left = [cell.name for cell in wanted if cell.name not in results.cells]
    failed = {name: values["error"][:80] for name, values in results.cells.items() if "error" in values}
    print(json.dumps({"measured": len(done), "not_measured": left, "failed": failed}))


def measure_beforehand(config: GpuBenchmark, results: Results, todo: list[Cell], deadline: float) -> list[Cell]:
    """Count FLOPs and compile for all cells, the most valuable ones first, in processes of their own, some at once;
    return the cells that are left.

    Those whose compilation was not ready in time, and has to be repeated, come last.
    """
    counts = [cell for cell in todo if cell.function == "flops"]
    needed = dict.fromkeys(cell.compiles for cell in todo if cell.compiles)
    compiling = [compilation(*each) for each in needed if config.size == "full"]
    jobs = [job for job in (*counts, *compiling) if not results.is_done(job.name)]
    at_once = max(1, (os.cpu_count() or 1) // COMPILE_THREADS)
    soon = deadline if config.prepare else time.monotonic() + COMPILING * (deadline - time.monotonic())
    # Without limits, thirteen processes with a thread of OpenMP and of the compiler for each core finished nothing in
    # 80 s on 16 cores, where two took 27 s.
    limits = {"TORCHINDUCTOR_COMPILE_THREADS": f"{COMPILE_THREADS}", "OMP_NUM_THREADS": "1"}
    with environment_variables(limits), ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda job: in_process(config, results, [job], soon), jobs))
    rest = [cell for cell in todo if cell not in counts]
    late = [cell for cell in rest if cell.compiles and not results.is_done(compilation(*cell.compiles).name)]
    return [*(cell for cell in rest if cell not in late), *late]


def compilation(name: str, lesions: int) -> Cell:
    return Cell(1, 0, f"compile-{name}-{lesions}", "compile_once", {"name": name, "lesions": lesions}, 20.0)


def in_process(config: GpuBenchmark, results: Results, cells: list[Cell], deadline: float) -> int:
    """Measure cells in a new process; return how many are dealt with: measured, failed, or without time left for them.

    A cell that fails ends the process, since an error may leave the device unusable; at the deadline it is killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(cells, config.size, config.shards, deadline, theirs))
    process.start()
    theirs.close()
    dealt, is_measuring = 0, False
    try:
        while ours.poll(max(0.0, deadline - time.monotonic())):
            values = ours.recv()
            is_measuring = values is None
            if values:
                results.add(cells[dealt].part, cells[dealt].name, values)
            dealt += values is not None
        if is_measuring:
            results.add(cells[dealt].part, cells[dealt].name, {"error": "the time was over"})
        dealt = len(cells)  # the time is over
    except EOFError:  # the process ended
        process.join()
        if is_measuring:
            error = {"error": f"its process ended with {process.exitcode}"}
            results.add(cells[dealt].part, cells[dealt].name, error)
            dealt += 1
        elif process.exitcode:
            dealt = len(cells)  # it did not start
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # what it has started, too
        process.kill()
        process.join()
    return dealt


def work(cells: list[Cell], size: str, shards: str | None, deadline: float, pipe: Connection) -> None:
    """Measure cells in this process, a group of its own. For each send None, as it starts, and its values; for one that
    there is no time for only {}. Just before the deadline print where it is.
    """
    os.setsid()
    faulthandler.dump_traceback_later(max(1.0, deadline - time.monotonic() - SECONDS_TO_END / 2))
    from benchmarks import gpu_cells, gpu_photos

    facts, is_started = gpu_cells.device_facts(), False
    for cell in cells:
        if time.monotonic() + (cell.seconds if size == "full" else 0.0) > deadline:
            pipe.send({})
            continue
        pipe.send(None)
        if not is_started and cell.function not in ("flops", "compile_once", "estimate"):
            gpu_cells.start_profiler()
            is_started = True
        started = time.perf_counter()
        try:
            settings = {**cell.settings, "size": size}
            if cell.function in gpu_photos.READS_SHARDS:
                settings["shards"] = shards
            if cell.function == "fold":
                settings["most_seconds"] = deadline - time.monotonic() - SECONDS_TO_END
            function = getattr(gpu_cells, cell.function, None) or getattr(gpu_photos, cell.function)
            values = function(**settings)
        except Exception as error:
            traceback.print_exc()
            pipe.send({"error": one_line(error, 300, with_type=True), **facts})
            return
        pipe.send({**values, **facts, "cell_s": round(time.perf_counter() - started, 1)})
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


if __name__ == "__main__":
    run(GpuBenchmark, main, __doc__)
