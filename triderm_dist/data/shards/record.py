"""The JSON record of a lesion in a shard, for readers that do not use samples.parquet, and its row in that table."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triderm_dist.data.photo_formats import PHOTO_SUFFIXES
from triderm_dist.data.readers.cells import is_missing, parse_field, parse_score
from triderm_dist.data.readers.dataset import why_no_lesion_id
from triderm_dist.runtime.messages import quoted
from triderm_dist.schema import UNLABELED, Lesion, Task

LABEL_KEYS = ("label", "diagnosis")
GROUP_KEYS = ("group", "patient_id")
_ANY_PHOTO = frozenset((*PHOTO_SUFFIXES, ".jp2", ".jxl", ".dcm"))
"""Suffixes of photos in any format; shards hold JPEGs."""

MAX_NAME = 200
"""Characters of a group or the name of a concept."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_META = re.compile(r"__[^/]*__($|/)")


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into the key of its sample and its extension in lower case, as `webdataset` does.

    Both are empty for a file that belongs to no sample: a hidden one, one without extension, or __NAME__.
    """
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    if not stem or not extension or _META.match(name):
        return "", ""
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def is_photo(extension: str) -> bool:
    """Return whether a member with this extension is a photo, by its last suffix."""
    return f".{extension.rpartition('.')[2]}" in _ANY_PHOTO


def belongs_to_lesion(names: Iterable[str], extensions: Mapping[str, tuple[str, ...]]) -> bool:
    """Return whether a sample with members of these extensions is a lesion: any is a record, a label or a photo."""
    read = {"json", "cls", *(name for each in extensions.values() for name in each)}
    return any(name in read or is_photo(name) for name in names)


class UnknownLabel(ValueError):
    """A label that names no diagnosis; `label` is its text."""

    def __init__(self, label: str) -> None:
        super().__init__(f"unknown diagnosis {label!r}")
        self.label = label


@dataclass(frozen=True)
class Record:
    """The content of a sample's JSON: fields as in `Lesion`, but concepts by name."""

    lesion_id: str
    group: str
    label: int
    concepts: dict[str, float]
    metadata: tuple[float, ...]
    fine: int = UNLABELED


