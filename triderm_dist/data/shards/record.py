"""The JSON record of a lesion in a shard, for readers that do not use samples.parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triderm_dist.data.readers.dataset import LESION_ID
from triderm_dist.data.readers.table import is_missing, parse_field, parse_score
from triderm_dist.schema import UNLABELED, Lesion, Task

LABEL_KEYS = ("label", "diagnosis")
GROUP_KEYS = ("group", "patient_id")


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


def to_record(lesion: Lesion, task: Task, concepts: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON record of a lesion; `parse_record` reads it back."""
    return {
        "lesion_id": lesion.lesion_id,
        "label": None if lesion.label == UNLABELED else task.diagnosis_names[lesion.label],
        "group": lesion.group,
        "concepts": {
            name: None if math.isnan(score) else score for name, score in zip(concepts, lesion.concepts, strict=True)
        },
        "metadata": {field.name: field.cell(value) for field, value in zip(task.fields, lesion.metadata, strict=True)},
    }


def parse_record(
    key: str, record: bytes | None, label: bytes | None, task: Task, words: Mapping[str, int] | None = None
) -> Record:
    """Parse a sample's `.json` and `.cls` members (None where absent), written by triderm pack or another program.

    lesion_id: default the sample's key, without folders.  label or diagnosis: a spelling of a diagnosis in any case;
    default the content of `.cls`.  group, patient_id or the task's column of groups: default the lesion itself.
    concepts: a mapping of names to scores; default the record's own keys that the task lists or that have its prefix.
    metadata: a mapping, or keys of the record itself, named as the task's fields or as their columns. What is absent,
    null or a missing word of the task is missing.

    words: the index of a diagnosis by its spelling in lower case; default `Task.label_words`. A number is a word like
    any other.

    Raises UnknownLabel for another label, ValueError for another value that cannot be read.
    """
    cells = json.loads(record) if record is not None else {}
    if not isinstance(cells, dict):
        raise ValueError(f"its JSON is a {type(cells).__name__}, not a mapping")
    lesion_id = _text(cells.get("lesion_id")) or key.rpartition("/")[2]
    if not LESION_ID.fullmatch(lesion_id):
        raise ValueError(f"lesion_id {lesion_id!r} must have 1 to 80 characters, no space, dot or slash")
    diagnosis = next((text for name in LABEL_KEYS if (text := _text(cells.get(name)))), (label or b"").decode().strip())
    metadata = _mapping(cells, "metadata") or cells
    concepts = _mapping(cells, "concepts") or _own_concepts({**metadata, **cells}, task)
    group_keys = (*GROUP_KEYS, task.columns.group or "")
    return Record(
        lesion_id=lesion_id,
        group=next((text for name in group_keys if (text := _text(cells.get(name)))), lesion_id),
        label=_label(diagnosis, task, words or task.label_words),
        concepts={
            name: parse_score(name, _text(score), task.missing_words, task.concepts.words)
            for name, score in concepts.items()
        },
        metadata=tuple(
            parse_field(field, _text(metadata.get(field.name, metadata.get(field.column))), task.missing_words)
            for field in task.fields
        ),
    )


def _own_concepts(cells: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Return the scores among a record's own keys, by their names without the task's prefix."""
    prefix = task.concepts.prefix
    if prefix:
        return {name.removeprefix(prefix): value for name, value in cells.items() if name.startswith(prefix)}
    return {name: cells[name] for name in task.concepts.names if name in cells}


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is a {type(value).__name__}, not a mapping of names to values")
    return value


def _label(text: str, task: Task, words: Mapping[str, int]) -> int:
    # JSON holds an integer that was a float as 3.0.
    for spelling in (text.lower(), text.lower().removesuffix(".0")):
        if spelling in words:
            return words[spelling]
    if is_missing(text, task.missing_words):
        return UNLABELED
    raise UnknownLabel(text)
