"""Typed settings: sections that refuse unknown keys, read from YAML and from `key.subkey=value` on the command line.

An unquoted scalar is kept as text (`Plain`) until a section gives it the type of its setting: `output=2024-11-25` is a
folder, `explain=00123` a name, `train.optim.lr=1e-4` a number. Quoted scalars are always text.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from triderm_dist.runtime.messages import nearest, one_line, unsafe_character
from triderm_dist.schema import ConfigError


class Section(BaseModel):
    """A node of the settings tree."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _type_plain_scalars(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        fields = cls.model_fields
        return {key: typed(value, fields[key].annotation) if key in fields else value for key, value in raw.items()}

    def __hash__(self) -> int:
        """Hash by value; pydantic's own hash fails on settings that are mappings."""
        return hash(self.model_dump_json())


Tree = TypeVar("Tree", bound=Section)


def _expand_user(path: str) -> str:
    """Replace `~` at the start of a path, also of the path in `local-dir:~/x` and `timm:NAME@~/x`.

    Raises ValueError for an empty path, an unknown user, and a variable of the shell, which nothing replaces.
    """
    if not path.strip():
        raise ValueError("the path is empty; write one, or null where that is allowed")
    if character := unsafe_character(path):
        raise ValueError(f"the path holds {character}")
    head, mark, tail = re.fullmatch(r"((?:.*[:@])?)([~$]?)(.*)", path, re.S).groups()  # type: ignore[union-attr]
    if mark == "$" and not head.startswith("pipe:"):
        raise ValueError(f"{mark + tail.partition('/')[0]} is not replaced here; write the path itself")
    if mark != "~":
        return path
    expanded = os.path.expanduser(mark + tail)
    if expanded.startswith("~"):
        raise ValueError(f"{expanded.partition('/')[0]} is no user of this machine; write the path itself")
    return head + expanded


SourceText = Annotated[str, AfterValidator(_expand_user)]
"""A setting that may hold a path among other things; `~` is expanded."""
PathText = Annotated[SourceText, "path"]
"""A setting that names a file, a folder or a URL; `~` is expanded."""


class Plain(str):
    """An unquoted scalar of YAML or the command line; its type is that of the setting it is for."""


NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_MAX_DIGITS, _MAX_INTEGER = 100, 2**63 - 1
_MAX_NUMBER = 3.4e38
"""The largest float32, in which networks compute; durations and numbers of steps overflow above it too."""
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=e))(e[-+]?[0-9]+)?|[-+]?\.(inf|nan)", re.I)


