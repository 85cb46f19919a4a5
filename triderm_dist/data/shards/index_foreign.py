"""The index of WebDataset shards that others wrote, by one scan. No tar is changed.

What is understood: plain .tar files (GNU, pax or ustar) whose consecutive members share a key, as `webdataset` groups
them, in any order; a JPEG for each view by its extension; `.json` with what `record.parse` reads; `.cls` with a label.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.shards.format import EXTENSIONS, INDEX, ShardFile, rows_schema
from triderm_dist.data.shards.index import ShardIndex, read_index, read_raw_index
from triderm_dist.data.shards.photos import PhotoError, check_photo, is_upright, photo_facts
from triderm_dist.data.shards.record import Record, parse
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.data.threads import available_cores, in_order
from triderm_dist.files import file_sha256
from triderm_dist.schema import CONCEPTS, UNLABELED, VIEWS, DataError, one_line

Member = tuple[int, int]
"""(offset, size) of a member's data in its tar."""

TABLE_ROWS = 1 << 12
"""Rows that are gathered as Python objects before they become a table, which takes a tenth of the memory."""


@dataclass(frozen=True)
class _Sample:
    """Consecutive members of one key: {extension: where it lies}."""

    path: Path
    key: str
    members: dict[str, Member]


@dataclass(frozen=True)
class _Checked:
    record: Record | None
    places: dict[str, Member]
    facts: list[int]
    turned: int
    problems: list[Problem]


