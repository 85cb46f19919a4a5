"""Task descriptions that ship with the package, and reading one's own.

A task is a YAML file with the keys of `schema.Task`; docs/your-own-data.md explains them.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triderm_dist.files import expanded
from triderm_dist.runtime.messages import did_you_mean, one_line
from triderm_dist.schema import ConfigError, DataError, Task
from triderm_dist.settings import read_mapping

SHIPPED = Path(__file__).parent
DATA_LICENSES = {
    "milk10k": "CC BY-NC 4.0",
    "ham10000": "CC BY-NC 4.0",
    "derm7pt": "terms for research that its authors grant",
    "pad_ufes_20": "CC BY 4.0",
}
"""The license of the published photos of each shipped task."""
TASK_FILE = "task.yaml"
"""The task of a folder of photos, in the folder."""


def task_names() -> tuple[str, ...]:
    """Return the names of the tasks that ship with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def task_references(name: str) -> str:
    """Return the works to cite for the data of a shipped task, as BibTeX; "" for other tasks."""
    path = SHIPPED / "references" / f"{name}.bib"
    return path.read_text(encoding="utf-8").strip() if name in task_names() and path.is_file() else ""


@functools.cache
def milk10k_task() -> Task:
    """Return the task of MILK10k, of which all packed sets and runs are that do not name another."""
    return load_task("milk10k")


def load_task(name_or_path: str | os.PathLike[str]) -> Task:
    """Read a task that ships with the package, a task.yaml, or that in the index.json of a packed set.

    Raises ConfigError for an unknown name or a bad file.
    """
    name = os.fspath(name_or_path)
    if name in task_names():
        path = SHIPPED / f"{name}.yaml"
        return Task.from_mapping(read_mapping(path, ""), str(path))
    if os.path.basename(name) == "index.json":
        return _of_index(expanded(name))
    if not name.endswith((".yaml", ".yml")):
        every = f"known are {', '.join(task_names())}, or give a task.yaml"
        raise ConfigError(f"unknown task {name!r}; {did_you_mean(name, task_names(), every)}")
    path = expanded(name)
    return Task.from_mapping(read_mapping(path, "triderm task init FOLDER writes one"), str(path))


def recorded_task(record: Mapping[str, Any], where: str) -> Task:
    """Return the task in the record of a file, MILK10k's for files from before other tasks were possible.

    Raises ConfigError, with `where` in front, for a task that this version cannot read.
    """
    return Task.from_mapping(record["task"], f"{where}: task") if "task" in record else milk10k_task()


def check_packed_for(packed: Task, task: Task, where: str, advice: str) -> None:
    """Check that a set at `where`, packed for one task, can be used for another. Raises DataError, with the advice."""
    if not packed.matches(task):
        raise DataError(f"{where}: was packed for task {packed.name!r}, not for {packed.named_other(task)}; {advice}")


def _of_index(path: Path) -> Task:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("a list or a number, not a mapping")
        return recorded_task(record, str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a packed set, which has it") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not the index of a packed set ({one_line(error)})") from None