def untyped(value: Any) -> Any:
    """Resolve plain scalars where no setting gives a type: null, true, false, a number (1e-4 is one), else text."""
    if isinstance(value, Mapping):
        return {str(key): untyped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [untyped(item) for item in value]
    if not isinstance(value, Plain):
        return value
    if value in NULL:
        return None
    if value in _BOOL:
        return _BOOL[value]
    if _INTEGER.fullmatch(value) and len(value) <= _MAX_DIGITS:
        return int(value)
    if _NUMBER.fullmatch(value):
        return float(re.sub(r"\.(?=inf|nan)", "", value.lower()))
    return str(value)


def typed(value: Any, annotation: Any) -> Any:
    """Resolve the plain scalars of `value` for a setting of type `annotation`; `a,b` becomes a list where it takes one.

    Leaves a value that does not fit as it is, for pydantic to report.
    """
    kinds = _alternatives(annotation)
    item = next((get_args(kind)[0] for kind in kinds if get_origin(kind) in (tuple, list)), None)
    if isinstance(value, Plain):
        if value in NULL:
            return None
        if item is not None:
            return [typed(Plain(part.strip()), item) for part in value.split(",")]
        takes_text = any(kind is str or (get_origin(kind) is Literal and _all_text(kind)) for kind in kinds)
        # pydantic would take true for the integer 1, also that of a Literal.
        is_number = any(kind in (int, float) or get_origin(kind) is Literal for kind in kinds)
        is_text = takes_text or (value in _BOOL and bool not in kinds and is_number)
        return str(value) if is_text else untyped(value)
    if isinstance(value, list):
        return [typed(each, Any if item is None else item) for each in value]
    if isinstance(value, Mapping) and not any(_section(kind) for kind in kinds):
        return untyped(value)
    return value


def _all_text(literal: Any) -> bool:
    return all(isinstance(each, str) for each in get_args(literal))


def _alternatives(annotation: Any) -> list[Any]:
    """Return the members of a union, without Annotated."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(arguments[0])
    if origin in (Union, UnionType):
        return [kind for argument in arguments for kind in _alternatives(argument)]
    return [annotation]


def _section(annotation: Any) -> type[Section] | None:
    """Return the section that a setting holds, itself or as values of a mapping or a list; None for other settings."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and not get_args(kind) and issubclass(kind, Section):
            return kind
    return None


# --- reading ---------------------------------------------------------------------------------------------------------


MAX_FILE = 1 << 20
"""Bytes of a YAML file."""
MAX_VALUES, MAX_LEVELS = 100_000, 50
"""Of a YAML document in which every alias is replaced by its content."""


class _Refused(yaml.YAMLError):
    """A document that is valid YAML but not valid settings; the message says why."""


class _Loader(yaml.SafeLoader):
    """Reads unquoted scalars as `Plain`; refuses a key that is written twice in a mapping, and aliases without end."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # type: ignore[misc]

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = 0
        self._extents: dict[int, tuple[int, int]] = {}
        """(number of values, levels) of each complete node."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        line, alias = self.peek_event().start_mark.line + 1, self.check_event(yaml.AliasEvent)
        self._level += 1
        if self._level > MAX_LEVELS:
            raise _Refused(f"line {line}: more than {MAX_LEVELS} levels")
        node = super().compose_node(parent, index)
        if alias and id(node) not in self._extents:
            raise _Refused(f"line {line}: an alias of what holds it")
        if not alias:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            inner = [
                self._extents[id(each)] for part in parts for each in (part if isinstance(part, tuple) else [part])
            ]
            highest = max((levels for _, levels in inner), default=0)
            self._extents[id(node)] = 1 + sum(values for values, _ in inner), 1 + highest
        values, levels = self._extents[id(node)]
        if values > MAX_VALUES or self._level + levels > MAX_LEVELS + 1:
            raise _Refused(f"line {line}: aliases stand for more than {MAX_VALUES:,} values or {MAX_LEVELS} levels")
        self._level -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(f"line {line}: a key is a list or a mapping; write text")
            if key.value in lines:
                raise _Refused(f"{key.value!r} is written twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return node


def _construct_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    return Plain(node.value) if node.style is None else str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML into dicts, lists, text and `Plain` scalars. Raises ConfigError, with `where` in front."""
    try:
        return yaml.load(text, _Loader)
    except _Refused as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}: not readable as YAML ({at}{one_line(error.problem or error.context)})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a tag such as !!int
        raise ConfigError(f"{where}: not readable as YAML ({one_line(error)})") from None


def read_mapping(path: Path, advice: str) -> dict[str, Any]:
    """Read the mapping in a YAML file; an empty file is an empty mapping. Raises ConfigError.

    advice: ends the message for a file that does not exist.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {advice}") from None
    except OSError as error:
        raise ConfigError(f"{path}: not a readable YAML file ({error.strerror})") from None
    if len(content) > MAX_FILE:
        raise ConfigError(f"{path}: more than {MAX_FILE >> 20} MiB; a file of settings is expected")
    raw = parse_yaml(_decoded(content, path), str(path))
    if raw is None or raw == "":
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got a {'list' if isinstance(raw, list) else 'scalar'}")
    return {str(key): value for key, value in raw.items()}


def _decoded(content: bytes, path: Path) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: is in UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}: line {line} is not in UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8"
        ) from None


def read_override(override: str) -> dict[str, Any]:
    """Parse `key.subkey=value` into a nested mapping.

    A value in brackets, braces or quotes is YAML, any other one is a plain scalar. Raises ConfigError.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not a setting; write key.subkey=value")
    if "" in key.split("."):
        raise ConfigError(f"{key!r}: an empty name between the dots; write key.subkey=value")
    if text.endswith("\r"):
        raise ConfigError(f"{key}: ends with a carriage return; remove the Windows line ends of the script")
    text = text.strip()
    if not text:
        raise ConfigError(f"{key}: no value after '='; write {key}=VALUE")
    is_yaml = text[0] in "[{" or (text[0] in "\"'" and len(text) > 1 and text[-1] == text[0])
    return nest(key.split("."), parse_yaml(text, f"{key}: {text!r}") if is_yaml else Plain(text))


def validate(kind: type[Tree], raw: Mapping[str, Any]) -> Tree:
    """Build the settings of `kind` from a nested mapping. Raises ConfigError with one line for the first error."""
    try:
        tree = kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_one_line(kind, error)) from None
    for key, value in _leaves(tree.model_dump(), ""):
        if wrong := _unusable(value):
            raise ConfigError(f"{key}: {wrong} (got {_shown(value)})")
    return tree


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield every scalar of a tree and every key of its mappings, with its dotted key."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield key or str(name), name
            yield from _leaves(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _leaves(each, f"{key}.{number}")
    else:
        yield key, value


def _unusable(value: Any) -> str | None:
    """Say what makes a value of any setting unusable: numbers that are not finite, texts that are not printable."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number is needed"
    if isinstance(value, int | float) and abs(value) > (_MAX_INTEGER if isinstance(value, int) else _MAX_NUMBER):
        return "the number is too large"
    if isinstance(value, str) and (character := unsafe_character(value, allowed="\t\n")):
        return f"the text holds {character}"
    return None


