"""Programs run one after the other, each skipped while its inputs and outputs (content, not time) are what they were.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from triderm_dist.cli import BAD_INPUT, SIGNALS, Interrupted, handle_signals
from triderm_dist.files import exclusive_lock, file_sha256, write_json
from triderm_dist.schema import InputError


@dataclass(frozen=True)
class Stage:
    """A command, the settings and files its result depends on, and the files that it leaves. How the command is run
    (launcher, parallel folds) changes no result: it is none of the settings.
    """

    name: str
    command: Sequence[str]
    settings: Any
    inputs: Sequence[Path]
    outputs: Sequence[Path]


def run_stages(stages: Sequence[Stage], folder: Path, begin: Callable[[], None] = lambda: None) -> None:
    """Run what is not done, recording each finished stage in FOLDER/stages.json. Leaves with a failed stage's exit
    status. `begin` is called first, when no other run is working in the folder.

    Raises InputError where one is; Interrupted where SIGTERM, SIGUSR1 or Ctrl-C asked to stop: then the stage that was
    running has been asked by SIGTERM, and has ended.
    """
    record = folder / "stages.json"
    refusal = InputError(f"{folder}: another run is working here; wait for it or stop it")
    with exclusive_lock(folder / ".lock", refusal) as lock, _stoppable(lock) as run:
        begin()
        done = _read(record)
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            inputs = _digest([stage.settings, *stage.inputs])
            if done.get(stage.name) == [inputs, _digest(stage.outputs)]:
                print(f"{title}: done before, inputs unchanged", flush=True)
                continue
            print(f"{title}: {' '.join(stage.command)}", flush=True)
            started = time.perf_counter()
            if status := run(stage.command):
                sys.exit(status if status > 0 else 128 - status)
            done[stage.name] = [inputs, _digest(stage.outputs)]
            write_json(record, done)
            print(f"{title}: {time.perf_counter() - started:.0f} s", flush=True)


@contextmanager
def _stoppable(lock: int) -> Iterator[Callable[[Sequence[str]], int]]:
    """What runs a command and tells its exit status, and hands on that this process is asked to stop."""
    asked, running = False, None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if running:
            running.terminate()

    def run(command: Sequence[str]) -> int:
        nonlocal running
        if asked:
            raise Interrupted("the same command goes on")
        # Waiting OpenMP threads must not spin: they would fight with decoder threads and XGBoost for the cores.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        words = [sys.executable if word == "python" else word for word in command]
        # In a group of its own Ctrl-C reaches it by way of `stop` alone, once. It holds the lock too.
        running = subprocess.Popen(
            words, env=environment, pass_fds=[lock], preexec_fn=_end_with_parent, process_group=0
        )
        if asked:
            running.terminate()
        status = running.wait()
        if asked and status not in (0, BAD_INPUT):
            raise Interrupted("the same command goes on")
        return status

    with handle_signals(stop, (*SIGNALS, signal.SIGINT)):
        yield run


def _read(record: Path) -> dict[str, Any]:
    """The digests of each finished stage: of its inputs, of its outputs."""
    try:
        done = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        done = None
    if isinstance(done, dict):
        return done
    print(f"{record}: not readable; all stages run again, each skips what it finds done", flush=True)
    return {}


def _digest(parts: Sequence[Any]) -> str:
    """Of settings by value, of files and folders by path and content."""
    digest = hashlib.sha256()
    for part in parts:
        text = f"{part}\n{_content(part)}" if isinstance(part, Path) else json.dumps(part, sort_keys=True)
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()


def _content(path: Path) -> str:
    """A file's content. Of a folder: names and sizes of all files, and the content of its tables (photos are many)."""
    if not path.is_dir():
        return file_sha256(path) if path.exists() else "absent"
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
