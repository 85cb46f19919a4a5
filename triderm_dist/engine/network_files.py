"""The files of a trained network: its weights as safetensors, and JSON files that say what they are.

The weights are full, under the network's own names, and load without the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from torch import nn

from triderm_dist.checksums import DamagedFile, read_checked_json, write_checked_json
from triderm_dist.distributed.full_state import Tensors
from triderm_dist.files import atomic_path, file_sha256, write_tensors
from triderm_dist.schema import CheckpointError

FORMAT, VERSION = "triderm-model", 1


def read_tensors(path: Path) -> Tensors:
    """Read a safetensors file. Raises CheckpointError if it is damaged."""
    from safetensors.torch import load_file

    with _reading(path):
        return load_file(path)


def check_complete(path: Path) -> None:
    """Raise CheckpointError for a safetensors file that is missing or cut. Reads its header only."""
    from safetensors import safe_open

    with _reading(path), safe_open(path, framework="pt"):
        pass


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable weight file ({error})") from None


def save_weights(path: Path, weights: Mapping[str, torch.Tensor], **info: Any) -> str:
    """Write PATH.safetensors and PATH.json (format, version, sha256 and `info`) and return the sha256."""
    with atomic_path(path.with_suffix(".safetensors")) as part:
        digest = write_tensors(part, weights)
    write_info(path, sha256=digest, **info)
    return digest


def write_info(path: Path, **info: Any) -> None:
    """Write PATH.json: format, version and `info`."""
    write_checked_json(path.with_suffix(".json"), {"format": FORMAT, "version": VERSION, **info})


class _WeightsKeys(BaseModel):
    sha256: str
    epoch: int


class _ModelKeys(BaseModel):
    train: dict[str, Any]


class _PhotoKeys(BaseModel):
    canvas: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2, max_length=2)]
    short_side: int | None


class _FoldKeys(BaseModel):
    identity: str
    model: _ModelKeys
    concepts: list[str]
    weights: str
    tower: str | None = None
    photos: _PhotoKeys | None = None
    refit_of: list[str] = []


class _TestKeys(BaseModel):
    stamp: str


_SCHEMAS: dict[str, type[BaseModel]] = {"weights": _WeightsKeys, "fold": _FoldKeys, "test": _TestKeys}
"""Keys that the JSON files of a trained network have, by name; files of earlier versions lack the optional ones."""


def read_info(path: Path) -> dict[str, Any]:
    """Read what `write_info` wrote. Raises CheckpointError if it is missing or of another format."""
    file = path.with_suffix(".json")
    try:
        info = read_checked_json(file, _SCHEMAS.get(path.name))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; train this fold again") from None
    except DamagedFile as error:
        raise CheckpointError(f"{file}: {error}; delete {file.parent} and train this fold again") from None
    if (info.get("format"), info.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{file}: not a {FORMAT} file of version {VERSION}; train this fold again")
    return info


def read_weights(path: Path) -> Tensors:
    """Read PATH.safetensors. Raises CheckpointError where it is damaged: PATH.json, or the fold.json of a finished
    training, has another SHA-256, or a value is not finite.
    """
    file = path.with_suffix(".safetensors")
    weights, digest = read_tensors(file), file_sha256(file)
    recorded = {f"{path.name}.json": read_info(path)["sha256"]}
    if path.with_name("fold.json").exists():
        recorded["fold.json"] = read_info(path.with_name("fold"))["weights"]
    for name, expected in recorded.items():
        if digest != expected:
            raise CheckpointError(
                f"{file}: changed or damaged: its SHA-256 is not that of {name}; delete {file.parent} and train this "
                "fold again"
            )
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{file}: {name} has values that are not finite; delete {file.parent} and train this fold again"
            )
    return weights


def load_weights(path: Path, network: nn.Module) -> None:
    """Load PATH.safetensors into a network of the same architecture.

    Raises CheckpointError that names what differs, also as `read_weights` does.
    """
    file, weights, expected = path.with_suffix(".safetensors"), read_weights(path), network.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape)
    if missing or extra or other:
        differences = [
            f"{len(names)} {what} ({names[0]}, ...)"
            for what, names in (("missing", missing), ("unknown", extra), ("of other shape", other))
            if names
        ]
        raise CheckpointError(
            f"{file}: weights of another architecture: {'; '.join(differences)}; use the settings of their training"
        )
    network.load_state_dict(weights)
