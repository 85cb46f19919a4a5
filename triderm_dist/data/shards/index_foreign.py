"""Index WebDataset shards written by other programs, in one scan; the tars are not changed.

Supported: plain .tar files (GNU, pax or ustar) whose consecutive members share a key, as `webdataset` groups them, in
any order; one JPEG per view, recognized by its extension; `.json` with what `record.parse_record` reads; `.cls` with a
label.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from triderm_dist.data.group_hashes import GroupHashes, hashes_for
from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.milk10k import CONCEPTS
from triderm_dist.data.shards.format import EXTENSIONS, INDEX, SHARD_NAME_RULE, ShardFile, is_shard_name, rows_schema
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.photos import PhotoError, check_photo, has_srgb, is_upright, size_and_hash
from triderm_dist.data.shards.record import (
    Record,
    UnknownLabel,
    belongs_to_lesion,
    is_photo,
    parse_record,
    split_name,
)
from triderm_dist.data.shards.tar_members import DamagedTar, tar_members
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.data.threads import available_cores, map_in_order
from triderm_dist.file_kinds import START, kind_of
from triderm_dist.files import file_sha256
from triderm_dist.schema import UNLABELED, VIEWS, DataError, Task, printable, quoted, why_no_id
from triderm_dist.tasks import milk10k_task

Member = tuple[int, int]
"""(offset, size) of a member's data in its tar."""

MAX_LABELS = 30
"""Unknown labels named in the error."""

MAX_NAMES = 10
"""Files and extensions named in a note."""

MAX_RECORD, MAX_PHOTO = 1 << 24, 1 << 30
"""Bytes of a .json or .cls, and of a photo."""

_OTHER_TAR = re.compile(r"\.tar\..+|\.(tgz|tbz2?|txz|tzst)$", re.IGNORECASE)

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
    hash_groups: bool = False,
    salt: str | None = None,
    asked: bool = True,
) -> ShardIndex:
    """Write index.json and samples.parquet into a folder of tars and return the index.

    Every record is checked and every photo decoded. The K concepts are those of the first sample that has any; where
    none has, those that the task names, with all scores missing. `note` is called with each tolerated deviation,
    `progress` with (bytes scanned, bytes in all).

    task: gives labels, fields and views their meaning; None takes MILK10k's. A number is a label like any other word,
    since its meaning is not known.  hash_groups: write hashes in the place of groups, as triderm pack does; the tars
    are not changed.  salt, asked: see `hashes_for`.

    Raises InvalidLesions with all problems; DataError for labels that name no diagnosis, with their counts, and for a
    folder without plain tars or one written by triderm pack.
    """
    folder = Path(folder)
    paths = _tars(folder)
    task = task or milk10k_task()
    check = _SampleCheck(extensions, missing_view, task)
    scan = _Scan(task)
    if others := _other_tars(folder):
        note(f"not read, as no plain tar in this folder: {_some([printable(name) for name in others])}")
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
            f"{folder}: labels that name no diagnosis: {found}; list them in a task.yaml, as words of the "
            f"diagnoses or as missing_words (no label), and give task=FILE (known are {', '.join(task.label_words)})"
        )
    if scan.problems and invalid == "refuse":
        raise InvalidLesions(scan.problems, len(scan.tar_of) + len({problem.lesion_id for problem in scan.problems}))
    if not scan.shards:
        why = (
            f"{len(scan.problems)} problems, the first: {scan.problems[0]}"
            if scan.problems
            else "; ".join(scan.unread())
        )
        raise DataError(f"{folder}: no valid lesion in {len(paths)} tars; {why}")
    for text in scan.notes():
        note(text)
    names = scan.concepts or (CONCEPTS if task.reader == "milk10k" else ())
    about: dict[str, Any] = {"extensions": {view: list(names) for view, names in extensions.items()}}
    if hash_groups:
        groups = dict(pair for table in scan.tables for pair in zip(*_texts(table, "lesion_id", "group"), strict=True))
        hashes, notes = hashes_for(groups, folder, task.columns.group, salt, asked)
        if hashes:
            about["groups"] = {"salt": hashes.fingerprint}
            scan.problems = hashes.without_ids(scan.problems)
            scan.tables = [_with_hashes(table, hashes) for table in scan.tables]
            notes.append(f"index and predictions hold hashes of {len(hashes.groups):,} groups; the tars hold their ids")
        for text in notes:
            note(text)
    tables = (_with_scores(table, len(names), task) for table in scan.tables)
    # Relative paths, so that the index of a copied folder is the same.
    problems = [replace(problem, where=problem.where.removeprefix(f"{folder}{os.sep}")) for problem in scan.problems]
    write_index(folder, tables, scan.shards, task, names, problems, about)
    return read_index(folder)


