"""Records of towers in a run, from which its networks are rebuilt without a pretrained file, the hub or a cache.

    RUN/towers/NAME.json           settings, architecture, size and normalization of the input, shape of the tokens
    RUN/towers/NAME.safetensors    weights of a frozen tower, once for all models and folds that use it

NAME is a hash of the JSON's content, which includes `tower_hash` of a frozen tower. The weights of a tower that trains
are part of each fold's weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triderm_dist.checksums import DamagedFile, read_checked_json, write_checked_json
from triderm_dist.config import Frame
from triderm_dist.files import atomic_path, write_tensors
from triderm_dist.models.joined_tower import PARTS, JoinedTower, Part, build_logits
from triderm_dist.models.light_imports import import_timm
from triderm_dist.models.tower import JoinedShape, TokenShape, Tower, TowerOptions, Triple, tower_hash
from triderm_dist.models.towers import parse_source
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import CheckpointError

if TYPE_CHECKING:
    from triderm_dist.config import TowerConfig

FORMAT, VERSION = "triderm-tower", 1
FOLDER = "towers"
"""Folder of the records in that of a run."""


@dataclass(frozen=True)
class TowerRecord:
    """A tower's architecture and the preprocessing of its photos.

    settings: those of `TowerConfig` that the tower was built with.  architecture, description: those of `Tower`.
    weights: `tower_hash` of a frozen tower, None for one that trains.
    """

    settings: Mapping[str, Any]
    image_size: int
    mean: Triple
    std: Triple
    num_tokens: int
    width: int
    architecture: str
    description: Mapping[str, Any] | None
    weights: str | None = None

    @classmethod
    def of(cls, tower: Tower, config: TowerConfig, weights: str | None = None) -> TowerRecord:
        """Describe a tower that was built with these settings."""
        settings = _settings(config)
        if isinstance(tower, JoinedTower):
            settings["extra_towers"] = len(tower.parts) - 1
        return cls(
            settings, tower.image_size, tower.mean, tower.std, tower.num_tokens, tower.width,
            tower.architecture, tower.description, weights,
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash(self.name)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TowerRecord:
        """Read what `json` returned."""
        return cls(**{**content, "mean": tuple(content["mean"]), "std": tuple(content["std"])})

    @property
    def source(self) -> str:
        return str(self.settings["source"])

    @property
    def frame(self) -> Frame:
        """The part of a photo that the tower gets, see `TowerConfig`."""
        frame: Frame = self.settings.get("frame", "square")
        return frame

    @property
    def token_shape(self) -> TokenShape:
        if self.is_joined:
            return JoinedShape.of([width for each in self.parts for width in each["widths"]])
        return TokenShape(self.num_tokens, self.width)

    @property
    def is_joined(self) -> bool:
        """Whether it is the record of a `JoinedTower`."""
        return self.description is not None and PARTS in self.description

    @property
    def parts(self) -> list[Mapping[str, Any]]:
        """The parts of a joined tower, as `JoinedTower` describes them."""
        return list((self.description or {}).get(PARTS, ()))

    @property
    def name(self) -> str:
        """The name of the tower's files: a hash of this record."""
        return hashlib.sha256(json.dumps(self.json(), sort_keys=True).encode()).hexdigest()[:16]

    def is_of(self, config: TowerConfig) -> bool:
        """Return whether the tower was built with these settings."""
        return self.settings == _settings(config)

    def build(self) -> Tower:
        """Build the tower with random weights. Needs no file and no network.

        Raises CheckpointError if the installed libraries build another architecture, ConfigError if a plugin's
        source is unknown.
        """
        source, name = parse_source(self.source)
        import_timm()
        if self.is_joined:
            tower: Tower = self._build_joined()
        elif source.rebuild and self.description is not None:
            tower = source.rebuild(self.description, self.image_size)
        else:
            tower = source.build(name, TowerOptions(False, self.image_size, self.settings["quick_gelu"]))
        recorded = (self.architecture, self.image_size, self.token_shape)
        if (tower.architecture, tower.image_size, tower.token_shape) != recorded:
            raise CheckpointError(
                f"{self.source}: the installed libraries build {tower.architecture!r} with tokens "
                f"{tuple(tower.token_shape)} instead of {self.architecture!r} with {tuple(self.token_shape)}; install "
                "the versions of timm and open_clip of the training"
            )
        tower.mean, tower.std = self.mean, self.std
        return tower

    def _build_joined(self) -> JoinedTower:
        parts = []
        for each in self.parts:
            record, described = TowerRecord.from_json(each["tower"]), each["logits"]
            logits = build_logits(described, record.width) if described else None
            parts.append(Part(record.build(), each["tower"], logits, described))
        return JoinedTower(parts)

    def json(self) -> dict[str, Any]:
        """Return the record as JSON values; `from_json` reads it."""
        return asdict(self)


