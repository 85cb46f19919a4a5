"""Index WebDataset shards written by other programs, in one scan; the tars are not changed.

Supported: plain .tar files (GNU, pax or ustar) whose consecutive members share a key, as `webdataset` groups them, in
any order; one JPEG per view, recognized by its extension; `.json` with what `record.parse_record` reads; `.cls` with a
label.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.milk10k import CONCEPTS
from triderm_dist.data.shards.format import EXTENSIONS, INDEX, ShardFile, rows_schema
from triderm_dist.data.shards.index import ShardIndex, read_index, read_raw_index
from triderm_dist.data.shards.photos import PhotoError, check_photo, is_upright, size_and_hash
from triderm_dist.data.shards.record import Record, UnknownLabel, parse_record
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.data.threads import available_cores, map_in_order
from triderm_dist.files import file_sha256
from triderm_dist.schema import UNLABELED, VIEWS, DataError, Task, one_line
from triderm_dist.tasks import milk10k_task

Member = tuple[int, int]
"""(offset, size) of a member's data in its tar."""

MAX_LABELS = 30
"""Unknown labels named in the error."""

TABLE_ROWS = 1 << 12
"""Rows collected as Python objects before they become a table, which takes a tenth of the memory."""


def index_shards(
    folder: str | os.PathLike[str],
    *,
    task: Task | None = None,
    extensions: Mapping[str, tuple[str, ...]] = EXTENSIONS,
    missing_view: Literal["refuse", "mark"] = "refuse",
    invalid: Literal["refuse", "drop"] = "refuse",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], object] = lambda text: None,
) -> ShardIndex:
    """Write index.json and samples.parquet into a folder of tars and return the index.

    Every record is checked and every photo decoded. The K concepts are those of the first sample that has any; where
    none has, those that the task names, with all scores missing. `note` is called with each tolerated deviation,
    `progress` with (bytes scanned, bytes in all).

    task: gives labels, fields and views their meaning; None takes MILK10k's. A number is a label like any other word,
    since its meaning is not known.

    Raises InvalidLesions with all problems; DataError for labels that name no diagnosis, with their counts, and for a
    folder without plain tars or one written by triderm pack.
    """
    folder = Path(folder)
    paths = _tars(folder)
    task = task or milk10k_task()
    check = _SampleCheck(extensions, missing_view, task)
    scan = _Scan(task)
    total, scanned = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        scan.start_tar(path)
        for sample, checked in map_in_order(check, _samples(path, scan.problems.append), workers or available_cores()):
            scan.add(checked)
            if progress:
                progress(scanned + max(offset for offset, _ in sample.members.values()), total)
        scan.finish_tar()
        scanned += path.stat().st_size
    if scan.unknown_labels and (invalid == "refuse" or not scan.labeled):
        found = ", ".join(
            f"{label!r} in {count} lesions" for label, count in scan.unknown_labels.most_common(MAX_LABELS)
        )
        raise DataError(
            f"{folder}: labels that name no diagnosis: {found}; list them as words of the diagnoses in a task.yaml and "
            f"give task=FILE (known are {', '.join(task.label_words)})"
        )
    if scan.problems and invalid == "refuse":
        raise InvalidLesions(scan.problems, len(scan.tar_of) + len({problem.lesion_id for problem in scan.problems}))
    if not scan.shards:
        raise DataError(f"{folder}: no valid lesion; {len(scan.problems)} problems, the first: {scan.problems[0]}")
    for text in scan.notes():
        note(text)
    names = scan.concepts or (CONCEPTS if task.reader == "milk10k" else ())
    tables = (_with_scores(table, len(names), len(task.fields)) for table in scan.tables)
    about: dict[str, Any] = {"extensions": {view: list(names) for view, names in extensions.items()}}
    write_index(folder, tables, scan.shards, task, names, scan.problems, about)
    return read_index(folder)


@dataclass(frozen=True)
class _Sample:
    """Consecutive members of a tar with one key, by extension."""

    path: Path
    key: str
    members: dict[str, Member]