def _one_line(kind: type[Section], error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    # A misspelled key also leaves the right one missing: report the misspelling.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    key = re.sub(r"\.(constrained-\w+|literal\[.*\]|float|int|str)$", "", key)  # the alternative of a union
    if first["type"] == "extra_forbidden":
        if any("." in str(part) for part in first["loc"]):
            return f"unknown setting {key!r}; write nested mappings, a key with dots is for the command line only"
        near = _nearest(kind, key)
        return f"unknown setting {key!r}; " + (f"did you mean {near!r}?" if near else "--help-all lists them")
    if first["type"] in ("model_type", "dict_type"):
        if first["loc"] and isinstance(first["loc"][-1], int):
            return f"{key}: a mapping of settings; write {key.rpartition('.')[0]}=[{{NAME: VALUE}}]"
        return f"{key or 'settings'}: a section of settings; write {key}.NAME=VALUE"
    if first["type"] == "tuple_type" and isinstance(first["input"], dict):
        return f"{key}: a list, which is set as a whole; write {key}=[VALUE, ...]"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first.get("input"), dict) else f" (got {_shown(first.get('input'))})"
    return f"{key or 'settings'}: {message[:1].lower()}{message[1:] or 'not valid'}{got}"


def _shown(value: Any) -> str:
    text = yaml_text(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _nearest(kind: type[Section], key: str) -> str | None:
    """Return the setting or section whose full name, or its last part, is nearest to a misspelled key."""
    known = [row[0] for row in describe(kind)]
    sections = {name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)}
    # Of several settings with the same last part the shortest name wins.
    spelled = {name.rpartition(".")[2]: name for name in sorted(known, key=len, reverse=True)}
    spelled |= {name: name for name in (*known, *sections)}
    parts = key.split(".")
    field = kind.model_fields.get(parts[0])
    if field is not None and get_origin(field.annotation) is dict and len(parts) > 2:
        key = ".".join([parts[0], "NAME", *parts[2:]])
    near = nearest(key, spelled)
    return spelled[near] if near else None


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `untyped` would read as another type: PyYAML takes 12e5 for text."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = None if untyped(Plain(text)) == text else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Write a mapping as YAML, in its order; `untyped` of what `parse_yaml` reads equals it."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


# --- trees -----------------------------------------------------------------------------------------------------------


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `top` over `base`, mapping by mapping; neither is changed."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    """Wrap `value` in nested mappings with these keys, outermost first."""
    for key in reversed(keys):
        value = {key: value}
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


# --- describing ------------------------------------------------------------------------------------------------------


def describe(kind: type[Section]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, description) of every setting of a tree, in the terms of YAML."""
    for name, field in kind.model_fields.items():
        section = next(filter(None, map(_section, _alternatives(field.annotation))), None)
        if section is None:
            yield name, type_name(field.annotation, field.metadata), _default(field), field.description or ""
            continue
        outer = get_origin(field.annotation)
        prefix = f"{name}.NAME" if outer is dict else f"{name}[]" if outer is tuple else name
        for key, *rest in describe(section):
            yield (f"{prefix}.{key}", *rest)  # type: ignore[misc]


def type_name(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    """Describe a type in the terms of YAML, such as `integer >= 1 or null`, `one of a | b`, `list of text`, `path`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    constraints = list(constraints)
    if origin is Annotated:
        for extra in arguments[1:]:
            constraints += extra.metadata if isinstance(extra, FieldInfo) else [extra]
        return type_name(arguments[0], constraints)
    if origin in (Union, UnionType):
        names = [type_name(kind, constraints) for kind in arguments if kind is not NoneType]
        return " or ".join([*names, "null"] if NoneType in arguments else names)
    if origin is Literal:
        values = [yaml_text(value) for value in arguments]
        return values[0] if len(values) == 1 else f"one of {' | '.join(values)}"
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if annotation is str:
        return "path" if "path" in constraints else "text"
    if annotation in (int, float):
        return " ".join(["integer" if annotation is int else "number", *_range(constraints)])
    return "true or false" if annotation is bool else "mapping"


_UNLIMITED = 1e9
"""Upper limits from here on guard against overflow only, so help texts leave them out."""


def _range(constraints: Iterable[Any]) -> list[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [(sign, getattr(each, name)) for each in constraints for name, sign in signs.items() if hasattr(each, name)]
    found = [(sign, bound) for sign, bound in found if bound < _UNLIMITED]
    bounds = [f"{sign} {bound}" if isinstance(bound, int) else f"{sign} {bound:g}" for sign, bound in found]
    return [", ".join(bounds)] if bounds else []


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else yaml_text(field.get_default(call_default_factory=True))


def yaml_text(value: Any) -> str:
    """Format a value on one line, as YAML writes it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(yaml_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
