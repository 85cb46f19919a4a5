"""Run programs one after the other, and skip those whose inputs and outputs have not changed (by content, not time).

A stage is a program in its own process: its memory is freed, it fails with its own exit code, and it can be run by hand
with the same settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from triderm_dist.checksums import DamagedFile, read_checked_json
from triderm_dist.cli import Interrupted
from triderm_dist.environment import record_stage
from triderm_dist.files import exclusive_lock, file_sha256, walk_folders, write_json
from triderm_dist.runtime.run_log import LOG_FOLDER
from triderm_dist.runtime.signals import (
    BAD_INPUT,
    INTERRUPTED,
    SIGNALS,
    end_at_once,
    end_with_parent,
    handle_signals,
    on_second_request,
)
from triderm_dist.runtime.terminal import clock, wrapped
from triderm_dist.runtime.usage import USAGE_FILE, Meter, Usage

END_SECONDS = 5.0
"""Time for a stage to end after a second Ctrl-C."""


@dataclass(frozen=True)
class Stage:
    """A command, the settings and files that its result depends on, and the files that it writes.

    How the command is run (launcher, parallel folds) changes no result and is not part of the settings, nor is where
    the inputs lie. former_settings: the settings as earlier versions hashed them, where they were others.
    """

    name: str
    command: Sequence[str]
    settings: Any
    inputs: Sequence[Path]
    outputs: Sequence[Path]
    former_settings: Any = None


def run_stages(
    stages: Sequence[Stage], folder: Path, begin: Callable[[], None] = lambda: None
) -> list[tuple[str, Usage]]:
    """Run the stages that are not done, recording each in FOLDER/stages.json. Exits with the code of a failed stage.

    Returns the name and usage of each that was run, which environment.json of a run keeps too. begin: called first,
    while the folder is locked. Raises Busy if another run holds the lock; Interrupted after a signal to stop, once
    the running stage, to which SIGTERM is passed, has ended.
    """
    record = folder / "stages.json"
    used: list[tuple[str, Usage]] = []
    refusal = f"{folder}: another run is active in this folder; wait for it or stop it"
    with exclusive_lock(folder / ".lock", refusal) as lock, _stoppable(lock, folder) as run:
        begin()
        done = _read(record)
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            current = [_digest([stage.settings, *stage.inputs], folder), _digest(stage.outputs, folder)]
            recorded = done.get(stage.name)
            if recorded == current or (recorded is not None and recorded == _former_digests(stage)):
                print(f"{title}: skipped, inputs unchanged", flush=True)
                if recorded != current:
                    write_json(record, done := {**done, stage.name: current})
                continue
            print(f"{title}\n{_shown(stage.command)}", flush=True)
            started = datetime.now(UTC)
            status, usage = run(stage.command)
            if status:
                sys.exit(status if status > 0 else 128 - status)
            done[stage.name] = [current[0], _digest(stage.outputs, folder)]
            write_json(record, done)
            if usage:
                used.append((stage.name, usage))
                record_stage(folder, stage.name, started, asdict(usage))
            print(f"{title}: done in {clock((datetime.now(UTC) - started).total_seconds())}", flush=True)
    return used


def _shown(command: Sequence[str]) -> str:
    """Return a command as `triderm PROGRAM ...`, wrapped as a shell reads it."""
    words, program = list(command), "triderm_dist.commands."
    if words[:2] == ["python", "-m"] and words[2].startswith(program):
        words = ["triderm", words[2].removeprefix(program), *words[3:]]
    return wrapped(shlex.join(words), "    ", "  ").replace("\n", " \\\n")


@contextmanager
def _stoppable(lock: int, folder: Path) -> Iterator[Callable[[Sequence[str]], tuple[int, Usage | None]]]:
    """Yield a function that runs a command and returns its exit code and usage; signals to stop are forwarded to it.

    A Ctrl-C after the first request ends the command at once, and this process with it.
    """
    asked, running = False, None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if running:
            running.terminate()

    def stop_at_once() -> None:
        if running and running.poll() is None:
            running.send_signal(signal.SIGINT)  # its second, which it obeys at once
            with suppress(subprocess.TimeoutExpired):
                running.wait(END_SECONDS)
            running.kill()
        end_at_once()

    def run(command: Sequence[str]) -> tuple[int, Usage | None]:
        nonlocal running
        if asked:
            raise Interrupted("rerun the same command to resume")
        # Waiting OpenMP threads must not spin: they would fight with decoder threads and XGBoost for the cores.
        report = folder / ".usage.json"
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, LOG_FOLDER: str(folder), USAGE_FILE: str(report)}
        words = [sys.executable if word == "python" else word for word in command]
        # In its own process group it receives Ctrl-C once, from `stop`. It inherits the lock.
        meter = Meter(report)
        running = subprocess.Popen(words, env=environment, pass_fds=[lock], preexec_fn=end_with_parent, process_group=0)
        if asked:
            running.terminate()
        status, usage = meter.wait(running)
        if asked and status not in (0, BAD_INPUT, INTERRUPTED):  # which the stage has explained
            raise Interrupted("rerun the same command to resume")
        return status, usage

    with on_second_request(stop_at_once), handle_signals(stop, (*SIGNALS, signal.SIGINT)):
        yield run


def _read(record: Path) -> dict[str, Any]:
    """Read the digests of inputs and outputs of each finished stage."""
    try:
        return read_checked_json(record)
    except FileNotFoundError:
        return {}
    except DamagedFile:
        pass
    print(f"{record}: not readable; all stages run again, and each skips its finished work", flush=True)
    return {}


def _former_digests(stage: Stage) -> list[str]:
    """Return what earlier versions recorded, which hashed paths as they were typed."""
    settings = stage.settings if stage.former_settings is None else stage.former_settings
    return [_digest([settings, *stage.inputs]), _digest(stage.outputs)]


def _digest(parts: Sequence[Any], folder: Path | None = None) -> str:
    """Hash settings by value, files and folders by name and content.

    The name of a path in `folder`, that of the run, is relative to it, and that of any other path is absolute, so that
    a run may be moved. None: paths as they are spelled, as earlier versions hashed them.
    """
    digest = hashlib.sha256()
    for part in parts:
        text = (
            f"{_name(part, folder)}\n{_content(part)}" if isinstance(part, Path) else json.dumps(part, sort_keys=True)
        )
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()


def _name(path: Path, folder: Path | None) -> str:
    if folder is None:
        return str(path)
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return f"RUN/{path.relative_to(folder).as_posix()}" if path.is_relative_to(folder) else str(path)


def _content(path: Path) -> str:
    """Hash the content of a file; of a folder the names and sizes of all files, and the content of its tables only."""
    if not path.is_dir():
        return file_sha256(path) if path.exists() else "absent"
    content = hashlib.sha256()
    for folder, files in walk_folders(path):
        for name in files:
            file = Path(folder, name)
            size = str(file.stat().st_size) if file.exists() else "absent"  # a link may lead nowhere
            content.update(f"{file.relative_to(path)} {size}\n".encode(errors="surrogateescape"))
            if file.suffix.lower() == ".csv" and file.is_file():
                content.update(file.read_bytes())
    return content.hexdigest()
