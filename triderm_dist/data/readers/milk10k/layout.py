"""Find the tables and the folders of photos of a challenge folder."""

from __future__ import annotations

import re
from pathlib import Path

from triderm_dist.data.readers.milk10k.columns import CONCEPT_PREFIX
from triderm_dist.data.readers.table import find_tables, read_header
from triderm_dist.schema import DataError, Task

_TABLE_NAME = re.compile(
    r"^(?:(?P<prefix>.*)_)?(?P<kind>metadata|input|groundtruth|gt)\.(csv|tsv|txt|xlsx|parquet)$", re.IGNORECASE
)


def has_layout(folder: Path) -> bool:
    """Return whether a folder has a metadata table of the challenge, recognized by its name or its columns."""
    named = [(path, match) for path in find_tables(folder) if (match := _TABLE_NAME.match(path.name))]
    return any(_is_metadata(path) for path, match in named if match["kind"].lower() in ("metadata", "input"))


def _is_metadata(path: Path) -> bool:
    if path.name.lower().startswith("milk10k"):
        return True
    try:
        header = [name.lower() for name in read_header(path)]
    except DataError:
        return False
    return "isic_id" in header and any(name.startswith(CONCEPT_PREFIX.lower()) for name in header)


def inputs(source: Path, task: Task) -> list[Path]:
    """Return the tables and the folders of photos."""
    metadata, truth, photos = find_parts(source)
    return [metadata, *filter(None, [truth]), *photos]


def folder_of(source: Path) -> Path:
    return source.parent if source.is_file() else source


def find_parts(source: Path) -> tuple[Path, Path | None, list[Path]]:
    """Find (metadata, ground truth or None, folders of photos) of a folder or of a metadata table.

    Raises DataError if there is no metadata table, or if several tables match.
    """
    folder = folder_of(source)
    if not folder.is_dir():
        raise DataError(f"{source}: no such folder; give the folder that holds the challenge's tables and photos")
    tables = find_tables(folder)
    metadata: dict[Path, str] = {}
    truths: dict[Path, str] = {}
    for path in tables:
        if match := _TABLE_NAME.match(path.name):
            prefix = (match["prefix"] or "").lower()
            (metadata if match["kind"].lower() in ("metadata", "input") else truths)[path] = prefix

    if source.is_file():
        if source not in metadata:
            raise DataError(f"{source}: not named as a metadata table; give the folder or its *_Metadata.csv")
        chosen = source
    else:
        if not metadata:
            raise DataError(f"{folder}: no *_Metadata.csv, *_input.csv or metadata.csv; give a challenge folder")
        # The Archive's own metadata.csv lacks scores and skin tone; its supplement has them.
        prefixed = {path: prefix for path, prefix in metadata.items() if prefix} or metadata
        if len(prefixed) > 1:
            names = " and ".join(str(path.relative_to(folder)) for path in prefixed)
            first = next(iter(prefixed))
            raise DataError(f"{folder}: holds {names}; give the one to read, such as source={first}")
        chosen = next(iter(prefixed))

    prefix = metadata[chosen]
    partners = [path for path, other in truths.items() if other == prefix or not prefix]
    if len(partners) > 1:
        raise DataError(f"{folder}: several ground truths ({', '.join(path.name for path in partners)}); keep one")
    if not partners and prefix.endswith(("training", "train")):
        raise DataError(
            f"{chosen}: no ground truth in its folder; put {chosen.name.rpartition('_')[0]}_GroundTruth.csv there"
        )
    return chosen, partners[0] if partners else None, _photo_roots(folder, chosen.parent, f"{prefix}_input")


def _photo_roots(folder: Path, tables: Path, own_name: str) -> list[Path]:
    """Return the folders of photos: the one named like the table, else all with known names, else the folder itself."""
    if tables.name.lower() == "supplements":
        tables = tables.parent
    candidates = sorted({path for parent in (folder, tables) for path in parent.iterdir() if path.is_dir()})
    own = [path for path in candidates if path.name.lower() == own_name]
    known = [path for path in candidates if path.name.lower().endswith(("_input", "images"))]
    return own or known or [tables]
