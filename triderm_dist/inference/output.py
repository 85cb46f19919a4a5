"""Write the predictions of lesions: a CSV or parquet file, or a folder with both.

A folder holds

    probabilities.csv       lesion_id, a column per diagnosis, decision
    probabilities.parquet   the same, and MEMBER/DIAGNOSIS for each network and the stacker
    submission.csv          where the run's task is a challenge's
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from triderm_dist.checksums import DamagedFile, read_checked_parquet
from triderm_dist.files import PATIENT_DATA, atomic_path, check_no_mount, follow_link, resolve_dots
from triderm_dist.schema import ConfigError, DataError, Task
from triderm_dist.submission import (
    PROBABILITIES_FILE,
    TABLE_FILE,
    TABLE_KEY,
    Results,
    decisions_of,
    write_numbers,
    write_results,
    write_table,
)


def check_output(output: Path, run: Path, inputs: Sequence[Path]) -> None:
    """Raise ConfigError for an output inside the run, or that is an input."""
    place = output.resolve()
    if place == run.resolve() or run.resolve() in place.parents:
        raise ConfigError(f"output={output}: is inside the run, which predictions do not change; name another place")
    if other := next((path for path in inputs if path.resolve() in (place, *place.parents)), None):
        raise ConfigError(f"output={output}: is inside the input {other}; name another place")
    if output.suffix and output.suffix not in (".csv", ".parquet") and not output.is_dir():
        raise ConfigError(f"output={output}: name a file that ends in .csv or .parquet, or a folder")
    check_no_mount(output)


def is_written(output: Path, key: str) -> bool:
    """Return whether an output exists and is that of the job `key`. Raises DataError for another one."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    path = output / TABLE_FILE if output.is_dir() else output
    try:
        about = json.loads(read_checked_parquet(path, ["lesion_id"]).schema.metadata[TABLE_KEY])
        if about["key"] == key:
            return True
    except (DamagedFile, OSError, KeyError, TypeError, ValueError, RecursionError):
        pass
    raise DataError(f"{output}: exists and is not the result of this command; name another output, or delete it")


def part_of(output: Path) -> Path:
    """Return the folder that holds the work on an output until it is complete."""
    return Path(f"{follow_link(resolve_dots(output))}.part")


def write_output(output: Path, table: pa.Table, task: Task, about: Mapping[str, Any]) -> list[Path]:
    """Write the file or the folder `output`, which appears when it is complete, and return the paths.

    table: see `submission.results_table`.  about: JSON values for the metadata of the parquet file.
    """
    if output.suffix == ".csv":
        _write_csv(output, table, task)
        return [output]
    if output.suffix == ".parquet":
        write_table(output, table, about)
        return [output]
    folder = part_of(output) / "output"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_csv(folder / PROBABILITIES_FILE, table, task)
    write_table(folder / TABLE_FILE, table, about)
    names = [PROBABILITIES_FILE, TABLE_FILE]
    if task.submission and len(table):
        results = results_of(table, task)
        names += [path.name for path in write_results(folder, task, results, sorted(results.lesion_ids))]
    place = follow_link(resolve_dots(output))
    place.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(place)
    return [output / name for name in names]


def results_of(table: pa.Table, task: Task) -> Results:
    """Return the probabilities and decisions of a table that `submission.results_table` built."""
    names = task.diagnosis_names
    decisions = decisions_of(table["decision"].to_pylist(), names)
    probabilities = np.stack([table[name].to_numpy() for name in names], 1)
    return Results(table["lesion_id"].to_pylist(), probabilities, decisions)


def _write_csv(path: Path, table: pa.Table, task: Task) -> None:
    names = task.diagnosis_names
    ids, decisions = (table[name].to_pylist() for name in ("lesion_id", "decision"))
    probabilities = np.stack([table[name].to_numpy() for name in names], 1)
    with atomic_path(path, PATIENT_DATA) as temporary:
        write_numbers(temporary, ids, probabilities, names, decisions)
