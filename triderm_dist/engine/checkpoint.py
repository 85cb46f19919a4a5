"""Checkpoints that resume bit for bit, and weight files that load without the engine.

A checkpoint is a folder FOLDER/checkpoints/epoch-E-step-N, written beside, flushed to disk and renamed:
`weights.safetensors`, `optimizer.safetensors`, `average.safetensors` (with `train.ema_decay`) and `state.json` (place
in the plan, schedule, loss scale, soft F1 sums, best epoch). All of it is whole and under the network's own names, so
that it resumes on other ranks and another way to run (the table is in `engine/state.py`), and any file loads with
safetensors alone. No random state is in it: order, augmentation and dropout are functions of (seed, step).

The newest `keep_last` are kept; the weights of the best epoch are FOLDER/weights.safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from triderm_dist.engine.average import Average
from triderm_dist.engine.state import Tensors, load_optimizer, takes_part, whole_optimizer, whole_weights
from triderm_dist.files import whole, write_json
from triderm_dist.schema import CheckpointError

FORMAT, VERSION = "triderm-model", 1
CHECKPOINT_VERSION = 2


@dataclass
class TrainState:
    """Where a run is: epoch, global batches consumed in it, optimiser steps in all, best validation score and its
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

    sums: the soft F1 sums (3 heads, 3, C) of the last step, which the next may ask for.
    """

    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    average: Average | None
    state: TrainState
    sums: torch.Tensor | None = None

    def stepped(self, batch: int) -> None:
        """Note that the optimiser has taken global batch number `batch` of the epoch."""
        self.scheduler.step()
        self.state.batch, self.state.step = batch + 1, self.state.step + 1
        if self.average:
            self.average.update(self.state.step)


class Saved:
    """A complete checkpoint on disk. Weights go into the network before it is wrapped, the rest after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))

    @property
    def state(self) -> TrainState:
        return TrainState(**self.record["state"])

    def into_network(self, network: nn.Module) -> None:
        network.load_state_dict(self._tensors("weights"))

    def into_training(self, accelerator: Accelerator, training: Training) -> None:
        """Call on all ranks."""
        weights, optimizer = self._tensors("weights"), self._tensors("optimizer")
        load_optimizer(accelerator, training.wrapped, training.optimizer, weights, optimizer)
        scheduler = training.scheduler
        scheduler.load_state_dict(self.record["scheduler"])
        # Those of the present settings, which are not the recorded ones after `take_over`.
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
        training.sums = None if sums is None else torch.tensor(sums, device=accelerator.device)
        training.state = self.state

    def _tensors(self, name: str) -> Tensors:
        from safetensors.torch import load_file

        return load_file(self.folder / f"{name}.safetensors")


class Checkpoints:
    """The checkpoints of one training, told apart from those of other settings by `identity`."""

    def __init__(self, folder: Path, identity: str, keep_last: int) -> None:
        self.folder, self.identity, self.keep_last = folder / "checkpoints", identity, keep_last

    def save(self, accelerator: Accelerator, training: Training) -> None:
        """Call on all ranks, between two steps."""
        from safetensors.torch import save_file

        state = training.state
        final = self.folder / f"epoch-{state.epoch:04d}-step-{state.step:08d}"
        beside = final.with_name(final.name + ".part")
        parts = {
            "weights": whole_weights(accelerator, training.wrapped),
            "optimizer": whole_optimizer(accelerator, training.wrapped, training.optimizer),
            **({"average": training.average.state()} if training.average and takes_part(accelerator) else {}),
        }
        if accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            for name, tensors in parts.items():
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside / f"{name}.safetensors")
            record = {
                "version": CHECKPOINT_VERSION,
                "identity": self.identity,
                "state": asdict(state),
                "scheduler": training.scheduler.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
                "sums": None if training.sums is None else training.sums.tolist(),
            }
            write_json(beside / "state.json", record)
            _flush(beside)
            if final.exists():  # stopped while it validated, and again after it went on from here
                shutil.rmtree(beside)
            else:
                beside.rename(final)
                _flush(self.folder)
            for old in self._found()[: -self.keep_last]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def take_over(self) -> None:
        """Make the checkpoints here, which were saved under other settings, those of this identity: training goes on
        from their weights, moments and step with its own learning rates.
        """
        for folder in self._found():
            record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            record["identity"] = self.identity
            del record["scheduler"]["base_lrs"]
            write_json(folder / "state.json", record)

    def newest(self, accelerator: Accelerator) -> Saved | None:
        """The newest checkpoint of the same settings, as rank 0 sees it, or None. Call on all ranks.

        Removes what a killed save left, and checkpoints of other settings.
        """
        choice: list[str | None] = [None]
        if accelerator.is_main_process:
            for unfinished in self.folder.glob("*.part"):
                shutil.rmtree(unfinished)
            found = self._found()
            if found and self._is_ours(found[-1]):
                choice[0] = str(found[-1])
            elif self.folder.exists() and any(self.folder.iterdir()):
                print(f"{self.folder}: checkpoints of other settings or data; starting from the beginning", flush=True)
                shutil.rmtree(self.folder)
        broadcast_object_list(choice)
        return Saved(Path(choice[0])) if choice[0] else None

    def _is_ours(self, folder: Path) -> bool:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return (record.get("version"), record["identity"]) == (CHECKPOINT_VERSION, self.identity)

    def _found(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("epoch-*") if path.suffix != ".part")


def _flush(folder: Path) -> None:
    """Have a folder and its files on disk before they count, so that a power cut can't leave an empty checkpoint."""
    for path in (*folder.glob("*.*"), folder):
        if path.is_dir() and path != folder:
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], **about: Any) -> str:
    """Write PATH.safetensors and PATH.json beside it (format, version, sha256 and `about`); returns the sha256."""
    from safetensors.torch import save_file

    with whole(path.with_suffix(".safetensors")) as beside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, beside)
        digest = hashlib.sha256(beside.read_bytes()).hexdigest()
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path.with_suffix(".safetensors")
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a readable weight file ({error})") from None
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
