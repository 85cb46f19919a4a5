"""Fitting the stacker, calibration, thresholds and weights on an out-of-fold table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.scale_rows import Row
from benchmarks.scale_rows.tables import MODELS


def write_run(n: int, folder: Path) -> None:
    from benchmarks.stack import out_of_fold
    from triderm_dist.config import Experiment, load, save
    from triderm_dist.predictions import write_oof

    write_oof(folder / "oof.parquet", out_of_fold(n, MODELS, features=0))
    models = ", ".join(f"{name}: {{}}" for name in MODELS)
    save(load(Experiment, None, [f"output={folder}", f"models={{{models}}}"]), folder / "config.yaml")


def fit(n: int, folder: Path) -> None:
    """Run the program, as its own processes."""
    command = [sys.executable, "-m", "triderm_dist.commands.stack", f"run={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


ROWS = (Row("ensemble fit", fit, write_run, largest=10**6),)