@dataclass(frozen=True)
class _Checked:
    """A sample's record, None where it is invalid; for both views the location and `size_and_hash` of the photo."""

    record: Record | None
    locations: dict[str, Member]
    photos: list[int]
    rotated: int
    problems: list[Problem]
    unknown_label: str = ""


@dataclass
class _Scan:
    """The rows, shards and problems found so far, tar after tar."""

    task: Task
    tables: list[pa.Table] = field(default_factory=list)
    shards: list[ShardFile] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    tar_of: dict[str, Path] = field(default_factory=dict)
    """The tar of each valid lesion."""
    concepts: tuple[str, ...] = ()
    """Those of the task, else of the first sample that has any."""
    scored: bool = False
    rotated: int = 0
    labeled: int = 0
    unknown_labels: Counter[str] = field(default_factory=Counter)
    """How many lesions have each label that names no diagnosis."""
    _path: Path = Path()
    _before: int = 0
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def start_tar(self, path: Path) -> None:
        self._path, self._before = path, len(self.tar_of)

    def add(self, checked: _Checked) -> None:
        """Add a sample of the current tar, or the problems that exclude it."""
        self.problems += checked.problems
        record = checked.record
        if checked.unknown_label:
            self.unknown_labels[checked.unknown_label] += 1
        if record is None:
            return
        if record.lesion_id in self.tar_of:
            what = f"lesion {record.lesion_id} occurs twice, first in {self.tar_of[record.lesion_id]}"
            self.problems.append(Problem(record.lesion_id, "duplicate lesion", str(self._path), what))
            return
        self.concepts = self.concepts or self.task.concept_names or tuple(record.concepts)
        self.scored |= bool(record.concepts)
        if unknown := next((name for name in record.concepts if name not in self.concepts), None):
            of = "the task" if self.task.concept_names else "the first lesion"
            what = f"lesion {record.lesion_id} has a concept {unknown!r} that {of} lacks"
            self.problems.append(Problem(record.lesion_id, "record", str(self._path), what))
            return
        self.tar_of[record.lesion_id] = self._path
        self.rotated += checked.rotated
        self.labeled += record.label != UNLABELED
        self._rows.append(_row(record, checked, len(self.shards)))
        if len(self._rows) == TABLE_ROWS:
            self._flush()

    def finish_tar(self) -> None:
        self._flush()
        if lesions := len(self.tar_of) - self._before:
            path = self._path
            self.shards.append(ShardFile(path.name, lesions, path.stat().st_size, file_sha256(path)))

    def notes(self) -> Iterator[str]:
        """Yield a line for each tolerated deviation."""
        if not self.scored and (self.concepts or self.task.concepts.prefix):
            yield "no sample has concept scores; every score is missing"
        if self.rotated:
            yield (
                f"the EXIF of {self.rotated} photos asks for a rotation, which training ignores; triderm pack would "
                "apply it"
            )
        if all(pc.all(pc.equal(table["label"], UNLABELED)).as_py() for table in self.tables):
            yield "no sample has a label; these shards can be predicted, not trained on"

    def _flush(self) -> None:
        if self._rows:
            self.tables.append(_table(self._rows, self.concepts, len(self.task.fields)))
            self._rows = []


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the WebDataset tars")
    if (folder / INDEX).is_file() and "packed_with" in read_raw_index(folder / INDEX):
        raise DataError(f"{folder}: written by triderm pack, which made its index; use the folder as it is")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        archive = next((path.name for kind in ("*.tar.*", "*.tgz") for path in sorted(folder.glob(kind))), None)
        hint = f"; decompress {archive} to a plain tar first, since photos are read at random offsets"
        raise DataError(f"{folder}: no *.tar in this folder{hint if archive else ''}")
    return paths


