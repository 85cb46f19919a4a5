"""Check what plugins add to the tables of the package, and describe what they return."""

from __future__ import annotations

from collections.abc import Iterable

from triderm_dist.schema.errors import ConfigError


def check_known(setting: str, name: str, table: Iterable[str], what: str) -> None:
    """Raise ConfigError for a name that a table lacks. what: an entry of it, as in `a network`."""
    names = sorted(table)
    if name not in names:
        known = ", ".join(names) or "none"
        raise ConfigError(f"{setting}: {name!r} is not {what}; known: {known} (plugins may add others)")


def check_subclass(setting: str, name: str, entry: object, base: type, table: str) -> None:
    """Raise ConfigError for an entry of a table that is no subclass of `base`, which may be a Protocol, or lacks one of
    its abstract methods.
    """
    if not (isinstance(entry, type) and base in entry.__mro__):
        raise ConfigError(f"{setting}: {name!r} of {table} is no subclass of {base.__name__}")
    if missing := sorted(getattr(entry, "__abstractmethods__", ())):
        raise ConfigError(f"{setting}: {name!r} of {table} has no method {missing[0]}")


def described(value: object) -> str:
    """Describe a value that is not the tensor that it should be: dtype and shape of a tensor, the type of others."""
    import torch

    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
