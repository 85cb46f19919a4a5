"""The extra sets whose lesions joined the training of networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from triderm_dist.checksums import DamagedFile, read_checked_json
from triderm_dist.schema import DataError


class _ExtraSet(BaseModel):
    task: str
    lesions: int
    weight: float


class _ExtraKeys(BaseModel):
    extra: list[_ExtraSet] = []


def extra_sets(folder: Path, networks: Sequence[str]) -> list[str]:
    """Name the extra sets whose lesions joined the training of a run's networks, as their fold.json record them."""
    found: dict[str, None] = {}
    for name in networks:
        for path in sorted((folder / name).glob("fold-*/fold.json")):
            try:
                record = read_checked_json(path, _ExtraKeys)
            except DamagedFile as error:
                raise DataError(f"{path}: {error}; delete {path.parent} and run triderm crossval again") from None
            for each in record.get("extra", []):
                found[f"{each['task']} ({each['lesions']:,} lesions, weight {each['weight']:g})"] = None
    return list(found)