@dataclass(frozen=True)
class _Sample:
    """Consecutive members of a tar with one key, by extension."""

    path: Path
    key: str
    members: dict[str, Member] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """What is wrong with members."""


@dataclass(frozen=True)
class _Checked:
    """A sample's record, None where it is invalid; for both views the location and `size_and_hash` of the photo.

    unused: extensions of members that are not read; the whole name of a file that belongs to no lesion.
    """

    record: Record | None
    locations: dict[str, Member] = field(default_factory=dict)
    photos: list[int] = field(default_factory=list)
    rotated: int = 0
    recolored: int = 0
    problems: list[Problem] = field(default_factory=list)
    unknown_label: str = ""
    unused: tuple[str, ...] = ()


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
    recolored: int = 0
    labeled: int = 0
    unknown_labels: Counter[str] = field(default_factory=Counter)
    """How many lesions have each label that names no diagnosis."""
    unused: Counter[str] = field(default_factory=Counter)
    """How often each extension, or file that belongs to no lesion, was not read."""
    empty: list[str] = field(default_factory=list)
    """Names of the tars without a lesion."""
    _path: Path = Path()
    _before: int = 0
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def start_tar(self, path: Path) -> None:
        self._path, self._before = path, len(self.tar_of)

    def add(self, checked: _Checked) -> None:
        """Add a sample of the current tar, or the problems that exclude it."""
        self.problems += checked.problems
        self.unused.update(checked.unused)
        record = checked.record
        if checked.unknown_label:
            self.unknown_labels[checked.unknown_label] += 1
        if record is None:
            return
        if record.lesion_id in self.tar_of:
            what = f"lesion {record.lesion_id} occurs twice, first in {self.tar_of[record.lesion_id].name}"
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
        self.recolored += checked.recolored
        self.labeled += record.label != UNLABELED
        self._rows.append(_row(record, checked, len(self.shards)))
        if len(self._rows) == TABLE_ROWS:
            self._flush()

    def finish_tar(self) -> None:
        self._flush()
        if lesions := len(self.tar_of) - self._before:
            path = self._path
            self.shards.append(ShardFile(path.name, lesions, path.stat().st_size, file_sha256(path)))
        else:
            self.empty.append(self._path.name)

    def unread(self) -> Iterator[str]:
        """Yield a line about tars without a lesion, and one about members that are not read."""
        if self.empty:
            yield f"no lesion in {_some(self.empty)}; not in the index"
        if self.unused:
            counted = [f"{name} ({count} times)" if count > 1 else name for name, count in self.unused.most_common()]
            yield f"not used, as neither a record nor a photo of a view: {_some(counted)}"

    def notes(self) -> Iterator[str]:
        """Yield a line for each tolerated deviation."""
        yield from self.unread()
        if not self.scored and (self.concepts or self.task.concepts.prefix):
            yield "no sample has concept scores; every score is missing"
        if self.rotated:
            yield (
                f"the EXIF of {self.rotated} photos asks for a rotation, which training ignores; triderm pack would "
                "apply it"
            )
        if self.recolored:
            yield (
                f"{self.recolored} photos have CMYK colors or a color profile other than sRGB, which training ignores; "
                "triderm pack would convert them"
            )
        lesions = len(self.tar_of)
        if not self.labeled:
            yield "no sample has a label; these shards can be predicted, not trained on"
        elif self.labeled < lesions:
            yield f"{lesions - self.labeled} of {lesions} lesions have no label; they are not trained on"

    def _flush(self) -> None:
        if self._rows:
            self.tables.append(_table(self._rows, self.concepts, self.task))
            self._rows = []


