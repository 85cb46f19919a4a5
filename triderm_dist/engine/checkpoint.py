"""Checkpoints that resume bit for bit.

A checkpoint is a folder FOLDER/checkpoints/epoch-E-step-N, written as *.part, flushed to disk and renamed:
`weights.safetensors` (without frozen parameters), `optimizer.safetensors` (`KEY/PARAMETER`, such as
`exp_avg/head.linear.weight`), `average.safetensors` (with `train.ema_decay` or `train.swa_epochs`) and `state.json`
(position in the epoch plan, schedule, loss scale, loss sums, best epoch, non-tensor optimizer state). Frozen parameters
come from their source again, and must have the SHA-256 in `state.json`. Tensors are full and under the network's own
names: a checkpoint resumes on another number of ranks and under another strategy (see the table in
`distributed/full_state.py`), and every file loads with safetensors only. It holds no random state: order, augmentation
and dropout are functions of (seed, epoch, lesion).

It is written by a thread from a copy on the host, while the training continues; the next save waits for it.

The newest `keep_last` are kept, and none of a finished fold unless `train.keep_checkpoints` is set: a training with
more epochs or another learning rate starts from the beginning, since its schedule differs from the first step on. The
selected weights are FOLDER/weights.safetensors (`network_files`). `state.json`, written last, holds the SHA-256 of
every file and of itself. A damaged checkpoint is skipped for the one before it, and written again when the training
reaches its step.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict
from torch import nn

from triderm_dist.checksums import DamagedFile, check_mapping, read_checked_json, write_checked_json
from triderm_dist.distributed.collectives import is_main, on_main
from triderm_dist.distributed.full_state import (
    OptimizerState,
    Tensors,
    changing_weights,
    frozen_parameters,
    full_optimizer_state,
    full_weights,
    group_entries,
    load_optimizer_state,
    participates,
)
from triderm_dist.engine.background_writer import BackgroundWriter
from triderm_dist.engine.ema import WeightAverage
from triderm_dist.engine.finite import damaged_weight
from triderm_dist.engine.network_files import check_complete, read_tensors, save_weights
from triderm_dist.files import file_sha256, naming_file, write_tensors
from triderm_dist.losses import Sums
from triderm_dist.models.network import finished_weights
from triderm_dist.schema import CheckpointError

CHECKPOINT_VERSION = 3
READABLE_VERSIONS = (2, 3)
"""Those of version 2 hold frozen parameters too."""
OLD_EXECUTION = {
    "dropout": "by micro-batch", "order of repeats": "at equal distances", "train.gradient_precision": "fp32",
}  # fmt: skip
"""How a step was computed by versions whose checkpoints do not record it; a training resumes from them all the same."""


@dataclass
class TrainState:
    """Progress: epoch, global batches consumed in it, total optimizer steps, best validation score and its epoch."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_score: float = -1.0
    best_epoch: int = -1


@dataclass
class Training:
    """A running training: everything that a checkpoint holds. `optimizer` is the plain one inside Accelerate's wrapper.

    untrained: see `untrained_tensors`.  sums: the loss sums of the last step, scaled to a whole global batch, which the
    next step may use (train.loss.soft_f1_sums=previous).
    """

    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    average: WeightAverage | None
    state: TrainState
    untrained: Tensors
    sums: Sums | None = None

    def __post_init__(self) -> None:
        self.initial_groups = group_entries(self.optimizer)

    def advance(self, batch: int, sums: Sums) -> None:
        """Count a step, on global batch number `batch` of the epoch: schedule, position and average."""
        self.scheduler.step()
        self.state.batch, self.state.step, self.sums = batch + 1, self.state.step + 1, sums
        if self.average:
            self.average.after_step(self.state.step)


class _Progress(BaseModel):
    model_config = ConfigDict(extra="forbid")
    epoch: int
    batch: int
    step: int
    best_score: float
    best_epoch: int


class _StateKeys(BaseModel):
    """Keys of state.json; those of earlier versions lack the optional ones."""

    identity: str
    state: _Progress
    scheduler: dict[str, Any]
    optimizer_values: dict[str, Any] = {}
    optimizer_groups: list[Any] = []
    scaler: dict[str, Any] | None
    sums: dict[str, list[Any]] | list[Any] | None
    how: dict[str, Any] = {}
    changes: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    frozen: str | None = None


