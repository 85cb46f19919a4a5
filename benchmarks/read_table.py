"""Measure CPU time and memory of reading a table of many rows and finding its photos.

python -m benchmarks.read_table

Writes a table with one photo per row (7 scores, 3 metadata fields, diagnosis, patient; semicolons and decimal commas)
and as many empty files named like photos, then reads them in a new process. The last line is one JSON object.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import Section

SCORES = tuple(f"score_{name}" for name in "abcdefg")
SITES = ("face", "trunk", "hand", "foot")
DIAGNOSES = ("mel", "nv", "bcc", "bkl")
FOLDER_FILES = 1000


class ReadTableBenchmark(Section):
    rows: int = Field(1_000_000, ge=1, description="rows of the table")
    scratch: str | None = Field(None, description="folder for written files; null takes the system's temporary folder")


def main(config: ReadTableBenchmark) -> None:
    with tempfile.TemporaryDirectory(dir=config.scratch) as folder:
        write(Path(folder), config.rows)
        size = (Path(folder) / "lesions.csv").stat().st_size
        code = "import sys; from benchmarks.read_table import read; read(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    result = {"rows": config.rows, "megabytes": round(size / 1e6, 1), **json.loads(done.stdout)}
    for name, value in result.items():
        print(f"{name:<12} {value:>12}")
    print(json.dumps(result))


def write(folder: Path, rows: int) -> None:
    """Write the table and its photos."""
    rng = np.random.default_rng(0)
    columns = [
        [f"ISIC_{row:07d}" for row in range(rows)],
        [f"P{row // 3}" for row in range(rows)],
        rng.choice(DIAGNOSES, rows).tolist(),
        [str(age) if age < 90 else "85+" for age in (5 * rng.integers(0, 19, rows)).tolist()],
        rng.choice(["M", "F", "unknown"], rows).tolist(),
        rng.choice(SITES, rows).tolist(),
        *([f"{score:.6f}".replace(".", ",") for score in rng.random(rows).tolist()] for _ in SCORES),
    ]
    with (folder / "lesions.csv").open("w") as file:
        file.write(";".join(["image_id", "patient", "dx", "age", "sex", "site", *SCORES]) + "\n")
        file.writelines(f"{';'.join(cells)}\n" for cells in zip(*columns, strict=True))
    for row, name in enumerate(columns[0]):
        parent = folder / "photos" / str(row // FOLDER_FILES)
        if row % FOLDER_FILES == 0:
            parent.mkdir(parents=True)
        (parent / f"{name}.jpg").touch()


def read(folder: str) -> None:
    """Read the table; print time and peak memory as JSON."""
    from triderm_dist.data.readers.lesions_csv import read_lesions
    from triderm_dist.schema import (
        ConceptColumns,
        Diagnosis,
        MetadataField,
        Task,
        TaskColumns,
        View,
    )

    task = Task(
        "benchmark",
        tuple(map(Diagnosis, DIAGNOSES)),
        TaskColumns("image_id", diagnosis="dx", group="patient"),
        views=(View("dermoscopic"),),
        concepts=ConceptColumns("score_"),
        fields=(
            MetadataField("age", "age", "number", high=120),
            MetadataField("sex", "sex", "category", ("female", "male"), synonyms={"f": "female", "m": "male"}),
            MetadataField("site", "site", "category", SITES),
        ),
    )
    before, start = time.process_time(), time.perf_counter()
    dataset = read_lesions(folder, task)
    result = {
        "lesions": len(dataset.lesions),
        "cpu_seconds": round(time.process_time() - before, 2),
        "seconds": round(time.perf_counter() - start, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run(ReadTableBenchmark, main, __doc__)
