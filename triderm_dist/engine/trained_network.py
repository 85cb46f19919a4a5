"""A trained network in the folder of a run, described by its fold.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triderm_dist.config import ModelConfig, build
from triderm_dist.engine.network_files import read_info
from triderm_dist.models.tower_record import FOLDER, TowerRecord, read_tower
from triderm_dist.schema import ConfigError, Signature, Task
from triderm_dist.tasks import recorded_task

REFIT = "refit"
"""Folder of the refitted networks in that of a run."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network in RUN/MODEL/fold-K or RUN/refit/MODEL. info: its fold.json."""

    folder: Path
    info: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> TrainedNetwork:
        """Read the fold.json in a folder. Raises CheckpointError if it is missing or damaged."""
        return cls(folder, read_info(folder / "fold"))

    @property
    def run(self) -> Path:
        return self.folder.parents[1]

    @property
    def is_refit(self) -> bool:
        return self.folder.parent.name == REFIT

    @property
    def model(self) -> str:
        return self.folder.name if self.is_refit else self.folder.parent.name

    @property
    def name(self) -> str:
        """MODEL/fold-K or MODEL/refit."""
        return f"{self.model}/{REFIT if self.is_refit else self.folder.name}"

    @property
    def weights(self) -> str:
        """SHA-256 of its weights."""
        return str(self.info["weights"])

    @property
    def refit_of(self) -> tuple[str, ...]:
        """Of a refitted network, the SHA-256 of the folds' weights; else empty."""
        return tuple(self.info.get("refit_of", ()))

    @property
    def task(self) -> Task:
        return recorded_task(self.info, str(self.folder / "fold.json"))

    @property
    def signature(self) -> Signature:
        return self.task.signature(self.info["concepts"])

    @property
    def config(self) -> ModelConfig:
        """The settings of the network. Raises ConfigError if this version, or a missing plugin, refuses them."""
        try:
            return build(ModelConfig, self.info["model"])
        except ConfigError as error:
            raise ConfigError(f"{self.folder / 'fold.json'}: {error}") from None

    @property
    def tower(self) -> TowerRecord | None:
        """Record of its tower in RUN/towers; None for networks of versions that recorded no towers.

        Raises CheckpointError if the record is missing or damaged.
        """
        name = self.info.get("tower")
        return read_tower(self.run / FOLDER, name) if name else None
