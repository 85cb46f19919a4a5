"""Every program of benchmarks/ runs at its smallest and prints one JSON object as its last line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.conftest import Challenge, write_challenge
from tests.fork_server import fork_python
from tests.processes import HANG_SECONDS, ROOT

FILES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
PROGRAMS = sorted(name for name, text in FILES.items() if "    run(" in text.partition('__name__ == "__main__"')[2])
LESIONS = 150


@dataclass(frozen=True)
class Inputs:
    """source: challenge of 150 lesions.  run: trained on synthetic lesions, with a frozen tower, stacked.

    config: its settings.  other: a packed set of other photos.
    """

    source: Challenge
    run: Path
    config: Path
    other: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Train two networks in two folds on synthetic lesions, predict a test set, and pack another one."""
    folder = tmp_path_factory.mktemp("inputs")
    program("triderm_dist", "synthetic", f"output={folder}/demo", f"lesions={LESIONS}", "test_lesions=50")
    tower = "{source: 'timm:test_efficientnet', pretrained: false, image_size: 32, frozen: true, shared: true}"
    config = folder / "settings.yaml"
    truth = folder / "demo" / "truth" / "MILK10k_Test_GroundTruth.csv"
    config.write_text(
        f"output: {folder}/run\n"
        "data: {folds: 2}\n"
        "train: {epochs: 1, global_batch: 22, micro_batch: 22, log_every: 1, trackers: []}\n"
        "models:\n"
        f"  trimodal: {{kind: trimodal, width: 16, heads: 2, depth: 1, tower: {tower}}}\n"
        f"  dual_cnn: {{kind: dual_cnn, width: 16, tower: {tower}}}\n"
        "stack: {max_rounds: 5, max_depth: 1}\n"
        "ensemble: {bootstrap: 20, rounds: 3}\n"
    )
    data = [f"data.source={folder}/demo/train", f"data.test={folder}/demo/test", f"data.test_truth={truth}"]
    program("triderm_dist", "pipeline", "--config", str(config), *data)
    other = folder / "other"
    source = write_challenge(folder / "source", LESIONS)
    program("triderm_dist", "pack", f"source={source.folder}", f"output={other}")
    return Inputs(source, folder / "run", config, other)


def arguments(name: str, inputs: Inputs, folder: Path) -> list[str]:
    """Return the settings that make a program small."""
    source, run, train = inputs.source.folder, inputs.run, inputs.run / "shards" / "train"
    tower = ["tower=timm:test_efficientnet", "image_size=32"]
    log = "trimodal/fold-0/metrics.jsonl"
    return {
        "ablation": [f"run={run}", "parts=[view_alignment]", "seeds=1"],
        "baselines": [f"run={run}"],
        "compare_losses": [f"first={run}/{log}", f"second={run}/{log}"],
        "coverage": ["sets=20"],
        "cpu_run": [f"source={source}", f"lesions={LESIONS}", f"config={inputs.config}"],
        "ensemble": ["problems=4", "lesions=200"],
        "end_to_end": ["lesions=500", "test_lesions=200"],
        "expected": ["files=[a100]"],
        "fold_mean": [f"run={run}", "seeds=2"],
        "gpu": ["part=1", "size=tiny", f"output={folder}/gpu", "cells=flops-base|base-12-eager"],
        "gpu_tables": [f"results={folder}/gpu", f"page={gpu_page(folder)}"],
        "heads": [*tower, "before=.", "rounds=1", "seconds=0.2", "lesions=64", "cases=[tuned_cnn]"],
        "ingredients": [
            *("--config", str(inputs.config), f"output={folder}/run", f"data.shards={train}"),
            *("parts=[mixup, ema]", "seeds=1"),
        ],
        "launches": ["networks=[dual_cnn]", "modes=[eager]", "micro_batch=2", "steps=1", "memory=false"],
        "loader": [
            f"source={source}", "original=null", "rounds=1", "batch=11", "workers=1", "simulated=1000",
            "methods=[ceiling_simplejpeg, ours, ours_finished, folder_reduced, webdataset, webdataset_simplejpeg]",
        ],
        "memory": ["cases=[dual_cnn]"],
        "modalities": [f"run={run}", "seeds=1", "without=[concepts]"],
        "order": ["epochs=2", "batches=[32]", "lesions=10000"],
        "overlap": [f"shards={train}", f"other={inputs.other}", "copies=4"],
        "pack": [f"source={source}", "copies=1", "rounds=1", "lesions=1000", f"scratch={folder}"],
        "predict": [*tower, "lesions=4", "rounds=1"],
        "rank_files": ["world=16", "lesions=2000", "per_rank=2", "cases=[url]", f"scratch={folder}"],
        "ranks": [
            *("ranks=4", "left=2", "batch=16", "lesions=96", "lost_at=3", "timeout=20", f"scratch={folder}"),
        ],
        "read_table": ["rows=2000", f"scratch={folder}"],
        "report": ["lesions=500", "many=2000", "models=1", "resamples=10"],
        "scale": ["rows=[plan, pack driver]", "largest=10000", f"scratch={folder}"],
        "scaling": ["networks=[dual_cnn]", "check=false"],
        "seeds": [f"run={run}", f"other={run}"],
        "soft_f1_sums": [f"shards={train}", "steps=2", "global_batch=8", "micro_batch=4", *tower],
        "stack": [
            *("rows=500", "columns=[60]", "repeats=1", "million=2000", "million_rounds=2"),
            "part=compare,million,stage",
        ],
        "step": ["tower=tiny", "image_size=32", "batch=2", "rounds=2", "steps=1", "seconds=1", "compile=false"],
        "tokens": [*tower, "pretrained=false", f"shards={train}", "lesions=4", "rounds=1"],
        "tta": [*tower, "lesions=50", "rounds=1"],
    }[name]  # fmt: skip


def gpu_page(folder: Path) -> Path:
    """Write a page that has room for the tables of a GPU."""
    page = folder / "page.md"
    page.write_text("<!-- gpu tables -->\n<!-- end of gpu tables -->\n")
    return page


NULL_GPU = ROOT.parent / "shared" / "nullgpu" / "nullgpu"
"""A program that stands in for a GPU's driver; beside the project on some machines."""
ON_GPU = ("launches", "memory")
TRACED = ("rank_files",)
"""Programs that look at a process that they start, which therefore must not be a fork."""


def program(*command: str, through: tuple[str, ...] = (), python: str | None = None) -> str:
    """Run a module, and return what it printed. through: a program that runs it.  python: None takes a fork."""
    done = subprocess.run(
        [*through, python or fork_python(), "-m", *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=HANG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_benchmark_runs(name, inputs, tmp_path):
    through: tuple[str, ...] = ()
    if name in ON_GPU and not torch.cuda.is_available():
        if not NULL_GPU.exists():
            pytest.skip("needs a GPU, or shared/nullgpu beside the project")
        through = (str(NULL_GPU),)
    if name == "rank_files" and not shutil.which("strace"):
        pytest.skip("needs strace")
    python = sys.executable if through or name in TRACED else None
    printed = program(f"benchmarks.{name}", *arguments(name, inputs, tmp_path), through=through, python=python)
    assert isinstance(json.loads(printed.splitlines()[-1]), dict)


@pytest.mark.slow
def test_reading_with_latency(inputs):
    output = program("benchmarks.loader", f"source={inputs.source.folder}", "latency_ms=0.5", "rounds=1")
    assert json.loads(output.splitlines()[-1])["threads_16_vs_1"] > 0
