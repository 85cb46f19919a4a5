"""Checkpoints that resume bit for bit, and weight files that load without the engine.

A checkpoint is a folder FOLDER/checkpoints/epoch-E-step-N, written beside, flushed to disk and renamed:
`weights.safetensors`, `optimizer.safetensors`, `average.safetensors` (with `train.ema_decay`) and `state.json` (place
in the plan, schedule, loss scale, soft F1 sums, best epoch). All of it is whole and under the network's own names, so
that it resumes on other ranks and another way to run (the table is in `engine/state.py`), and any file loads with
safetensors alone. No random state is in it: order, augmentation and dropout are functions of (seed, step).

The newest `keep_last` are kept; the weights of the best epoch are FOLDER/weights.safetensors. A checkpoint that is
damaged is passed over, and written again when the training comes to its step.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from triderm_dist.distributed.collectives import on_main
from triderm_dist.distributed.full_state import (
    OptimizerState,
    Tensors,
    full_optimizer_state,
    full_weights,
    group_entries,
    load_optimizer_state,
    participates,
)
from triderm_dist.engine.ema import Ema
from triderm_dist.files import atomic_path, file_sha256, naming_file, write_json
from triderm_dist.losses import Sums
from triderm_dist.schema import CheckpointError, one_line

FORMAT, VERSION = "triderm-model", 1
CHECKPOINT_VERSION = 2


@dataclass
class TrainState:
    """Where a run is: epoch, global batches consumed in it, optimizer steps in all, best validation score and its
    epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_score: float = -1.0
    best_epoch: int = -1


@dataclass
class Training:
    """A running training: all that a checkpoint holds. `optimizer` is the plain one inside of Accelerate's.

    sums: the loss sums of the last step, which the next one may use (train.loss.soft_f1_sums=previous).
    """

    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    ema: Ema | None
    state: TrainState
    sums: Sums | None = None

    def __post_init__(self) -> None:
        self.initial_groups = group_entries(self.optimizer)

    def advance(self, batch: int, sums: Sums) -> None:
        """Count a step, on global batch number `batch` of the epoch: schedule, position and EMA."""
        self.scheduler.step()
        self.state.batch, self.state.step, self.sums = batch + 1, self.state.step + 1, sums
        if self.ema:
            self.ema.update(self.state.step)


