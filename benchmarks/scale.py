"""CPU time and memory of what surrounds training, as the number of lesions grows from ten thousand to ten million.

python -m benchmarks.scale [rows=[plan, read]] [largest=1000000] [output=scale.json]

Each row is one piece of work of `benchmarks/scale_rows`, on synthetic tables and files, and every size of it runs in a
process of its own. CPU seconds and peak memory include its child processes, and are more than those of the same row
with 1,000 lesions: so imports and what does not depend on the number of lesions do not count. Of memory that processes
share, such as mapped files, the pages that were read count. The exponent is that of a power law, fitted by least
squares to the logarithms of those sizes where a figure is at least 0.1 s or 10 MB; `-` where fewer than two are. The
last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from benchmarks.scale_rows import Row, ensemble, pack, start, tables, tokens, urls
from triderm_dist.cli import run
from triderm_dist.settings import Section

ROWS: dict[str, Row] = {
    row.name: row for module in (pack, urls, start, tokens, tables, ensemble) for row in module.ROWS
}
BASE, SIZES = 1_000, (10_000, 100_000, 1_000_000, 10_000_000)
LEAST = {"cpu_s": 0.1, "peak_mb": 10.0}
"""What counts as growth: smaller figures are those of the machine's other work."""

Figures = dict[str, float]


class ScaleBenchmark(Section):
    rows: list[str] = Field([], description="names of the rows, as the table prints them; []: all")
    largest: int = Field(SIZES[-1], ge=SIZES[0], description="the most lesions; a row may end before")
    scratch: str | None = Field(None, description="folder for written files; null takes the system's temporary folder")
    output: Path | None = Field(None, description="JSON file of all figures")
    job: str | None = Field(None, description="internal: the function of the row to call, prepare or measure")
    n: int = Field(0, ge=0, description="internal: the number of lesions")


def main(config: ScaleBenchmark) -> None:
    if unknown := [name for name in config.rows if name not in ROWS]:
        sys.exit(f"rows: no row {unknown[0]!r}; known: {', '.join(ROWS)}")
    chosen = [ROWS[name] for name in config.rows or ROWS]
    if config.job:
        return work(chosen[0], config.job, config.n, Path(config.scratch or "."))
    sizes = [n for n in SIZES if n <= config.largest]
    print(f"{'':<18}" + "".join(f"{n:>21,}" for n in sizes) + f"{'exponents':>14}")
    print(f"{'':<18}" + f"{'CPU s':>11}{'MB':>10}" * len(sizes) + f"{'CPU s':>8}{'MB':>6}")
    results: dict[str, dict[int, Figures]] = {}
    with tempfile.TemporaryDirectory(dir=config.scratch) as folder:
        for row in chosen:
            print(f"{row.name:<18}", end="", flush=True)
            base, results[row.name] = measured(row, BASE, Path(folder)), {}
            for n in sizes:
                if n > row.largest:
                    print(" " * 21, end="")
                    continue
                found = measured(row, n, Path(folder))
                results[row.name][n] = found = {**found, **{key: found[key] - base[key] for key in LEAST}}
                print(f"{found['cpu_s']:>11.2f}{found['peak_mb']:>10,.0f}", end="", flush=True)
            both = [exponent(results[row.name], key) for key in LEAST]
            print(f"{_text(both[0]):>8}{_text(both[1]):>6}", flush=True)
    summary = summary_of(results)
    if config.output:
        config.output.write_text(json.dumps({**summary, "rows": results}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


def measured(row: Row, n: int, scratch: Path) -> Figures:
    """Prepare and measure a row in processes of their own, and remove what they wrote but the shared set."""
    folder = scratch / str(n) / "row"
    folder.mkdir(parents=True)
    try:
        if row.prepare:
            child(row, "prepare", n, folder)
        return child(row, "measure", n, folder)
    finally:
        shutil.rmtree(folder)


def child(row: Row, job: str, n: int, folder: Path) -> Figures:
    """Call a function of a row in a new process; return its figures, and what the process and its children used."""
    command = [sys.executable, "-m", "benchmarks.scale", f"rows=[{row.name}]", f"job={job}", f"n={n}",
               f"scratch={folder}"]  # fmt: skip
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        if process.returncode:
            sys.exit(f"{row.name}, {n:,} lesions: {job} ended with {process.returncode}")
        output.seek(0)
        found = json.loads(output.read().splitlines()[-1])
    unit = 1024**2 if sys.platform == "darwin" else 1024
    # The peak is never below that of this process when it started the other one, which imports more.
    return {"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / unit, **found}


def work(row: Row, job: str, n: int, folder: Path) -> None:
    """Call a function of a row, and print its figures."""
    found = row.measure(n, folder) if job == "measure" else row.prepare(n, folder) if row.prepare else None
    print(json.dumps({**(found or {})}))


def exponent(figures: Mapping[int, Figures], key: str) -> float | None:
    """Return the exponent of the power law through the figures that are large enough, None where fewer than two are."""
    grown = [(n - BASE, found[key]) for n, found in figures.items() if found[key] >= LEAST[key]]
    if len(grown) < 2:
        return None
    x, y = np.log(np.array(grown, float)).T
    return float(np.polyfit(x, y, 1)[0])


def summary_of(results: Mapping[str, Mapping[int, Figures]]) -> dict[str, Any]:
    """Return the figures of the last line: null where a row did not reach the size."""

    def at(row: str, n: int, key: str, scale: float = 1.0, digits: int | None = 2) -> float | None:
        found = results.get(row, {}).get(n, {}).get(key)
        return None if found is None else round(found * scale, digits)

    largest = max(results.get("pack driver", {0: {}}))
    exponents = {name: {key: exponent(rows, key) for key in LEAST} for name, rows in results.items()}
    return {
        "start_s_10m": at("start of a rank", 10**7, "cpu_s"),
        "start_mb_10m": at("start of a rank", 10**7, "peak_mb", digits=None),
        "driver_bytes_per_lesion": at("pack driver", largest, "peak_mb", 2**20 / max(largest, 1), digits=None),
        "ensemble_s_1m": at("ensemble fit", 10**6, "seconds", digits=1),
        "ensemble_gb_1m": at("ensemble fit", 10**6, "peak_mb", 1 / 1024),
        "token_open_files": at("tokens lookup", max(results.get("tokens lookup", {0: {}})), "open_files", digits=None),
        "exponents": {
            name: {key: None if value is None else round(value, 2) for key, value in both.items()}
            for name, both in exponents.items()
        },
        "largest_exponent": _largest([value for both in exponents.values() for value in both.values()]),
    }


def _largest(values: Sequence[float | None]) -> float | None:
    return max((round(value, 2) for value in values if value is not None), default=None)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    run(ScaleBenchmark, main, __doc__)
