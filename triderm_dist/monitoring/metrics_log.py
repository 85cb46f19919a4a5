"""Read and format metrics.jsonl without importing PyTorch. NaN and infinity are stored as null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
    loss: float | None


class _Validation(_Record):
    macro_f1: float | None
    official: float | None


_KINDS: dict[str, type[BaseModel]] = {"train": _Train, "validation": _Validation}


def metrics_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of metrics.jsonl; non-finite values (such as an overflow under fp16) become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl; [] if there is no file. Null becomes NaN; damaged lines are skipped."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            check_mapping(record, _KINDS.get(record["kind"], _Record))
        except (ValueError, TypeError, KeyError, RecursionError, DamagedFile):
            continue
        records.append({key: math.nan if value is None else value for key, value in record.items()})
    return records