def index_shards(
    folder: str | os.PathLike[str],
    *,
    extensions: Mapping[str, tuple[str, ...]] = EXTENSIONS,
    missing_view: Literal["refuse", "mark"] = "refuse",
    invalid: Literal["refuse", "drop"] = "refuse",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> ShardIndex:
    """Write index.json and samples.parquet beside the tars of a folder and return the index.

    Every record is checked and every photo decoded. The K concepts are those of the first sample that has any; where
    none has, the challenge's own names with every score missing. `note` is told what was tolerated, `progress` the
    bytes scanned and in all.
    Raises InvalidLesions with every problem, or DataError for a folder without plain tars or one that was packed here.
    """
    folder = Path(folder)
    paths = _tars(folder)
    total, scanned = sum(path.stat().st_size for path in paths), 0
    shards: list[ShardFile] = []
    tables: list[pa.Table] = []
    problems: list[Problem] = []
    first_seen: dict[str, Path] = {}
    concepts: tuple[str, ...] = ()
    turned = 0

    for path in paths:
        kept: list[dict[str, Any]] = []
        before = len(first_seen)
        samples = _samples(path, problems.append)
        for sample, checked in in_order(
            lambda s: _check(s, extensions, missing_view), samples, workers or available_cores()
        ):
            problems += checked.problems
            record = checked.record
            if record is None:
                continue
            if record.lesion_id in first_seen:
                what = f"lesion {record.lesion_id} is there twice, first in {first_seen[record.lesion_id]}"
                problems.append(Problem(record.lesion_id, "doubled lesion", str(path), what))
                continue
            concepts = concepts or tuple(record.concepts)
            if unknown := next((name for name in record.concepts if name not in concepts), None):
                what = f"lesion {record.lesion_id} has a concept {unknown!r} that the first lesion lacks"
                problems.append(Problem(record.lesion_id, "record", str(path), what))
                continue
            first_seen[record.lesion_id] = path
            turned += checked.turned
            kept.append(_row(record, checked, len(shards)))
            if len(kept) == TABLE_ROWS:
                tables.append(_table(kept, concepts))
                kept = []
            if progress:
                progress(scanned + max(offset for offset, _ in sample.members.values()), total)
        scanned += path.stat().st_size
        if kept:
            tables.append(_table(kept, concepts))
        if held := len(first_seen) - before:
            shards.append(ShardFile(path.name, held, path.stat().st_size, file_sha256(path)))
    if problems and invalid == "refuse":
        raise InvalidLesions(problems, len(first_seen) + len({problem.lesion_id for problem in problems}))
    if not shards:
        raise DataError(f"{folder}: no lesion is left to index; {len(problems)} problems, first {problems[0]}")
    if not concepts:
        note("no sample has concept scores; every score is missing")
    if turned:
        note(f"{turned} photos whose EXIF wants them turned; they train as they lie, packing would turn them")
    if all(pc.all(pc.equal(table["label"], UNLABELED)).as_py() for table in tables):
        note("no sample has a label; these shards can be predicted, not trained on")
    names = concepts or CONCEPTS
    about = {"extensions": {view: list(names) for view, names in extensions.items()}}
    write_index(folder, (_with_scores(table, len(names)) for table in tables), shards, names, problems, about)
    return read_index(folder)


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the WebDataset tars")
    if (folder / INDEX).is_file() and "packed_with" in read_raw_index(folder / INDEX):
        raise DataError(f"{folder}: these shards were packed here and have their index; use the folder as it is")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        packed = next((path.name for kind in ("*.tar.*", "*.tgz") for path in sorted(folder.glob(kind))), None)
        hint = f"; {packed} must be unpacked to a plain tar first, since photos are read at random" if packed else ""
        raise DataError(f"{folder}: no *.tar here{hint}")
    return paths


def _samples(path: Path, on_problem: Callable[[Problem], object]) -> Iterator[_Sample]:
    """The samples of a tar as `webdataset` groups them; damage ends them and is told to `on_problem`."""
    key, members = "", dict[str, Member]()
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                head, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isfile() or not dot or not stem:
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                own_key, extension = f"{head}/{stem}" if head else stem, extension.lower()
                if own_key != key:
                    if members:
                        yield _Sample(path, key, members)
                    key, members = own_key, {}
                elif extension in members:
                    on_problem(Problem(stem, "doubled member", str(path), f"{member.name} is there twice"))
                members[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        what = f"not readable to its end as a plain tar ({one_line(error)}); the rest is left out"
        on_problem(Problem("", "tar", str(path), what))
    if members:
        yield _Sample(path, key, members)


def _check(sample: _Sample, extensions: Mapping[str, tuple[str, ...]], missing_view: str) -> _Checked:
    with sample.path.open("rb") as file:

        def read(place: Member) -> bytes:
            file.seek(place[0])
            return file.read(place[1])

        try:
            texts = [read(sample.members[name]) if name in sample.members else None for name in ("json", "cls")]
            record = parse(sample.key, *texts)
        except ValueError as error:
            where = f"{sample.path}, sample {sample.key}"
            return _Checked(None, {}, [], 0, [Problem(sample.key.rpartition("/")[2], "record", where, str(error))])
        where, problems = f"{sample.path}, lesion {record.lesion_id}", []
        places, facts = dict.fromkeys(VIEWS, (0, 0)), dict.fromkeys(VIEWS, (0, 0, 0))
        turned = 0
        for view in VIEWS:
            name = next((name for name in extensions[view] if name in sample.members), None)
            if name is None:
                if missing_view == "refuse":
                    problems.append(
                        Problem(record.lesion_id, "missing photo", where, _absent(view, sample, extensions))
                    )
                continue
            places[view] = sample.members[name]
            data = read(places[view])
            try:
                check_photo(data)
                facts[view] = photo_facts(data)
                turned += not is_upright(data)
            except PhotoError as error:
                problems.append(Problem(record.lesion_id, "unreadable photo", where, f"{name}: {error}"))
        if not any(size for _, size in places.values()) and missing_view == "mark":
            problems.append(Problem(record.lesion_id, "missing photo", where, "no photo at all"))
        return _Checked(
            None if problems else record, places, [fact for view in VIEWS for fact in facts[view]], turned, problems
        )


def _absent(view: str, sample: _Sample, extensions: Mapping[str, tuple[str, ...]]) -> str:
    return (
        f"no {view} photo named .{' or .'.join(extensions[view])} among .{', .'.join(sorted(sample.members))}; "
        f"name its extension by {view}=EXTENSION, or allow lesions with one photo by missing_view=mark"
    )


def _row(record: Record, checked: _Checked, shard: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "lesion_id": record.lesion_id,
        "group": record.group,
        "label": record.label,
        "shard": shard,
        "concepts": record.concepts,
        "metadata": record.metadata,
        "photos": checked.facts,
    }
    for view in VIEWS:
        row[f"{view}_offset"], row[f"{view}_size"] = checked.places[view]
    return row


def _table(rows: list[dict[str, Any]], concepts: tuple[str, ...]) -> pa.Table:
    """Rows with their scores in the order of the concepts, NaN where one has none."""
    nothing = float("nan")
    scored = [{**row, "concepts": [row["concepts"].get(name, nothing) for name in concepts]} for row in rows]
    return pa.Table.from_pylist(scored, rows_schema(len(concepts)))


def _with_scores(table: pa.Table, concepts: int) -> pa.Table:
    """A table that was made before any sample had a concept gets its missing scores."""
    schema = rows_schema(concepts)
    if table.schema.equals(schema):
        return table
    place = schema.get_field_index("concepts")
    missing = pa.FixedSizeListArray.from_arrays(np.full(len(table) * concepts, np.nan, np.float32), concepts)
    return table.set_column(place, schema.field(place), missing)