def save_tower(folder: Path, record: TowerRecord, tower: Tower | None) -> None:
    """Write FOLDER/NAME.json, and before it the weights of a frozen tower, unless they exist. Call on rank 0."""
    path, weights = folder / f"{record.name}.json", _weights(folder, record)
    if weights and tower and not weights.exists():
        with atomic_path(weights) as part:
            write_tensors(part, tower.state_dict())
    if not path.exists():
        write_checked_json(path, {"format": FORMAT, "version": VERSION, **record.json()})


def read_tower(folder: Path, name: str) -> TowerRecord:
    """Read FOLDER/NAME.json. Raises CheckpointError if it is missing, damaged or of another version."""
    path = folder / f"{name}.json"
    try:
        content = read_checked_json(path)
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise CheckpointError(f"{path}: not a {FORMAT} file of version {VERSION}; use the version that wrote it")
        return TowerRecord.from_json(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; restore it from a copy of this run") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedFile) as error:
        raise CheckpointError(f"{path}: not readable ({one_line(error)}); restore it from a copy of this run") from None


def find_tower(folder: Path, config: TowerConfig, frozen: bool) -> TowerRecord | None:
    """Return the record in FOLDER of a tower with these settings; None if there are none or several.

    frozen: whether the record must have weights.
    """
    records = [read_tower(folder, path.stem) for path in sorted(folder.glob("*.json"))]
    found = [each for each in records if each.is_of(config) and (each.weights is not None) == frozen]
    return found[0] if len(found) == 1 else None


def load_tower(folder: Path, record: TowerRecord) -> Tower:
    """Build a frozen tower with the weights in FOLDER/NAME.safetensors, in evaluation mode.

    Raises CheckpointError if they are missing, damaged or not those of the record, and as `TowerRecord.build` does.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tower, file = record.build(), _weights(folder, record)
    if file is None:
        raise CheckpointError(f"{folder / record.name}.json: the record of a tower that trains; each fold has its own")
    try:
        tower.load_state_dict(load_file(file))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; restore it from a copy of this run") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: not the weights of {record.source} ({one_line(error, 160)}); restore it from a copy of this run"
        ) from None
    if tower_hash(tower) != record.weights:
        raise CheckpointError(f"{file}: changed or damaged; restore it from a copy of this run")
    tower.report = f"{record.source}: weights of {file}"
    tower.freeze(len(tower.blocks))
    return tower.eval()


def _settings(config: TowerConfig) -> dict[str, Any]:
    """Return the settings that determine the tower, and the photos' frame unless it is square.

    Names of records are hashes of these settings; earlier versions had square frames only, and did not record them.
    """
    settings = config.model_dump(include={"source", "pretrained", "image_size", "quick_gelu"})
    return settings if config.frame == "square" else {**settings, "frame": config.frame}


def _weights(folder: Path, record: TowerRecord) -> Path | None:
    return folder / f"{record.name}.safetensors" if record.weights else None
