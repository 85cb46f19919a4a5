"""Read metrics.jsonl, without importing PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from triderm_dist.checksums import DamagedFile, check_mapping


class _Record(BaseModel):
    """Keys of every record."""

    kind: str
    epoch: float
    step: int


class _Train(_Record):
    loss: float


class _Validation(_Record):
    macro_f1: float
    official: float


_KINDS: dict[str, type[BaseModel]] = {"train": _Train, "validation": _Validation}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, empty if there is no file, without lines that are cut off or damaged."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            check_mapping(record, _KINDS.get(record["kind"], _Record))
        except (ValueError, TypeError, KeyError, RecursionError, DamagedFile):
            continue
        records.append(record)
    return records