class Checkpoint:
    """A complete checkpoint on disk: load the weights before the network is wrapped, the rest after.

    Raises CheckpointError if state.json is damaged or of another version, or a file is missing or cut. `verify`
    compares the content of all files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.record = read_checked_json(folder / "state.json")
            version = self.record.get("version")
            if version in READABLE_VERSIONS:
                check_mapping(self.record, _StateKeys)
        except (FileNotFoundError, DamagedFile) as error:
            reason = str(error) if isinstance(error, DamagedFile) else "missing"
            raise CheckpointError(f"{folder}: damaged checkpoint (state.json: {reason})") from None
        if version not in READABLE_VERSIONS:
            raise CheckpointError(f"{folder}: checkpoint of version {version}, not {CHECKPOINT_VERSION}")
        self.checksums: dict[str, str] = self.record.get("files", {})
        average = ["average.safetensors"] if (folder / "average.safetensors").exists() else []
        for name in self.checksums or ("weights.safetensors", "optimizer.safetensors", *average):
            check_complete(folder / name)

    def verify(self) -> None:
        """Compare every file with its SHA-256 in state.json. Raises CheckpointError for a damaged one.

        A checkpoint of version 0.1.0 has none: its weights must be numbers that a training reaches.
        """
        if not self.checksums and (damaged := damaged_weight(self._tensors("weights").items())):
            raise CheckpointError(f"{self.folder}: damaged checkpoint (weights.safetensors: {damaged})")
        for name, expected in self.checksums.items():
            if file_sha256(self.folder / name) != expected:
                raise CheckpointError(f"{self.folder}: damaged checkpoint ({name} does not match its checksum)")

    @property
    def state(self) -> TrainState:
        return TrainState(**self.record["state"])

    def load_network(self, network: nn.Module) -> None:
        """Load the weights into a network that is not wrapped yet and has its frozen ones."""
        network.load_state_dict({**frozen_parameters(network), **self._tensors("weights")})

    def load_training(self, accelerator: Accelerator, training: Training) -> None:
        """Load everything but the network's weights into a training. Call on all ranks."""
        weights, state = self._tensors("weights"), OptimizerState(self._tensors("optimizer"))
        state.values, state.groups = self.record.get("optimizer_values", {}), self.record.get("optimizer_groups", [])
        load_optimizer_state(accelerator, training.wrapped, training.optimizer, weights, state)
        scheduler = training.scheduler
        # The rates are those of the current settings, which may differ from the recorded ones.
        scheduler.load_state_dict({**self.record["scheduler"], "base_lrs": scheduler.base_lrs})
        rates = [
            rate * factor(scheduler.last_epoch)
            for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler._last_lr = list(rates)
        for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if training.average:
            training.average.load(self._tensors("average"))
        if accelerator.scaler and self.record["scaler"]:
            accelerator.scaler.load_state_dict(self.record["scaler"])
        sums = self.record["sums"]
        if isinstance(sums, list):  # of a version whose only sums were those of soft F1
            sums = {"soft_f1": sums}
        device = accelerator.device
        training.sums = {name: torch.tensor(each, device=device) for name, each in sums.items()} if sums else None
        training.state = self.state

    def _tensors(self, name: str) -> Tensors:
        return read_tensors(self.folder / f"{name}.safetensors")


def readable_checkpoints(folder: Path, verbose: bool = False) -> list[Checkpoint]:
    """Return the checkpoints in a folder, oldest first, without damaged ones; verbose: print which are skipped."""
    found = []
    for path in sorted(path for path in folder.glob("epoch-*") if path.suffix != ".part"):
        try:
            found.append(Checkpoint(path))
        except CheckpointError as error:
            if verbose:
                print(f"{error}; skipping it", flush=True)
    return found


def _is_intact(folder: Path, verbose: bool = False) -> bool:
    """Return whether a folder holds a checkpoint whose files match their checksums; verbose: print if they do not."""
    try:
        Checkpoint(folder).verify()
    except CheckpointError as error:
        if verbose:
            print(f"{error}; skipping it", flush=True)
        return False
    return True


class Checkpoints:
    """The checkpoints and selected weights of one training, which is identified by its resume hashes: the first is
    recorded, the others are accepted.

    As a context manager it waits at the end, on every rank, until the files asked for are written, and raises what
    writing them raised, unless the block itself raises.

    execution: settings that may change on resume, such as the precision.  frozen: the SHA-256 of the network's frozen
    parameters, None without any.  changes: where settings changed, {"step", setting: [before, after]}.
    """

    def __init__(
        self,
        folder: Path,
        resume_hashes: Sequence[str],
        keep_last: int,
        execution: Mapping[str, Any] | None = None,
        frozen: str | None = None,
    ) -> None:
        self.folder, self.resume_hashes, self.keep_last = folder / "checkpoints", resume_hashes, keep_last
        self.execution, self.frozen, self.changes = dict(execution or {}), frozen, list[dict[str, Any]]()
        self._damaged: list[str] = []
        self._writer, self._saved = BackgroundWriter(), time.monotonic()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception):  # not a Ctrl-C, which ends at once
            with suppress(Exception):
                self._writer.wait()  # without the other ranks, one of which may be lost

    def wait(self) -> None:
        """Wait until the files asked for are written. Call on all ranks. Raises OSError on all of them."""
        on_main(self._writer.wait)

    def is_due(self, seconds: float | None) -> bool:
        """Return on all ranks whether the last save, or the start, was so many seconds ago; None is never. Call on all
        ranks.
        """
        return seconds is not None and on_main(lambda: time.monotonic() - self._saved >= seconds)

    def save(self, accelerator: Accelerator, training: Training) -> None:
        """Copy a training to the host and start to write it as a checkpoint, once the one before is written.

        Call on all ranks, between two steps. Raises OSError on all ranks where the one before could not be written.
        """
        self.wait()
        self._saved = time.monotonic()
        optimizer = full_optimizer_state(accelerator, training.wrapped, training.optimizer, training.initial_groups)
        parts = {
            "weights": changing_weights(accelerator, training.wrapped, training.untrained),
            "optimizer": optimizer.tensors,
            **({"average": training.average.state()} if training.average and participates(accelerator) else {}),
        }
        record = {
            "version": CHECKPOINT_VERSION,
            "identity": self.resume_hashes[0],
            "state": asdict(training.state),
            "scheduler": training.scheduler.state_dict(),
            "optimizer_values": optimizer.values,
            "optimizer_groups": optimizer.groups,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "sums": {name: sums.tolist() for name, sums in training.sums.items()} if training.sums else None,
            "how": self.execution,
            "changes": self.changes,
            "frozen": self.frozen,
        }
        if is_main():
            state, record = replace(training.state), copy.deepcopy(record)
            self._writer.start(lambda: self._write(state, parts, record))

    def keep_weights(self, accelerator: Accelerator, training: Training, **info: Any) -> None:
        """Copy the full weights to the host and start to write them under canonical names, for prediction, as the
        selected ones. Call on all ranks. Raises OSError as `save` does.
        """
        self.wait()
        weights = finished_weights(full_weights(accelerator, training.wrapped, training.untrained))
        if is_main():
            self._writer.start(lambda: save_weights(self.folder.parent / "weights", weights, **info))

    def _write(self, state: TrainState, parts: Mapping[str, Tensors], record: Mapping[str, Any]) -> None:
        final = self.folder / f"epoch-{state.epoch:04d}-step-{state.step:08d}"
        part = final.with_name(final.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            checksums = {}
            for name, tensors in parts.items():
                file = part / f"{name}.safetensors"
                checksums[file.name] = write_tensors(file, tensors)
            write_checked_json(part / "state.json", {**record, "files": checksums})
            _flush(part)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)  # the disk may be full
            raise
        if _is_intact(final):
            shutil.rmtree(part)  # saved twice: stopped during validation, resumed from this step and stopped again
        else:
            shutil.rmtree(final, ignore_errors=True)  # damaged
            part.rename(final)
            _flush(self.folder)
        for name in self._damaged:  # they must not take the place of an intact one
            if name != final.name:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self._damaged.clear()
        for old in readable_checkpoints(self.folder)[: -self.keep_last]:
            shutil.rmtree(old.folder)

    def adopt(self) -> None:
        """Let this training resume from the checkpoints in its folder, which were saved under other settings.

        It takes over their weights, optimizer state and step with its own learning rates, also from a finished
        training.
        """
        (self.folder.parent / "fold.json").unlink(missing_ok=True)
        for saved in readable_checkpoints(self.folder):
            write_checked_json(saved.folder / "state.json", {**saved.record, "identity": self.resume_hashes[0]})

    def newest(self, folder: Path | None) -> Checkpoint | None:
        """Return the newest intact checkpoint of this training in FOLDER/checkpoints, or None. Call on all ranks.

        Prints which are skipped because they are damaged. Raises CheckpointError, on all ranks, where the frozen
        parameters were others.
        """
        newest = on_main(lambda: self._newest_intact(folder / "checkpoints")) if folder else None
        if newest is None:
            return None
        saved = Checkpoint(newest)
        before, self.changes = {**OLD_EXECUTION, **saved.record.get("how", {})}, saved.record.get("changes", [])
        now = self.execution
        if changed := {key: [old, now[key]] for key, old in before.items() if now.get(key, old) != old}:
            self.changes = [*self.changes, {"step": saved.state.step, **changed}]
        return saved

    def _newest_intact(self, folder: Path) -> Path | None:
        """Return the newest intact checkpoint of this training in a folder, and remember newer ones as damaged."""
        for saved in reversed(readable_checkpoints(folder, True)):
            if saved.record["identity"] not in self.resume_hashes:
                continue
            if not _is_intact(saved.folder, True):
                self._damaged.append(saved.folder.name)
                continue
            if saved.record["version"] > 2 and saved.record.get("frozen") != self.frozen:
                raise CheckpointError(
                    f"{saved.folder}: the frozen weights of tower.source or init are not those that this training "
                    "began with; restore their file, or set another output"
                )
            return saved.folder
        return None

    def describe_changes(self, saved: Checkpoint) -> str:
        """Describe in one line the settings that changed between a checkpoint and this run; empty if none did."""
        if not self.changes or self.changes[-1]["step"] != saved.state.step:
            return ""
        changed = {key: pair for key, pair in self.changes[-1].items() if key != "step"}
        listed = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changed.items())
        return (
            f"resuming from step {saved.state.step} with changed settings ({listed}); "
            "results will differ from an uninterrupted run"
        )


def _flush(folder: Path) -> None:
    """Flush a folder and its files to disk, so that a power failure cannot leave an empty checkpoint."""
    for path in (*folder.glob("*.*"), folder):
        if path.is_dir() and path != folder:
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            with naming_file(path):
                os.fsync(handle)
        finally:
            os.close(handle)
