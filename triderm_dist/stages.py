"""Programs run one after the other, each skipped while its inputs (content, not time) are what they were.

A stage is a program in a process of its own: its memory is given back, its failure is its own exit status, and it can
be run by hand with the same settings.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triderm_dist.files import only_one, write_json
from triderm_dist.schema import InputError


@dataclass(frozen=True)
class Stage:
    """A command, the settings and files its result depends on, and the files that it leaves."""

    name: str
    command: Sequence[str]
    settings: Any
    inputs: Sequence[Path]
    outputs: Sequence[Path]


def run_stages(stages: Sequence[Stage], folder: Path) -> None:
    """Run what is not done, recording each finished stage in FOLDER/stages.json. Leaves with a failed stage's exit
    status.
    """
    record = folder / "stages.json"
    refusal = InputError(f"{folder}: another run is working here; wait for it or stop it")
    with only_one(folder / ".lock", refusal) as lock:  # running stages inherit it
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            done = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
            key = _key(stage)
            if done.get(stage.name) == key and all(path.exists() for path in stage.outputs):
                print(f"{title}: done before, inputs unchanged", flush=True)
                continue
            print(f"{title}: {' '.join(stage.command)}", flush=True)
            started = time.perf_counter()
            command = [sys.executable if word == "python" else word for word in stage.command]
            # Waiting OpenMP threads must not spin: they would fight with decoder threads and XGBoost for the cores.
            environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
            status = _run(command, env=environment, pass_fds=[lock], preexec_fn=_end_with_parent)
            if status:
                sys.exit(status if status > 0 else 128 - status)
            write_json(record, {**done, stage.name: key})
            print(f"{title}: {time.perf_counter() - started:.0f} s", flush=True)


def _run(command: Sequence[str], **how: Any) -> int:
    """The exit status of a command. Where this process is asked to stop, the command is too, and may save."""
    with subprocess.Popen(command, **how) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            if (status := process.wait()) > 0:
                return status
            raise


def _key(stage: Stage) -> str:
    content = hashlib.sha256(json.dumps([list(stage.command), stage.settings], sort_keys=True).encode())
    for path in stage.inputs:
        content.update(f"\n{path}\n".encode())
        content.update(_digest(path).encode())
    return content.hexdigest()


def _digest(path: Path) -> str:
    """A file's content. Of a folder: names and sizes of all files, and the content of its tables (photos are many)."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "absent"
    content = hashlib.sha256()
    for folder, folders, files in os.walk(path, followlinks=True):
        folders.sort()
        for name in sorted(files):
            file = Path(folder, name)
            content.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
            if file.suffix.lower() == ".csv":
                content.update(file.read_bytes())
    return content.hexdigest()


def _end_with_parent() -> None:
    """On Linux a stage is asked to stop when the pipeline is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
