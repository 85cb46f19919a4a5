"""RUN/environment.json: what a run was made with, and when its stages ran.

Versions, commit and hardware of every start of a stage, its duration and exit code, and the fingerprints of the data.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt, model_validator

from triderm_dist import __version__
from triderm_dist.checksums import DamagedFile, read_checked_json
from triderm_dist.config import CONFIG_FILE
from triderm_dist.files import lock_file, write_json
from triderm_dist.runtime.run_log import LOG_FILE
from triderm_dist.runtime.signals import BAD_INPUT
from triderm_dist.runtime.terminal import wrapped

ENVIRONMENT_FILE = "environment.json"
FORMAT, VERSION = "triderm-environment", 1
PACKAGES = (
    *("torch", "accelerate", "timm", "open_clip_torch", "numpy", "pyarrow", "safetensors", "xgboost-cu13"),
    *("xgboost-cpu", "xgboost", "deepspeed", "ray", "openvino", "opencv-python-headless"),
)
_LOCK = ".environment.lock"


class _Environment(BaseModel):
    gpus: list[str]
    cpu: str
    cores: int | None
    ranks: int


class _Start(BaseModel):
    program: str
    started: str
    environment: NonNegativeInt


class _Keys(BaseModel):
    """Keys of environment.json."""

    format: str
    version: int
    data: dict[str, dict[str, Any]]
    environments: list[_Environment]
    starts: list[_Start]

    @model_validator(mode="after")
    def _check_starts(self) -> _Keys:
        for start in self.starts:
            datetime.fromisoformat(start.started)
            if start.environment >= len(self.environments):
                raise ValueError("a start names an environment that is not there")
        return self


def lacks_log(folder: Path) -> bool:
    """Return whether a folder holds the settings of a run, but no log, as an exported one."""
    return (folder / CONFIG_FILE).exists() and not (folder / LOG_FILE).exists()


@contextmanager
def record_program(folder: Path, program: str, exit_code: Any) -> Iterator[None]:
    """Add the start, duration and exit code of a program to the environment.json of a run; on rank 0 only.

    exit_code: the exit code of an exception, as a function of it. Adds nothing if the folder is not a run's, or is an
    exported one (`lacks_log`) that the program refuses, and never makes a program fail.
    """
    started, clock, code = datetime.now(UTC), time.perf_counter(), 0
    try:
        yield
    except BaseException as error:
        code = exit_code(error)
        raise
    finally:
        is_recorded = (folder / CONFIG_FILE).exists() and not (code == BAD_INPUT and lacks_log(folder))
        if os.environ.get("RANK", "0") == "0" and is_recorded:
            start = {
                "program": program,
                "started": started.isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - clock, 1),
                "exit": code,
            }
            with contextlib.suppress(OSError, ValueError):
                _add_start(folder, start)


def record_stage(folder: Path, stage: str, started: datetime, usage: Mapping[str, float | None]) -> None:
    """Add what a stage of the pipeline needed; nothing if the folder is not a run's. Never makes a run fail."""
    if (folder / CONFIG_FILE).exists():
        numbers = {key: value if value is None else round(value, 2) for key, value in usage.items()}
        with contextlib.suppress(OSError, ValueError), _changed(folder) as record:
            row = {"stage": stage, "started": started.isoformat(timespec="seconds"), **numbers}
            record.setdefault("stages", []).append(row)


def record_data(folder: Path, split: str, facts: Mapping[str, Any]) -> None:
    """Record the packed set of a split (train, test): its fingerprint, number of lesions, and the like."""
    with _changed(folder) as record:
        record["data"][split] = dict(facts)


def read_environment(folder: Path) -> dict[str, Any]:
    """Return the content of environment.json; without starts and data if there is none, or it is not readable."""
    return _read(folder) or {"format": FORMAT, "version": VERSION, "data": {}, "environments": [], "starts": []}


def _read(folder: Path) -> dict[str, Any] | None:
    """Return the content of environment.json, None if there is none or it is not readable."""
    try:
        record = read_checked_json(folder / ENVIRONMENT_FILE, _Keys)
    except (FileNotFoundError, DamagedFile):
        return None
    return record if (record["format"], record["version"]) == (FORMAT, VERSION) else None


def hardware_of(made: Mapping[str, Any]) -> str:
    """Describe the hardware of an entry of `environments` in environment.json."""
    gpus: Sequence[str] = made.get("gpus") or ()
    devices = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)] or [
        f"{made.get('cores')} cores of {made.get('cpu')}"
    ]
    ranks = made.get("ranks") or 1
    return ", ".join(devices) + (f", {ranks} ranks" if ranks > 1 else "")


def version_of(made: Mapping[str, Any]) -> str:
    """Return version and commit of an entry of `environments` in environment.json."""
    commit = made.get("commit")
    if not commit:
        return str(made.get("triderm-dist"))
    short, _, dirty = str(commit).partition("-")
    return f"{made.get('triderm-dist')} ({short[:12]}{', changed' if dirty else ''})"


def this_environment() -> dict[str, Any]:
    """Return versions, commit and hardware of this process."""
    return {
        "triderm-dist": __version__,
        "commit": describe_commit("--abbrev=40", "--exclude=*"),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
    }


def cpu_model() -> str:
    """Return the model name of the CPU, or its architecture if the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _add_start(folder: Path, start: dict[str, Any]) -> None:
    environment = this_environment()
    with _changed(folder) as record:
        known = record["environments"]
        if environment not in known:
            known.append(environment)
        record["starts"].append({**start, "environment": known.index(environment)})


@contextmanager
def _changed(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the record of a run, and write it at the end. Folds that train in parallel write it one at a time.

    A damaged file is kept as it is, and a note is printed.
    """
    with (folder / _LOCK).open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            lock_file(lock)
        record, path = read_environment(folder), folder / ENVIRONMENT_FILE
        yield record
        if path.exists() and _read(folder) is None:
            advice = "restore it from a copy, or delete it; until then nothing is recorded in it"
            print(wrapped(f"note: {path}: not readable; {advice}"), flush=True)
        else:
            write_json(path, record)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_commit(*options: str) -> str | None:
    """Return the commit of the clone that this package lies in, with `-dirty` where files differ from it; None without
    a clone. options: of `git describe`.
    """
    clone = Path(__file__).parents[1]
    if not (clone / ".git").exists():
        return None
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty", *options]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    return None


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, if it used one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    return [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
