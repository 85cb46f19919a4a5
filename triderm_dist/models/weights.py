"""Load weights only where they fill a module completely."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from triderm_dist.runtime.messages import listed
from triderm_dist.schema import CheckpointError

State = dict[str, Tensor]


def strip_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """Return the tensors whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def fill(module: nn.Module, state: Mapping[str, Tensor], file: Path, optional: Collection[str] = ()) -> list[str]:
    """Load `state` into all of `module`; returns the names in `state` that the module does not have.

    optional: prefixes of names (heads) that may be missing on either side. Raises CheckpointError if a tensor of the
    module is missing or has another shape, or if the file holds more of a part that the module has (another block, a
    relative position bias): the file then belongs to another architecture.
    """
    own = {key: value for key, value in module.state_dict().items() if not _starts(key, optional)}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        found = next(iter(state), "nothing")
        raise CheckpointError(
            f"{file}: does not fill the tower: {len(missing)} of {len(own)} tensors are missing, "
            f"first {listed(missing)}; the file has {found!r}, is it of another architecture?"
        )
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            raise CheckpointError(
                f"{file}: {key} has shape {tuple(state[key].shape)}, the tower needs {tuple(value.shape)}; "
                "the file is of another architecture or size"
            )
        if key in state:
            _check_values(key, state[key], value, file)
    unused = [key for key in state if key not in own]
    parts = {key.split(".")[0] for key in own}
    unexpected = [key for key in unused if key.split(".")[0] in parts and not _starts(key, optional)]
    if unexpected:
        raise CheckpointError(
            f"{file}: holds tensors that the tower does not have, first {listed(unexpected)}; "
            "the file is of another architecture"
        )
    module.load_state_dict({key: state[key] for key in own if key in state}, strict=False)
    return unused


def _check_values(key: str, value: Tensor, wanted: Tensor, file: Path) -> None:
    """Raise CheckpointError for weights that no network can compute with."""
    if wanted.is_floating_point() and not value.is_floating_point():
        raise CheckpointError(f"{file}: {key} holds {value.dtype}, the tower needs {wanted.dtype}; is it quantized?")
    if value.is_floating_point() and (wrong := int((~value.float().isfinite()).sum())):
        raise CheckpointError(
            f"{file}: {key} holds {wrong} values that are NaN or infinite: a damaged file, or a training that "
            "diverged; use other weights"
        )


def without_prefix(state: State, module: nn.Module, file: Path, optional: Collection[str] = ()) -> tuple[State, str]:
    """Return the tensors of `module` in a state dict where they have one common prefix, and the prefix.

    Unchanged where the names fit as they are, or no prefix fills the module. optional: as for `fill`. Raises
    CheckpointError if several prefixes do: the file holds several networks.
    """
    own = [key for key in module.state_dict() if not _starts(key, optional) and not key.endswith("num_batches_tracked")]
    if not own or all(key in state for key in own):
        return state, ""
    ending = f".{own[0]}"
    found = [key.removesuffix(own[0]) for key in state if key.endswith(ending)]
    found = [prefix for prefix in found if all(prefix + key in state for key in own)]
    if len(found) > 1:
        names = " and ".join(repr(prefix.rstrip(".")) for prefix in found)
        raise CheckpointError(f"{file}: holds the network's weights under {names}; save those to use alone")
    return (strip_prefix(state, found[0]), found[0]) if found else (state, "")


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


def _starts(key: str, prefixes: Collection[str]) -> bool:
    return any(key.startswith(prefix) for prefix in prefixes)
