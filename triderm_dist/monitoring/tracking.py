"""Logging of a run on rank 0: a printed line per log interval, JSON lines, and experiment trackers."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from triderm_dist.config import TrainConfig
from triderm_dist.distributed.collectives import is_main, on_main
from triderm_dist.files import naming_file, write_text
from triderm_dist.monitoring.metrics_log import metrics_line, read_metrics
from triderm_dist.monitoring.train_lines import TrainLines
from triderm_dist.runtime.extras import install_command, is_installed
from triderm_dist.runtime.messages import did_you_mean, one_line
from triderm_dist.runtime.redact import REDACTED, redact_tree
from triderm_dist.runtime.terminal import wrapped
from triderm_dist.schema import ConfigError
from triderm_dist.schema.plugins import check_known
from triderm_dist.settings import flatten

WANDB_FILE = "wandb_id.txt"
"""File of a training with the id of its W&B run."""
PROJECT = "triderm-dist"
"""Project or experiment of the runs, for trackers that have one."""


class Tracker:
    """Appends records to FOLDER/metrics.jsonl, passes them to trackers and prints them, on rank 0.

    Records: {"kind": "train", epoch, step, seconds, loss, each part of it (focal, soft_f1, other terms, aux), lr,
    grad_norm, lesions_per_s, data_wait, memory_gib, seconds_left, mfu where known} and {"kind": "validation", epoch,
    step, seconds, macro_f1 (argmax), official}; seconds: of training so far, also before a resume. Opening (`with`) at
    a step, after `epoch` validated epochs, drops later records: a resumed run writes them again. Open it and log on
    all ranks.

    name: of the training.  lines: formats what is printed.  config: the settings, which trackers show.
    `config.trackers`: names of Accelerate's trackers, such as tensorboard (to FOLDER/tensorboard), wandb, mlflow, and
    of those registered by plugins.  group: name of the run that the training is part of.
    later_seconds: the time of the trainings that follow, given that of this one.

    Raises ConfigError, on all ranks, for an unknown tracker or a missing package (without TensorBoard, the default, a
    line is printed instead); opening raises it for a tracker that does not start. A tracker that fails later is
    dropped with a message and does not end the training.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        lines: TrainLines,
        config: TrainConfig,
        step: int = 0,
        epoch: int = 0,
        group: str = "",
        later_seconds: Callable[[float], float] = lambda seconds: 0.0,
    ) -> None:
        self.name, self._lines, self._config, self._later_seconds = name, lines, config, later_seconds
        self._path, self._step, self._epoch, self._group = folder / "metrics.jsonl", step, epoch, group
        self._kinds = tracker_classes(config.trackers)
        if "tensorboard" in config.trackers and "tensorboard" not in self._kinds:
            line = wrapped(f"{name}: no TensorBoard files: {install_command('tensorboard')}")
            on_main(lambda: print(line, flush=True))

    def __enter__(self) -> Tracker:
        on_main(self._open)
        return self

    def _open(self) -> None:
        step, folder = self._step, self._path.parent
        before = [line for line in read_metrics(self._path) if line["step"] <= step] if step else []
        kept = [line for line in before if line["kind"] != "validation" or line["epoch"] <= self._epoch]
        write_text(self._path, "".join(map(metrics_line, kept)))
        self._file = self._path.open("a", encoding="utf-8")
        self._began = time.perf_counter() - (kept[-1].get("seconds", 0.0) if kept else 0.0)
        shown = flatten(redact_tree(self._config.model_dump(mode="json")))
        self._trackers = {}
        for kind, cls in self._kinds.items():
            arguments = tracker_arguments(kind, self.name, self._group, folder, step)
            if kind == "wandb":
                arguments["id"] = _wandb_id(folder, step)
            self._trackers[kind] = _started(cls, arguments, self._config.tracker_settings.get(kind, {}), shown)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_main():
            with naming_file(self._path):  # closing writes the buffer, which a full disk may reject
                self._file.close()
            self._for_each("finish")

    def log(self, kind: str, epoch: float, step: int, values: Mapping[str, float]) -> None:
        """Log a record of kind "train" or "validation". Call on all ranks."""
        on_main(lambda: self._log(kind, epoch, step, values))

    def _log(self, kind: str, epoch: float, step: int, values: Mapping[str, float]) -> None:
        seconds = time.perf_counter() - self._began
        record = {"kind": kind, "epoch": round(epoch, 4), "step": step, "seconds": round(seconds, 2), **values}
        with naming_file(self._path):
            self._file.write(metrics_line(record))
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
            except Exception as error:  # services and their clients raise many types
                del self._trackers[kind]
                reason = one_line(error, 200, with_type=True)
                print(wrapped(f"{self.name}: {kind} failed and is no longer used ({reason})"), flush=True)