def to_record(lesion: Lesion, task: Task, concepts: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON record of a lesion; `parse_record` reads it back."""
    return {
        "lesion_id": lesion.lesion_id,
        "label": None if lesion.label == UNLABELED else task.diagnosis_names[lesion.label],
        **({"fine": None if lesion.fine == UNLABELED else task.fine.names[lesion.fine]} if task.fine else {}),
        "group": lesion.group,
        "concepts": {
            name: None if math.isnan(score) else score for name, score in zip(concepts, lesion.concepts, strict=True)
        },
        "metadata": {field.name: field.cell(value) for field, value in zip(task.fields, lesion.metadata, strict=True)},
    }


def to_row(
    lesion: Lesion | Record,
    scores: Sequence[float],
    photos: Iterable[tuple[int, int, int]],
    locations: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """Return the row of a lesion (`rows_schema`); its shard is set when the index of all shards is written.

    scores: of its concepts.  photos: `size_and_hash` of each of `VIEWS`.  locations: offset and size by view.
    """
    row: dict[str, Any] = {
        "lesion_id": lesion.lesion_id,
        "group": lesion.group,
        "label": lesion.label,
        "fine": lesion.fine,
        "shard": -1,
        "concepts": scores,
        "metadata": lesion.metadata,
        "photos": [number for photo in photos for number in photo],
    }
    for view, (offset, size) in locations.items():
        row |= {f"{view}_offset": offset, f"{view}_size": size}
    return row


def parse_record(
    key: str, record: bytes | None, label: bytes | None, task: Task, words: Mapping[str, int] | None = None
) -> Record:
    """Parse a sample's `.json` and `.cls` members (None if absent), written by triderm pack or another program.

    lesion_id: default the sample's key, without folders.  label or diagnosis: a spelling of a diagnosis in any case;
    default the content of `.cls`.  group, patient_id or the task's column of groups: default the lesion itself.
    fine: one of the task's finer labels; another text counts as missing.
    concepts: a mapping of names to scores; default the record's own keys that the task lists or that have its prefix.
    metadata: a mapping, or keys of the record itself, named as the task's fields or as their columns. What is absent,
    null or a missing word of the task is missing.

    words: the index of a diagnosis by its spelling in lower case; default `Task.label_words`. A number is a word like
    any other.

    Raises UnknownLabel for another label, ValueError for another value that cannot be read, or labels that contradict
    one another.
    """
    cells = _cells(record) if record is not None else {}
    words = words or task.label_words
    lesion_id = _name(cells, "lesion_id") or key.rpartition("/")[2]
    if wrong := why_no_lesion_id(lesion_id):
        raise ValueError(f"lesion_id {quoted(lesion_id)} {wrong}")
    metadata = _mapping(cells, "metadata") or cells
    concepts = _mapping(cells, "concepts") or _own_concepts({**metadata, **cells}, task)
    if odd := next((name for name in concepts if not name.isprintable() or not 0 < len(name) <= MAX_NAME), None):
        raise ValueError(f"the name of the concept {odd!r:.80} must have 1 to {MAX_NAME} printable characters")
    groups = (_name(cells, name, private=True) for name in (*GROUP_KEYS, task.columns.group or ""))
    return Record(
        lesion_id=lesion_id,
        group=next((text for text in groups if not is_missing(text, task.missing_words)), lesion_id),
        label=_label(cells, label, task, words),
        concepts={name: parse_score(name, _text(score), task) for name, score in concepts.items()},
        metadata=tuple(
            parse_field(field, _text(metadata.get(field.name, metadata.get(field.column))), task.missing_words)
            for field in task.fields
        ),
        fine=task.fine.label_of(_name(cells, "fine")) if task.fine else UNLABELED,
    )


def _own_concepts(cells: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Return the scores among a record's own keys, by their names without the task's prefix."""
    prefix = task.concepts.prefix
    if prefix:
        return {name.removeprefix(prefix): value for name, value in cells.items() if name.startswith(prefix)}
    return {name: cells[name] for name in task.concepts.names if name in cells}


def _cells(record: bytes) -> dict[str, Any]:
    """Return the content of a sample's JSON. Raises ValueError if it is no mapping that can be read."""
    try:
        cells = json.loads(record, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON cannot be read at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"its JSON is not in {error.encoding.upper()} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(cells, dict):
        raise ValueError(f"its JSON is a {type(cells).__name__}, not a mapping")
    if _SURROGATE.search(record) and (text := _not_unicode(cells)):
        raise ValueError(f"its JSON holds half of a UTF-16 pair, which is no character: {text!r:.80}")
    return cells


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    cells = dict(pairs)
    if len(cells) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"its JSON holds {twice!r} twice; remove one")
    return cells


def _not_unicode(value: Any) -> str | None:
    """Return a text in a JSON value that holds a lone surrogate."""
    if isinstance(value, str):
        return None if value.encode("utf-8", "ignore").decode() == value else value
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((text for part in parts if (text := _not_unicode(part))), None)


def _text(value: Any) -> str:
    """Return a cell as a table would hold it; whole numbers, which JSON may hold as 3.0, without a point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def _name(cells: Mapping[str, Any], name: str, private: bool = False) -> str:
    """Return an id or label of a record. Raises ValueError for a value that is no text or number.

    private: without quoting it, since index.json holds the message, also where groups are replaced by hashes.
    """
    value = cells.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ValueError(f"{name} is a {type(value).__name__}, not a text or number")
    text = _text(value)
    if len(text) > MAX_NAME or not text.isprintable():
        shown = "" if private else f" {text!r:.80}"
        raise ValueError(f"{name}{shown} must have at most {MAX_NAME} characters, all printable")
    return text


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is a {type(value).__name__}, not a mapping of names to values")
    return value


def _label(cells: Mapping[str, Any], cls: bytes | None, task: Task, words: Mapping[str, int]) -> int:
    """Return the first label of a record, else that of its `.cls`.

    Raises UnknownLabel, or ValueError for labels of two diagnoses.
    """
    try:
        texts = {name: _name(cells, name) for name in LABEL_KEYS} | {".cls": (cls or b"").decode("utf-8-sig").strip()}
    except UnicodeDecodeError:
        raise ValueError("its .cls is not a text in UTF-8") from None
    labels = {name: _diagnosis(text, words) for name, text in texts.items()}
    known = {name: label for name, label in labels.items() if label is not None}
    if len({*known.values()}) > 1:
        raise ValueError(f"its labels differ: {', '.join(f'{name} {texts[name]!r}' for name in known)}; correct one")
    for name, text in texts.items():
        if (label := labels[name]) is not None:
            return label
        if not is_missing(text, task.missing_words):
            raise UnknownLabel(text)
    return UNLABELED


def _diagnosis(text: str, words: Mapping[str, int]) -> int | None:
    # A file of labels may hold an integer that was a float as 3.0.
    return words.get(text.lower(), words.get(text.lower().removesuffix(".0")))
