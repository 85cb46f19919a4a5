"""A lesion in words <-> the JSON beside its photos in a shard, for readers who know nothing of samples.parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triderm_dist.data.readers.milk10k import CONCEPT_PREFIX, LESION_ID, parse_field, parse_score
from triderm_dist.schema import DIAGNOSES, METADATA_FIELDS, UNLABELED, Lesion

LABEL_KEYS = ("label", "diagnosis")
GROUP_KEYS = ("group", "patient_id")


@dataclass(frozen=True)
class Record:
    """What a sample's JSON says: as in `Lesion`, the concepts still by name."""

    lesion_id: str
    group: str
    label: int
    concepts: dict[str, float]
    metadata: tuple[float, ...]


def describe(lesion: Lesion, concepts: tuple[str, ...]) -> dict[str, Any]:
    """The JSON of a lesion; `parse` reads it back."""
    return {
        "lesion_id": lesion.lesion_id,
        "label": None if lesion.label == UNLABELED else DIAGNOSES[lesion.label],
        "group": lesion.group,
        "concepts": {
            name: None if math.isnan(score) else score for name, score in zip(concepts, lesion.concepts, strict=True)
        },
        "metadata": {
            name: field.cell(value)
            for (name, field), value in zip(METADATA_FIELDS.items(), lesion.metadata, strict=True)
        },
    }


def parse(key: str, record: bytes | None, label: bytes | None) -> Record:
    """What a sample of a shard says, by us or by others: its key, its `.json` and its `.cls` member, None if absent.

    lesion_id: else the sample's key, without folders.  label or diagnosis: a name of `DIAGNOSES` in any case, or its
    number; else what `.cls` says.  group or patient_id: else the lesion itself.  concepts: a mapping of names to
    scores; or cells MONET_*.  metadata: a mapping, or cells of the record itself, named as in `METADATA_FIELDS` or in
    the challenge's table.  What is absent or null is missing.
    Raises ValueError saying what can't be understood.
    """
    cells = json.loads(record) if record is not None else {}
    if not isinstance(cells, dict):
        raise ValueError(f"its JSON is a {type(cells).__name__}, not a mapping")
    lesion_id = _text(cells.get("lesion_id")) or key.rpartition("/")[2]
    if not LESION_ID.fullmatch(lesion_id):
        raise ValueError(f"lesion_id {lesion_id!r} must have 1 to 80 characters, no blank, dot or slash")
    diagnosis = next((text for name in LABEL_KEYS if (text := _text(cells.get(name)))), (label or b"").decode().strip())
    metadata = _mapping(cells, "metadata") or cells
    concepts = _mapping(cells, "concepts") or {
        name.removeprefix(CONCEPT_PREFIX): value
        for name, value in {**metadata, **cells}.items()
        if name.startswith(CONCEPT_PREFIX)
    }
    return Record(
        lesion_id=lesion_id,
        group=next((text for name in GROUP_KEYS if (text := _text(cells.get(name)))), lesion_id),
        label=_label(diagnosis) if diagnosis else UNLABELED,
        concepts={name: parse_score(name, _text(score)) for name, score in concepts.items()},
        metadata=tuple(
            parse_field(field, _text(metadata.get(name, metadata.get(field.column))))
            for name, field in METADATA_FIELDS.items()
        ),
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is a {type(value).__name__}, not a mapping of names to values")
    return value


def _label(text: str) -> int:
    if text.upper() in DIAGNOSES:
        return DIAGNOSES.index(text.upper())
    if text.isdecimal() and int(text) < len(DIAGNOSES):
        return int(text)
    raise ValueError(f"unknown diagnosis {text!r}; known are {', '.join(DIAGNOSES)}, or their numbers from 0")