def tracker_classes(names: Sequence[str]) -> dict[str, Any]:
    """Return the class of each tracker as `tracker_class`, without TensorBoard if it is not installed: the default
    tracker must not stop a training.
    """
    found = any(map(is_installed, ("tensorboard", "tensorboardX")))
    return {name: tracker_class(name) for name in dict.fromkeys(names) if found or name != "tensorboard"}


def check_trackers(config: TrainConfig) -> None:
    """Raise ConfigError as `tracker_class` does, also for `train.tracker_settings` of a name that is no tracker."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker_classes(config.trackers)
    for name in config.tracker_settings:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"train.tracker_settings.{name}: no tracker; {did_you_mean(name, LOGGER_TYPE_TO_CLASS)}")


def tracker_class(name: str) -> Any:
    """Return Accelerate's class of a tracker, built in or registered by a plugin. Raises ConfigError if the name is
    unknown or its package is missing.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    check_known("train.trackers", name, LOGGER_TYPE_TO_CLASS, "a tracker")
    if name in LoggerType.list() and LoggerType(name) not in get_available_trackers():
        raise ConfigError(f"train.trackers: {name} is not installed; {install_command(name)}, or remove it")
    return LOGGER_TYPE_TO_CLASS[name]


def tracker_arguments(kind: str, name: str, group: str, folder: Path, step: int = 0) -> dict[str, Any]:
    """Return the default arguments of a tracker's class; `train.tracker_settings` may replace or add some.

    name: of the training.  group: name of its run.  folder: of the training's files.  step: from which it resumes.
    The environment's WANDB_PROJECT, WANDB_RUN_GROUP, WANDB_NAME (before the name) and WANDB_DIR replace the defaults;
    Accelerate reads MLFLOW_EXPERIMENT_NAME and the like.
    """
    full_name = f"{group} {name}".strip()
    if kind == "tensorboard":
        return {"run_name": "tensorboard", "logging_dir": str(folder), "purge_step": step}
    if kind == "wandb":
        own = os.environ.get("WANDB_NAME")
        return {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "group": os.environ.get("WANDB_RUN_GROUP", group),
            "name": f"{own} {name}" if own else full_name,
            **({} if "WANDB_DIR" in os.environ else {"dir": str(folder)}),
            "id": _id_of_folder(folder),
            "resume": "allow",
        }
    if kind == "mlflow":
        return {"experiment_name": PROJECT, "run_name": full_name, "tags": {"group": group}}
    return {"run_name": PROJECT, "logging_dir": str(folder)}


def _wandb_id(folder: Path, step: int) -> str:
    """Return the id of the W&B run of a training: a new one at its first step, which a resumed training continues.

    That of another training in the same folder, such as one with other settings, would get its first steps again, and
    W&B drops steps that a run has had.
    """
    file = folder / WANDB_FILE
    if not step:
        write_text(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8") if file.exists() else _id_of_folder(folder)  # earlier versions wrote none


def _id_of_folder(folder: Path) -> str:
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def log_scores(folder: Path, scores: Mapping[str, float], config: TrainConfig) -> None:
    """Log final scores to the trackers of a run, except for TensorBoard, under the name "RUN scores". Call on rank 0.

    folder: of the run. A tracker that fails only prints a line, since the run's files hold the scores too.
    """
    for kind in dict.fromkeys(config.trackers):
        if kind == "tensorboard":
            continue
        try:
            arguments = tracker_arguments(kind, "scores", folder.resolve().name, folder)
            tracker = _started(tracker_class(kind), arguments, config.tracker_settings.get(kind, {}), {})
            tracker.log(dict(scores))
            tracker.finish()
        except Exception as error:  # services and their clients raise many types
            print(wrapped(f"scores are not logged to {kind}: {one_line(error, 200)}"), flush=True)


def _started(cls: Any, arguments: dict[str, Any], own: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """Create and start a tracker. Raises ConfigError if it does not start.

    own: arguments set by the user.  settings: the configuration that it shows.
    """
    from accelerate import PartialState

    PartialState()  # required by Accelerate's trackers; a training has created it
    if REDACTED in str(own):
        raise ConfigError(
            f"train.tracker_settings.{cls.name}: saved settings hold no passwords and tokens; give them again, or "
            "better by the environment, as in WANDB_API_KEY or MLFLOW_TRACKING_URI"
        )
    arguments = {**arguments, **own}
    if cls.name == "wandb":  # Accelerate's name for it
        arguments["run_name"] = arguments.pop("project")
    elif not cls.requires_logging_directory and "logging_dir" not in own:
        arguments.pop("logging_dir", None)
    try:
        tracker = cls(**arguments)
        if cls.name == "mlflow":
            vars(tracker).update(own)  # Accelerate prefers the environment
        tracker.start()
        if settings and cls.name != "tensorboard":  # it would open a second event file; they are in config.yaml
            tracker.store_init_configuration(dict(settings))
    except Exception as error:  # services and their clients raise many types
        reason = one_line(error, 200, with_type=True)
        raise ConfigError(f"train.trackers: {cls.name} did not start ({reason}); set it up or remove it") from None
    return tracker
