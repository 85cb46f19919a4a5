"""Out-of-fold tables, and the report."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.scale_rows import Row

MODELS = tuple(f"net{number}" for number in range(5))
FEATURES = 16


def write(n: int, folder: Path) -> dict[str, float]:
    """Write the out-of-fold table of five networks."""
    from benchmarks.stack import out_of_fold
    from triderm_dist.predictions import write_oof

    table = out_of_fold(n, MODELS, FEATURES)
    began = time.process_time()
    write_oof(folder / "oof.parquet", table)
    return {"cpu_s": time.process_time() - began}


def prepare(n: int, folder: Path) -> None:
    write(n, folder)


def read(n: int, folder: Path) -> None:
    from triderm_dist.predictions import read_oof

    read_oof(folder / "oof.parquet")


def write_run(n: int, folder: Path) -> None:
    from benchmarks.report import Settings, write_few, write_many

    settings = Settings(lesions=500, models=len(MODELS), many=n)
    write_few(folder / "few", settings, MODELS)
    write_many(folder / "run", folder / "few", settings, MODELS)


def report(n: int, folder: Path) -> None:
    from triderm_dist.report import write_report

    write_report(folder / "run")


ROWS = (
    Row("oof write", write, largest=10**6),
    Row("oof read", read, prepare, largest=10**6),
    Row("report", report, write_run, largest=10**6),
)