def _samples(path: Path, on_problem: Callable[[Problem], object]) -> Iterator[_Sample]:
    """Yield the samples of a tar as `webdataset` groups them, up to the first damage, which `on_problem` gets."""
    key, members = "", dict[str, Member]()
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isfile() or not dot or not stem:
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is truncated")
                own_key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
                if own_key != key:
                    if members:
                        yield _Sample(path, key, members)
                    key, members = own_key, {}
                elif extension in members:
                    on_problem(Problem(stem, "duplicate member", str(path), f"{member.name} occurs twice"))
                members[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        what = f"not a readable plain tar ({one_line(error)}); the rest of the file is skipped"
        on_problem(Problem("", "tar", str(path), what))
    if members:
        yield _Sample(path, key, members)


@dataclass(frozen=True)
class _SampleCheck:
    """Parses the record of a sample and decodes its photos."""

    extensions: Mapping[str, tuple[str, ...]]
    missing_view: str
    task: Task

    def __call__(self, sample: _Sample) -> _Checked:
        with sample.path.open("rb") as file:

            def read(member: Member) -> bytes:
                file.seek(member[0])
                return file.read(member[1])

            try:
                json_text, cls_text = [
                    read(sample.members[name]) if name in sample.members else None for name in ("json", "cls")
                ]
                record = parse_record(sample.key, json_text, cls_text, self.task)
            except ValueError as error:
                where, name = f"{sample.path}, sample {sample.key}", sample.key.rpartition("/")[2]
                label = error.label if isinstance(error, UnknownLabel) else ""
                return _Checked(
                    None, {}, [], 0, [Problem(name, "label" if label else "record", where, str(error))], label
                )
            return self._with_photos(sample, record, read)

    def _with_photos(self, sample: _Sample, record: Record, read: Callable[[Member], bytes]) -> _Checked:
        where, problems = f"{sample.path}, lesion {record.lesion_id}", list[Problem]()
        locations, photos = dict.fromkeys(VIEWS, (0, 0)), dict.fromkeys(VIEWS, (0, 0, 0))
        rotated = 0
        views = self.task.view_names
        for view in views:
            name = next((name for name in self.extensions[view] if name in sample.members), None)
            if name is None:
                if self.missing_view == "refuse" or len(views) == 1:
                    problems.append(Problem(record.lesion_id, "missing photo", where, self._missing(view, sample)))
                continue
            locations[view] = sample.members[name]
            data = read(locations[view])
            try:
                check_photo(data)
                photos[view] = size_and_hash(data)
                rotated += not is_upright(data)
            except PhotoError as error:
                problems.append(Problem(record.lesion_id, "unreadable photo", where, f"{name}: {error}"))
        if not problems and not any(size for _, size in locations.values()):
            problems.append(Problem(record.lesion_id, "missing photo", where, "no photo at all"))
        numbers = [number for view in VIEWS for number in photos[view]]
        return _Checked(None if problems else record, locations, numbers, rotated, problems)

    def _missing(self, view: str, sample: _Sample) -> str:
        wanted, found = " or .".join(self.extensions[view]), ", .".join(sorted(sample.members))
        allow = ", or allow lesions with one photo by missing_view=mark" if len(self.task.views) > 1 else ""
        return f"no {view} photo named .{wanted} among .{found}; name its extension by {view}=EXTENSION{allow}"


def _row(record: Record, checked: _Checked, shard: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "lesion_id": record.lesion_id,
        "group": record.group,
        "label": record.label,
        "shard": shard,
        "concepts": record.concepts,
        "metadata": record.metadata,
        "photos": checked.photos,
    }
    for view in VIEWS:
        row[f"{view}_offset"], row[f"{view}_size"] = checked.locations[view]
    return row


def _table(rows: list[dict[str, Any]], concepts: tuple[str, ...], metadata_fields: int) -> pa.Table:
    """Return rows as a table, with scores in the order of the concepts, NaN where one is missing."""
    nan = float("nan")
    scored = [{**row, "concepts": [row["concepts"].get(name, nan) for name in concepts]} for row in rows]
    return pa.Table.from_pylist(scored, rows_schema(len(concepts), metadata_fields))


def _with_scores(table: pa.Table, concepts: int, metadata_fields: int) -> pa.Table:
    """Add missing scores to a table that was made before any sample had a concept."""
    schema = rows_schema(concepts, metadata_fields)
    if table.schema.equals(schema):
        return table
    column = schema.get_field_index("concepts")
    missing = pa.FixedSizeListArray.from_arrays(np.full(len(table) * concepts, np.nan, np.float32), concepts)
    return table.add_column(column, schema.field(column), missing)
