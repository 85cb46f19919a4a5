"""Logging of a run on rank 0: a printed line per log interval, JSON lines, and experiment trackers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from triderm_dist.distributed.collectives import on_main
from triderm_dist.extras import install_command, is_installed
from triderm_dist.files import naming_file, write_text
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.monitoring.train_lines import TrainLines
from triderm_dist.schema import ConfigError, one_line
from triderm_dist.terminal import wrapped

PROJECT = "triderm-dist"
"""Project or experiment of the runs, for trackers that have one."""


class Tracker:
    """Appends records to FOLDER/metrics.jsonl, passes them to trackers and prints them, on rank 0 (`active`).

    Records: {"kind": "train", epoch, step, seconds, loss, each part of it (focal, soft_f1, other terms, aux), lr,
    grad_norm, lesions_per_s, data_wait, memory_gib, seconds_left, mfu where known} and {"kind": "validation", epoch,
    step, seconds, macro_f1 (argmax), official}; seconds: of training so far, also before a resume. Opening (`with`) at
    a step, after `epoch` validated epochs, drops later records: a
    resumed run writes them again. Open it and log on all ranks.

    trackers: names of Accelerate's trackers, such as tensorboard (to FOLDER/tensorboard), wandb, mlflow, and of those
    registered by plugins.  settings: configuration that trackers show, by dotted key.  lines: formats what is printed.
    later_seconds: the time of the trainings that follow, given that of this one.

    Raises ConfigError, on all ranks, for an unknown tracker or a missing package (without TensorBoard, the default, a
    line is printed instead); opening raises it for a tracker that does not start. A tracker that fails later is
    dropped with a message and does not end the training.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        active: bool,
        *,
        lines: TrainLines,
        step: int = 0,
        epoch: int = 0,
        trackers: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
        later_seconds: Callable[[float], float] = lambda seconds: 0.0,
    ) -> None:
        self.name, self.active, self._lines, self._later_seconds = name, active, lines, later_seconds
        self._kinds = tracker_classes(trackers)
        if "tensorboard" in trackers and "tensorboard" not in self._kinds:
            line = wrapped(f"{name}: no TensorBoard files: {install_command('tensorboard')}")
            on_main(lambda: print(line, flush=True))
        self._path, self._step, self._epoch, self._settings = folder / "metrics.jsonl", step, epoch, settings or {}

    def __enter__(self) -> Tracker:
        on_main(self._open)
        return self

    def _open(self) -> None:
        step, folder = self._step, self._path.parent
        before = [line for line in read_metrics(self._path) if line["step"] <= step] if step else []
        kept = [line for line in before if line["kind"] != "validation" or line["epoch"] <= self._epoch]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._began = time.perf_counter() - (kept[-1].get("seconds", 0.0) if kept else 0.0)
        self._trackers = {
            kind: _started(kind, cls, self.name, folder, step, self._settings) for kind, cls in self._kinds.items()
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._file.close()
            self._for_each("finish")

    def log(self, kind: str, epoch: float, step: int, values: Mapping[str, float]) -> None:
        """Log a record of kind "train" or "validation". Call on all ranks."""
        on_main(lambda: self._log(kind, epoch, step, values))

    def _log(self, kind: str, epoch: float, step: int, values: Mapping[str, float]) -> None:
        seconds = time.perf_counter() - self._began
        record = {"kind": kind, "epoch": round(epoch, 4), "step": step, "seconds": round(seconds, 2), **values}
        with naming_file(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        self._for_each("log", {f"{kind}/{name}": value for name, value in values.items()}, step=step)
        if kind == "train":
            left = values["seconds_left"]
            print(self._lines.train(step, values, left + self._later_seconds(seconds + left)), flush=True)
        else:
            print(self._lines.validation(epoch, values), flush=True)

    def _for_each(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of every tracker, dropping those that raise."""
        for kind, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*args, **kwargs)
            except Exception as error:  # whatever a service or its client raises
                del self._trackers[kind]
                reason = one_line(error, 200, with_type=True)
                print(wrapped(f"{self.name}: {kind} failed and is no longer used ({reason})"), flush=True)


def tracker_classes(names: Sequence[str]) -> dict[str, Any]:
    """Return the class of each tracker, as `tracker_class` does, but leave out TensorBoard where it is not installed:
    it is the default, which must not stop a training.
    """
    found = any(map(is_installed, ("tensorboard", "tensorboardX")))
    return {name: tracker_class(name) for name in dict.fromkeys(names) if found or name != "tensorboard"}


def tracker_class(name: str) -> Any:
    """Return Accelerate's class of a tracker, built in or registered by a plugin. Raises ConfigError if the name is
    unknown or its package is missing.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise ConfigError(f"train.trackers: {name!r} is not a tracker; known: {known} (plugins may add others)")
    if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
        raise ConfigError(f"train.trackers: {name} is not installed; {install_command(name)}, or remove it")
    return LOGGER_TYPE_TO_CLASS[name]


def _started(kind: str, cls: Any, run: str, folder: Path, step: int, settings: Mapping[str, Any]) -> Any:
    """Create and start a tracker. Raises ConfigError if it does not start."""
    # W&B resumes the run with this id when a training resumes.
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": "tensorboard", "logging_dir": str(folder), "purge_step": step},
        "wandb": {"run_name": PROJECT, "name": run, "dir": str(folder), "id": run_id, "resume": "allow"},
        "mlflow": {"experiment_name": PROJECT, "run_name": run},
    }
    plain = {"run_name": PROJECT, **({"logging_dir": str(folder)} if cls.requires_logging_directory else {})}
    try:
        tracker = cls(**options.get(kind, plain))
        tracker.start()
        if kind != "tensorboard":  # it would open a second event file; the settings are in config.yaml
            tracker.store_init_configuration(dict(settings))
    except Exception as error:  # whatever a service or its client raises
        raise ConfigError(
            f"train.trackers: {kind} did not start ({one_line(error, 200, with_type=True)}); set it up or remove it"
        ) from None
    return tracker
