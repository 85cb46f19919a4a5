"""Build dataclasses from the mappings of YAML and JSON files, and such mappings from dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from triderm_dist.runtime.messages import did_you_mean
from triderm_dist.schema.errors import ConfigError

Built = TypeVar("Built")


def build_dataclass(kind: type[Built], raw: Any, at: str = "") -> Built:
    """Build a dataclass from a mapping, and the dataclasses, lists and mappings among its fields.

    at: where in the file, as `fields[2]`. Raises ConfigError for an unknown or missing key and a value of another type.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{at or 'the file'}: expected a mapping of keys, got {_type_in_words(raw)}")
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown key {f'{at}.{key}' if at else key!r}; {did_you_mean(str(key), known)}")
    for name, each in known.items():
        if name not in raw and each.default is MISSING and each.default_factory is MISSING:
            raise ConfigError(f"{f'{at}.' if at else ''}{name}: is missing")
    types = get_type_hints(kind)
    return kind(**{key: _parse(types[key], value, f"{at}.{key}" if at else str(key)) for key, value in raw.items()})


def _parse(annotation: Any, value: Any, at: str) -> Any:
    """Return the value of a field with this annotation; null is an empty list or mapping where None is not allowed."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is UnionType:
        if NoneType in arguments and _is_null(value):
            return None
        alternatives = [each for each in arguments if each is not NoneType]
        of_mapping = [each for each in alternatives if (get_origin(each) is Mapping) == isinstance(value, Mapping)]
        return _parse((of_mapping or alternatives)[0], value, at)
    if isinstance(annotation, type) and is_dataclass(annotation):
        return build_dataclass(annotation, value, at)
    if origin is tuple:
        return _list(arguments[0], value, at)
    if origin is Mapping:
        return _mapping(arguments[1], value, at)
    if origin is Literal:
        return _text(value, at)  # which ones are known is said where the dataclass checks itself
    return {str: _text, float: _number, bool: _flag}[annotation](value, at)


def _list(annotation: Any, value: Any, at: str) -> tuple[Any, ...]:
    if _is_null(value):
        return ()
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{at}: expected a list, got {_type_in_words(value)}")
    return tuple(_parse(annotation, item, f"{at}[{number}]") for number, item in enumerate(value))


def _mapping(annotation: Any, value: Any, at: str) -> dict[str, Any]:
    if _is_null(value):
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{at}: expected a mapping, got {_type_in_words(value)}")
    return {str(key): _parse(annotation, item, f"{at}.{key}") for key, item in value.items()}


def _text(value: Any, at: str) -> str:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{at}: expected text, got {_type_in_words(value)}")


def _number(value: Any, at: str) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    raise ConfigError(f"{at}: expected a number, got {_type_in_words(value)}")


def _flag(value: Any, at: str) -> bool:
    known = {"true": True, "false": False}
    if str(value).lower() in known:
        return known[str(value).lower()]
    raise ConfigError(f"{at}: expected true or false, got {_type_in_words(value)}")


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in ("", "~", "null"))


def _type_in_words(value: Any) -> str:
    """Describe the type of a value that was found instead of the expected one, for messages."""
    return "a list" if isinstance(value, list | tuple) else "a mapping" if isinstance(value, Mapping) else repr(value)


def as_mapping(value: Any) -> Any:
    """Convert a dataclass, mapping or sequence to JSON types; fields with their default value are left out."""
    if isinstance(value, str) or value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {key: as_mapping(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [as_mapping(item) for item in value]
    given = {}
    for each in fields(value):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if (item := getattr(value, each.name)) != default:
            given[each.name] = as_mapping(item)
    return given
