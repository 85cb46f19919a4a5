"""Seconds and peak memory of `triderm report`: the size of MILK10k with five networks, and a million lesions.

python -m benchmarks.report [key=value ...]

The tables are synthetic: of the first size the out-of-fold and nested tables, predictions without each input, and
metrics of the trainings, all after `triderm stack`; of the second size only the two tables, with the ensemble of the
first. There are no photos. Each report is written by a new process, whose peak memory is counted. The last line is one
JSON object.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field

from benchmarks.stack import out_of_fold
from triderm_dist.checksums import write_checked_json
from triderm_dist.cli import run
from triderm_dist.config import Experiment, load, save
from triderm_dist.ensemble.run_files import ENSEMBLE_FILE, NESTED_FILE, OOF_FILE, NestedRows, write_nested
from triderm_dist.metrics import argmax_decisions
from triderm_dist.predictions import OofTable, Predictions, write_oof, write_predictions
from triderm_dist.settings import Section

INPUTS = ("clinical", "dermoscopic", "concepts", "metadata")


class Settings(Section):
    lesions: int = Field(4717, ge=500, description="lesions of the first size")
    models: int = Field(5, ge=1, le=9, description="networks")
    many: int = Field(1_000_000, ge=500, description="lesions of the second size")
    group_size: int = Field(1, ge=1, description="lesions of a group, on average; sizes are 1 + a Poisson number")
    resamples: int = Field(1000, ge=10, description="ensemble.bootstrap")
    part: str = Field("few,many", description="sizes to measure, comma-separated")
    profile: bool = Field(False, description="print where the time of each report goes")
    folder: str | None = Field(None, description="internal: write the report of this folder and print time and memory")


def main(settings: Settings) -> None:
    if settings.folder:
        return report_of(Path(settings.folder), settings.profile)
    names = tuple(f"net{number}" for number in range(settings.models))
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        few, many = Path(temporary) / "few", Path(temporary) / "many"
        write_few(few, settings, names)
        for name, folder in (("few", few), ("many", many)):
            if name not in settings.part.split(","):
                continue
            if name == "many":
                write_many(many, few, settings, names)
            seconds, cpu, peak = measure(folder, settings)
            size = (folder / "report.html").stat().st_size
            lesions = settings.lesions if name == "few" else settings.many
            print(f"{lesions:,} lesions, {settings.models} networks, {settings.resamples:,} resamples: {seconds:.1f} s "
                  f"({cpu:.1f} CPU s), peak {peak:,.0f} MiB, page of {size >> 10:,} KiB", flush=True)  # fmt: skip
            result |= {
                f"{name}_seconds": seconds,
                f"{name}_cpu_seconds": cpu,
                f"{name}_peak_mb": peak,
                f"{name}_page_kb": size / 1024,
            }
    print(json.dumps({key: round(value, 2) for key, value in result.items()}))


def write_few(folder: Path, settings: Settings, names: tuple[str, ...]) -> None:
    """Write a run with all that a report reads, and stack it."""
    table = in_groups(out_of_fold(settings.lesions, names, features=0), settings.group_size)
    write_oof(folder / OOF_FILE, table)
    for name in names:
        for fold in range(5):
            path = folder / name / f"fold-{fold}"
            for hidden in INPUTS:
                write_predictions(path / f"without_{hidden}.parquet", _hidden(table, name, fold), hidden=hidden)
            (path / "metrics.jsonl").write_text("".join(_records()))
    words = [
        f"output={folder}", f"ensemble.bootstrap={settings.resamples}", "stack={max_rounds: 60, learning_rate: 0.3}",
        f"models={{{', '.join(f'{name}: {{}}' for name in names)}}}",
    ]  # fmt: skip
    save(load(Experiment, None, words), folder / "config.yaml")
    command = [sys.executable, "-m", "triderm_dist.commands.stack", f"run={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def write_many(folder: Path, few: Path, settings: Settings, names: tuple[str, ...]) -> None:
    """Write a run of the ensemble of another one with the tables of many lesions."""
    folder.mkdir()
    for file in (*few.glob("stack.*"), few / "config.yaml"):
        shutil.copy(file, folder / file.name)
    fit = json.loads((few / ENSEMBLE_FILE).read_text(encoding="utf-8"))
    write_checked_json(folder / ENSEMBLE_FILE, {**fit, "lesions": settings.many, "files": {}})
    table = in_groups(out_of_fold(settings.many, names, features=0), settings.group_size)
    write_oof(folder / OOF_FILE, table)
    odds = [np.exp(table.logits[name]) for name in names]
    probabilities = np.mean([each / each.sum(axis=1, keepdims=True) for each in odds], axis=0)
    rows = NestedRows(
        table.lesion_ids, table.labels, table.folds, probabilities, argmax_decisions(probabilities), probabilities
    )
    write_nested(folder / NESTED_FILE, rows)


def in_groups(table: OofTable, size: int) -> OofTable:
    """Return the table with lesions in groups, each in one fold."""
    if size == 1:
        return table
    sizes = 1 + np.random.default_rng(0).poisson(size - 1, len(table))
    number = np.repeat(np.arange(len(table)), sizes)[: len(table)]
    folds = number % 5
    hashes = {name: np.array([f"{name}-{fold}" for fold in range(5)], object)[folds] for name in table.models}
    groups = np.array([f"patient-{each:07d}" for each in number], object)
    return replace(table, groups=groups, folds=folds, hashes=hashes)


def _hidden(table: OofTable, name: str, fold: int) -> Predictions:
    """Return the predictions of a fold with an input hidden: noisier ones."""
    rows = np.flatnonzero(table.folds == fold)
    noise = np.random.default_rng(fold).normal(scale=0.5, size=(len(rows), len(table.diagnoses)))
    return Predictions(
        lesion_ids=table.lesion_ids[rows], groups=table.groups[rows], labels=table.labels[rows],
        fold=table.folds[rows], model=np.full(len(rows), name, object), model_hash=table.hashes[name][rows],
        head=np.full(len(rows), "softmax", object), logits=table.logits[name][rows] + noise,
        aux_clinical=table.aux_clinical[name][rows], aux_dermoscopic=table.aux_dermoscopic[name][rows],
        features=table.features[name][rows], concepts=table.concepts[rows], metadata=table.metadata[rows],
        task=table.task, concept_names=table.concept_names,
    )  # fmt: skip


def _records(epochs: int = 40) -> list[str]:
    lines = []
    for epoch in range(1, epochs + 1):
        lines.append({"kind": "train", "epoch": epoch, "step": epoch * 40, "loss": 2.0 / epoch, "lr": 1e-3})
        lines.append({"kind": "validation", "epoch": epoch, "step": epoch * 40, "macro_f1": 0.5 - 0.4 / epoch})
    return [f"{json.dumps(line)}\n" for line in lines]


def measure(folder: Path, settings: Settings) -> tuple[float, float, float]:
    """Write the report in a new process; return its seconds, its CPU seconds, and its peak memory in MiB."""
    command = [sys.executable, "-m", "benchmarks.report", f"folder={folder}", f"profile={settings.profile}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    if settings.profile:
        print(done.stdout.rstrip().rpartition("\n")[0])
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], found["cpu_seconds"], found["peak_mb"]


def report_of(folder: Path, profile: bool) -> None:
    """Write the report of a run and print the seconds since the start of the process, imports included."""
    import cProfile
    import pstats

    started = time.perf_counter() - time.process_time()  # the imports so far count as well
    from triderm_dist.report import write_report

    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    write_report(folder)
    if profile:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stdout).sort_stats("cumtime").print_stats(60)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time()}
    print(json.dumps({**seconds, "peak_mb": peak_memory()}))


def peak_memory() -> float:
    """Return the peak memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    run(Settings, main, __doc__)