def _some(names: Sequence[str]) -> str:
    """Name the first `MAX_NAMES` and count the others."""
    return ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds the WebDataset tars")
    if _was_packed(folder / INDEX):
        raise DataError(f"{folder}: written by triderm pack, which made its index; use the folder as it is")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tar" and not _is_hidden(path))
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: not a file; move it away, or restore the file that it links to")
        if not is_shard_name(path.name):
            raise DataError(f"{printable(str(path))}: {SHARD_NAME_RULE}; rename it")
    if not paths:
        archive = next(iter(_other_tars(folder)), None)
        hint = f"; decompress {archive} to a plain tar first, since photos are read at random offsets"
        raise DataError(f"{folder}: no *.tar in this folder{hint if archive else ''}")
    return paths


def _is_hidden(path: Path) -> bool:
    return path.name.startswith("._")  # macOS writes ._NAME beside each file on disks of other systems


def _was_packed(index: Path) -> bool:
    """Return whether an index.json, which may be damaged, was written by triderm pack."""
    try:
        return index.is_file() and b'"packed_with"' in index.read_bytes()
    except OSError as error:
        raise DataError(f"{index}: not readable ({error.strerror}); remove it") from None


def _other_tars(folder: Path) -> list[str]:
    """Return the names of tars that are not read: compressed, partly downloaded, or in folders of the folder."""
    names = [path.name for path in folder.iterdir() if _OTHER_TAR.search(path.name) and not _is_hidden(path)]
    return sorted([*names, *(str(path.relative_to(folder)) for path in folder.glob("*/*.tar"))])


def _samples(path: Path, on_problem: Callable[[Problem], object]) -> Iterator[_Sample]:
    """Yield the samples of a tar as `webdataset` groups them, up to the first damage, which `on_problem` gets.

    The sample before the damage is left out, since its last members may be lost.
    """
    sample = _Sample(path, "")
    try:
        for member in tar_members(path):
            key, extension = split_name(member.name)
            if not key:
                continue
            if key != sample.key:
                if sample.key:
                    yield sample
                sample = _Sample(path, key)
            shown = printable(extension)
            if member.fault:
                sample.faults.append(f".{shown} is {member.fault}; make the tar again from plain files")
            elif extension in sample.members:
                sample.faults.append(f".{shown} occurs twice; remove one")
            elif member.size > (MAX_RECORD if extension in ("json", "cls") else MAX_PHOTO):
                sample.faults.append(f".{shown} has {member.size} bytes, too many for what it is; remove it")
            sample.members[extension] = (member.offset, member.size)
    except (DamagedTar, OSError) as error:
        reason = error.strerror or "not readable" if isinstance(error, OSError) else str(error)
        what = f"not a readable plain tar ({reason}); the rest of the file is skipped; copy or make it again"
        on_problem(Problem("", "tar", str(path), what))
        if sample.key:
            what = f"sample {printable(sample.key)} is the last before the damage, so it may be incomplete"
            on_problem(Problem(printable(sample.key.rpartition("/")[2]), "tar", str(path), what))
        return
    if sample.key:
        yield sample


