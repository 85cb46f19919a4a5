"""Checkpoints that resume bit for bit, and weight files that load without the engine.

A checkpoint is a folder FOLDER/checkpoints/step-N, written beside and renamed, with parameters, optimiser, schedule,
loss scaler and `TrainState`. No random state is in it: order, augmentation and dropout are functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from triderm_dist.engine.parallel import unwrap
from triderm_dist.files import whole, write_json
from triderm_dist.schema import CheckpointError

FORMAT, VERSION = "triderm-model", 1


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


class Checkpoints:
    """The checkpoints of one training, told apart from those of other settings by `identity`."""

    def __init__(self, folder: Path, identity: str, keep_last: int) -> None:
        self.folder, self.identity, self.keep_last = folder / "checkpoints", identity, keep_last

    def save(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        state: TrainState,
        sums: torch.Tensor | None,
    ) -> None:
        """Call on all ranks. sums: the soft F1 sums that the next step may ask for."""
        final = self.folder / f"step-{state.step:08d}"
        beside = final.with_name(final.name + ".part")
        if accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        accelerator.wait_for_everyone()
        content: dict[str, Any] = {"scheduler": scheduler.state_dict(), "sums": sums}
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            network.save_checkpoint(str(beside), tag="engine")  # type: ignore[operator]
        else:
            content["network"] = unwrap(network).state_dict()
            content["optimizer"] = optimizer.state_dict()
            content["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None
        if accelerator.is_main_process:
            torch.save(content, beside / "state.pt")
            write_json(beside / "state.json", {"identity": self.identity, **asdict(state)})
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            beside.rename(final)
            for old in self._found()[: -self.keep_last]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def restore(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> tuple[TrainState, torch.Tensor | None]:
        """Load the newest checkpoint of the same settings into everything, on all ranks; a fresh state if there is
        none.
        """
        found = self._found()
        if not found:
            return TrainState(), None
        record = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
        if record.pop("identity") != self.identity:
            accelerator.print(f"{self.folder}: checkpoints of other settings or data; starting from the beginning")
            self.clear(accelerator)
            return TrainState(), None
        content = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            network.load_checkpoint(str(found[-1]), tag="engine")  # type: ignore[operator]
        elif "network" not in content:
            raise CheckpointError(
                f"{found[-1]}: saved under DeepSpeed, this run is not; resume with DeepSpeed or delete {self.folder}"
            )
        else:
            unwrap(network).load_state_dict(content["network"])
            optimizer.load_state_dict(content["optimizer"])
            if accelerator.scaler and content["scaler"]:
                accelerator.scaler.load_state_dict(content["scaler"])
        scheduler.load_state_dict(content["scheduler"])
        return TrainState(**record), content["sums"]

    def clear(self, accelerator: Accelerator) -> None:
        """Remove all checkpoints; call on all ranks."""
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)
        accelerator.wait_for_everyone()

    def _found(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".part")


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