class Saved:
    """A complete checkpoint on disk. Weights go into the network before it is wrapped, the rest after.

    Raises CheckpointError where it is damaged or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.record: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            version = self.record["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: damaged checkpoint (state.json: {type(error).__name__})") from None
        if version != CHECKPOINT_VERSION:
            raise CheckpointError(f"{folder}: checkpoint of version {version}, not {CHECKPOINT_VERSION}")
        for path in [folder / "weights.safetensors", folder / "optimizer.safetensors", *folder.glob("av*.safetensors")]:
            _read_tensors(path, only_look=True)

    @property
    def state(self) -> TrainState:
        return TrainState(**self.record["state"])

    def into_network(self, network: nn.Module) -> None:
        network.load_state_dict(self._tensors("weights"))

    def into_training(self, accelerator: Accelerator, training: Training) -> None:
        """Call on all ranks."""
        weights, state = self._tensors("weights"), OptimizerState(self._tensors("optimizer"))
        state.values, state.groups = self.record.get("optimizer_values", {}), self.record.get("optimizer_groups", [])
        load_optimizer_state(accelerator, training.wrapped, training.optimizer, weights, state)
        scheduler = training.scheduler
        # The rates are those of the present settings, which may be others than the recorded ones.
        scheduler.load_state_dict({**self.record["scheduler"], "base_lrs": scheduler.base_lrs})
        rates = [
            rate * factor(scheduler.last_epoch)
            for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler._last_lr = list(rates)
        for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if training.ema:
            training.ema.load(self._tensors("average"))
        if accelerator.scaler and self.record["scaler"]:
            accelerator.scaler.load_state_dict(self.record["scaler"])
        sums = self.record["sums"]
        if isinstance(sums, list):  # before there were other terms
            sums = {"soft_f1": sums}
        training.sums = sums and {name: torch.tensor(value, device=accelerator.device) for name, value in sums.items()}
        training.state = self.state

    def _tensors(self, name: str) -> Tensors:
        return _read_tensors(self.folder / f"{name}.safetensors")


def readable(folder: Path, tell: bool = False) -> list[Saved]:
    """The checkpoints in a folder, oldest first, without those that are damaged; tell: say which are."""
    found = []
    for path in sorted(path for path in folder.glob("epoch-*") if path.suffix != ".part"):
        try:
            found.append(Saved(path))
        except CheckpointError as error:
            if tell:
                print(f"{error}; it is passed over", flush=True)
    return found


class Checkpoints:
    """The checkpoints of one training, told apart from those of other settings by `identity`.

    how: settings that may differ from checkpoint to checkpoint, such as the precision; `changes` tells where they did.
    """

    def __init__(self, folder: Path, identity: str, keep_last: int, how: Mapping[str, Any] | None = None) -> None:
        self.folder, self.identity, self.keep_last = folder / "checkpoints", identity, keep_last
        self.how, self.changes = dict(how or {}), list[dict[str, Any]]()

    def save(self, accelerator: Accelerator, training: Training) -> None:
        """Call on all ranks, between two steps."""
        optimizer = full_optimizer_state(accelerator, training.wrapped, training.optimizer, training.initial_groups)
        parts = {
            "weights": full_weights(accelerator, training.wrapped),
            "optimizer": optimizer.tensors,
            **({"average": training.ema.state()} if training.ema and participates(accelerator) else {}),
        }
        record = {
            "version": CHECKPOINT_VERSION,
            "identity": self.identity,
            "state": asdict(training.state),
            "scheduler": training.scheduler.state_dict(),
            "optimizer_values": optimizer.values,
            "optimizer_groups": optimizer.groups,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            "sums": training.sums and {name: sums.tolist() for name, sums in training.sums.items()},
            "how": self.how,
            "changes": self.changes,
        }
        on_main(lambda: self._write(training.state, parts, record))

    def _write(self, state: TrainState, parts: Mapping[str, Tensors], record: Mapping[str, Any]) -> None:
        final = self.folder / f"epoch-{state.epoch:04d}-step-{state.step:08d}"
        beside = final.with_name(final.name + ".part")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            for name, tensors in parts.items():
                _write_tensors(beside / f"{name}.safetensors", tensors)
            write_json(beside / "state.json", record)
            _flush(beside)
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)  # a full disk needs the room
            raise
        if final in [saved.folder for saved in readable(self.folder)]:
            shutil.rmtree(beside)  # stopped while it validated, and again after it went on from here
        else:
            shutil.rmtree(final, ignore_errors=True)  # a damaged one
            beside.rename(final)
            _flush(self.folder)
        for old in readable(self.folder)[: -self.keep_last]:
            shutil.rmtree(old.folder)

    def take_over(self) -> None:
        """Make the checkpoints here, which were saved under other settings, those of this identity: training goes on
        from their weights, moments and step with its own learning rates, also where it had ended.
        """
        (self.folder.parent / "fold.json").unlink(missing_ok=True)
        for saved in readable(self.folder):
            write_json(saved.folder / "state.json", {**saved.record, "identity": self.identity})

    def newest(self, folder: Path) -> Saved | None:
        """The newest checkpoint of this training in FOLDER/checkpoints that can be read, or None. Call on all ranks."""

        def choose() -> str | None:
            ours = [each for each in readable(folder / "checkpoints", True) if each.record["identity"] == self.identity]
            return str(ours[-1].folder) if ours else None

        choice = on_main(choose)
        if choice is None:
            return None
        saved = Saved(Path(choice))
        before, self.changes = saved.record.get("how", {}), saved.record.get("changes", [])
        if changed := {key: [old, self.how[key]] for key, old in before.items() if self.how.get(key, old) != old}:
            self.changes = [*self.changes, {"step": saved.state.step, **changed}]
        return saved

    def describe_changes(self, saved: Saved) -> str:
        """What a training goes on with that is not as it was, in one line; empty where nothing changed."""
        if not self.changes or self.changes[-1]["step"] != saved.state.step:
            return ""
        changed = {key: pair for key, pair in self.changes[-1].items() if key != "step"}
        what = ", ".join(f"{key}={new} instead of {old}" for key, (old, new) in changed.items())
        return f"goes on from step {saved.state.step} with {what}: not the numbers of an undisturbed run"


def _flush(folder: Path) -> None:
    """Have a folder and its files on disk before they count, so that a power cut can't leave an empty checkpoint."""
    for path in (*folder.glob("*.*"), folder):
        if path.is_dir() and path != folder:
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            with naming_file(path):
                os.fsync(handle)
        finally:
            os.close(handle)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with naming_file(path):
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, one_line(error), str(path)) from None


def _read_tensors(path: Path, only_look: bool = False) -> Tensors:
    """Raises CheckpointError for a file that is cut short or none; only_look: reads no more than tells that."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        if not only_look:
            return load_file(path)
        with safe_open(path, framework="pt"):
            return {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable weight file ({error})") from None


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], **about: Any) -> str:
    """Write PATH.safetensors and PATH.json beside it (format, version, sha256 and `about`); returns the sha256."""
    with atomic_path(path.with_suffix(".safetensors")) as beside:
        _write_tensors(beside, weights)
        digest = file_sha256(beside)
    save_about(path, sha256=digest, **about)
    return digest


def save_about(path: Path, **about: Any) -> None:
    """Write PATH.json: format, version and `about`."""
    write_json(path.with_suffix(".json"), {"format": FORMAT, "version": VERSION, **about})


def read_about(path: Path) -> dict[str, Any]:
    """What `save_about` wrote. Raises CheckpointError where it is missing or of another format."""
    file = path.with_suffix(".json")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise CheckpointError(f"{file}: missing or not JSON; train this fold again") from None
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{file}: not a {FORMAT} file of version {VERSION}; train this fold again")
    return about


def load_weights(path: Path, network: nn.Module) -> None:
    """Load PATH.safetensors into a network of the same architecture. Raises CheckpointError naming what does not
    fit.
    """
    file = path.with_suffix(".safetensors")
    weights = _read_tensors(file)
    own = network.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    other = sorted(name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape)
    if missing or extra or other:
        said = [
            f"{len(names)} {what} ({names[0]}, ...)"
            for what, names in (("missing", missing), ("unknown", extra), ("of other shape", other))
            if names
        ]
        raise CheckpointError(
            f"{file}: weights of another architecture: {'; '.join(said)}; use the settings it was trained with"
        )
    network.load_state_dict(weights)