@dataclass(frozen=True)
class _SampleCheck:
    """Parses the record of a sample and decodes its photos."""

    extensions: Mapping[str, tuple[str, ...]]
    missing_view: str
    task: Task

    def __call__(self, sample: _Sample) -> _Checked:
        if not belongs_to_lesion(sample.members, self.extensions):
            name = printable(sample.key.rpartition("/")[2])
            return _Checked(None, unused=tuple(f"{name}.{extension}" for extension in sample.members))
        name, where = printable(sample.key.rpartition("/")[2]), f"{sample.path}, sample {printable(sample.key)}"
        if sample.faults:
            return _Checked(None, problems=[Problem(name, "member", where, fault) for fault in sample.faults])
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
                label = error.label if isinstance(error, UnknownLabel) else ""
                problem = Problem(name, "label" if label else "record", where, str(error))
                return _Checked(None, problems=[problem], unknown_label=label)
            if record.group != record.lesion_id and (wrong := why_no_id(record.group)):
                what = f"group {quoted(record.group)} {wrong}"
                return _Checked(None, problems=[Problem(record.lesion_id, "record", where, what)])
            return self._with_photos(sample, record, read)

    def _with_photos(self, sample: _Sample, record: Record, read: Callable[[Member], bytes]) -> _Checked:
        where, problems = f"{sample.path}, lesion {record.lesion_id}", list[Problem]()
        locations, photos = dict.fromkeys(VIEWS, (0, 0)), dict.fromkeys(VIEWS, (0, 0, 0))
        rotated, recolored, used = 0, 0, {"json", "cls"}

        def add(kind: str, what: str) -> None:
            problems.append(Problem(record.lesion_id, kind, where, what))

        views = self.task.view_names
        for view in views:
            names = [name for name in self.extensions[view] if name in sample.members]
            used.update(names)
            if not names:
                if self.missing_view == "refuse" or len(views) == 1 or self._other_format(view, sample):
                    add("missing photo", self._missing(view, sample))
                continue
            locations[view] = sample.members[names[0]]
            data = read(locations[view])
            if other := next((name for name in names[1:] if read(sample.members[name]) != data), None):
                what = f".{names[0]} and .{other} are different {view} photos; name one by {view}=EXTENSION"
                add("several photos", what)
                continue
            try:
                check_photo(data)
                photos[view] = size_and_hash(data)
                rotated += not is_upright(data)
                recolored += not has_srgb(data)
            except PhotoError as error:
                kind = kind_of(data[:START])
                reason = str(error) if kind == "a JPEG" else f"{kind}, shards hold JPEGs; convert it"
                add("unreadable photo", f"{names[0]}: {reason}")
        if not problems and not any(size for _, size in locations.values()):
            add("missing photo", "no photo at all")
        numbers = [number for view in VIEWS for number in photos[view]]
        unused = tuple(f".{printable(name)}" for name in sample.members if name not in used)
        return _Checked(None if problems else record, locations, numbers, rotated, recolored, problems, unused=unused)

    def _missing(self, view: str, sample: _Sample) -> str:
        wanted = " or .".join(self.extensions[view])
        found = _some([f".{printable(name)}" for name in sorted(sample.members)])
        if other := self._other_format(view, sample):
            return f"no {view} photo named .{wanted}, but .{printable(other)}; shards hold JPEGs, so convert it"
        allow = ", or allow lesions with one photo by missing_view=mark" if len(self.task.views) > 1 else ""
        return f"no {view} photo named .{wanted} among {found}; name its extension by {view}=EXTENSION{allow}"

    def _other_format(self, view: str, sample: _Sample) -> str | None:
        """Return the extension of a photo of a view in another format: with the same name but another suffix."""
        names = {name.rpartition(".")[0] for name in self.extensions[view]}
        return next((name for name in sample.members if is_photo(name) and name.rpartition(".")[0] in names), None)


def _row(record: Record, checked: _Checked, shard: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "lesion_id": record.lesion_id,
        "group": record.group,
        "label": record.label,
        "fine": record.fine,
        "shard": shard,
        "concepts": record.concepts,
        "metadata": record.metadata,
        "photos": checked.photos,
    }
    for view in VIEWS:
        row[f"{view}_offset"], row[f"{view}_size"] = checked.locations[view]
    return row


def _table(rows: list[dict[str, Any]], concepts: tuple[str, ...], task: Task) -> pa.Table:
    """Return rows as a table, with scores in the order of the concepts, NaN where one is missing."""
    nan = float("nan")
    scored = [{**row, "concepts": [row["concepts"].get(name, nan) for name in concepts]} for row in rows]
    return pa.Table.from_pylist(scored, rows_schema(len(concepts), len(task.fields), bool(task.fine)))


def _texts(table: pa.Table, *names: str) -> list[list[str]]:
    return [table[name].to_pylist() for name in names]


def _with_hashes(table: pa.Table, hashes: GroupHashes) -> pa.Table:
    """Replace the groups of a table by their hashes."""
    column = table.schema.get_field_index("group")
    hashed = pa.array([hashes.of(group) for group in table["group"].to_pylist()], pa.string())
    return table.set_column(column, table.schema.field(column), hashed)


def _with_scores(table: pa.Table, concepts: int, task: Task) -> pa.Table:
    """Add missing scores to a table that was made before any sample had a concept."""
    schema = rows_schema(concepts, len(task.fields), bool(task.fine))
    if table.schema.equals(schema):
        return table
    column = schema.get_field_index("concepts")
    missing = pa.FixedSizeListArray.from_arrays(np.full(len(table) * concepts, np.nan, np.float32), concepts)
    return table.add_column(column, schema.field(column), missing)
