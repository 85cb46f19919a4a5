"""Scan one tar of another program: parse the records and decode the photos of its samples, and keep what was found in
a file, so that a set is indexed by several processes, and a scan that was interrupted is resumed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from triderm_dist.config import RemoteConfig
from triderm_dist.data.ids import why_no_id
from triderm_dist.data.problems import Problem
from triderm_dist.data.shards.format import ShardFile, rows_schema
from triderm_dist.data.shards.open import is_url
from triderm_dist.data.shards.photos import PhotoError, check_photo, has_srgb, is_upright, size_and_hash
from triderm_dist.data.shards.record import (
    Record,
    UnknownLabel,
    belongs_to_lesion,
    is_photo,
    parse_record,
    split_name,
    to_row,
)
from triderm_dist.data.shards.remote import Store
from triderm_dist.data.shards.tar_members import DamagedTar, tar_members
from triderm_dist.data.threads import map_in_order
from triderm_dist.file_kinds import START, kind_of
from triderm_dist.files import PATIENT_DATA, atomic_path, file_sha256
from triderm_dist.runtime.messages import listed, printable
from triderm_dist.schema import VIEWS, Task

Member = tuple[int, int]
"""(offset, size) of a member's data in its tar."""

MAX_NAMES = 10
"""Files and extensions named in a note."""

MAX_RECORD, MAX_PHOTO = 1 << 24, 1 << 30
"""Bytes of a .json or .cls, and of a photo."""

TABLE_ROWS = 1 << 12
"""Rows collected as Python objects before they become a table, which takes a tenth of the memory."""

SLOWEST = 1e6
"""Bytes a second at which a tar behind a URL is fetched at least."""

_VERSION = 2
_ABOUT = b"triderm-scan"


@dataclass(frozen=True)
class TarFile:
    """A tar to scan.

    folder: that it is in, or the URL of that.  state: a number that is another one when the tar has changed: the time
    of its last change in ns; behind a URL a hash of what its server says of it.
    """

    folder: str
    name: str
    bytes: int
    state: int

    @contextmanager
    def local(self, scratch: Path) -> Iterator[Path]:
        """Context with the path of the tar; one behind a URL is in a folder in `scratch` for that time.

        Raises DataError where it cannot be fetched.
        """
        if not is_url(self.folder):
            yield Path(self.folder) / self.name
            return
        scratch.mkdir(parents=True, exist_ok=True)
        seconds = max(RemoteConfig().total_seconds, self.bytes / SLOWEST)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=scratch) as folder:
            path = Path(folder) / self.name
            store = Store(self.folder, RemoteConfig(total_seconds=seconds))
            store.fetch(ShardFile(self.name, 0, self.bytes, ""), path)
            yield path


@dataclass(frozen=True)
class TarScan:
    """What a scan found in a tar, besides the rows of its valid lesions, which are in `file`.

    tar: its name, valid lesions, bytes and hash.  state: see `TarFile`.  settings: hash of those of the scan.
    concept_sets: the names of the concepts of a sample, each combination once, in the order in which they appear.
    problems: with the number of valid lesions before each.  unknown_labels: how many lesions have each label that names
    no diagnosis.  unused: how often each extension, or file that belongs to no lesion, was not read.
    """

    file: Path
    tar: ShardFile
    state: int
    settings: str
    concept_sets: tuple[tuple[str, ...], ...]
    problems: tuple[tuple[int, Problem], ...]
    unknown_labels: Mapping[str, int]
    unused: Mapping[str, int]

    def rows(self, *columns: str) -> pa.Table:
        """Read the rows of the valid lesions: the columns of `rows_schema`, but `concepts` are the scores of the set
        `concept_set`; and whether a photo is `rotated` or `recolored`, as training does not.
        """
        return pq.read_table(self.file, columns=list(columns) or None)

    def scores(self, rows: pa.Table, names: Sequence[str]) -> np.ndarray:
        """Return the scores (n, K) float32 of these concepts in rows (n,), NaN where one is missing."""
        scores = np.full((len(rows), len(names)), np.nan, np.float32)
        of = rows["concept_set"].to_numpy()
        for number, own in enumerate(self.concept_sets):
            at = np.flatnonzero(of == number)
            if len(at) and own:
                found = rows["concepts"].take(pa.array(at)).combine_chunks().flatten().to_numpy(zero_copy_only=False)
                scores[at[:, None], [names.index(name) for name in own]] = found.reshape(len(at), len(own))
        return scores


@dataclass(frozen=True)
class TarScanner:
    """Scans tars with given settings, and keeps the results in a folder.

    workers: threads for the samples of one tar.
    """

    folder: Path
    task: Task
    extensions: Mapping[str, tuple[str, ...]]
    missing_view: str
    workers: int = 1

    @property
    def settings(self) -> str:
        """Hash of what the result depends on, besides the tar."""
        about = [_VERSION, self.task.to_mapping(), {**self.extensions}, self.missing_view]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def known(self, tar: TarFile) -> TarScan | None:
        """Return the result of an earlier scan, None if there is none or the tar or a setting has changed."""
        file = self.file(tar.name)
        try:
            about = json.loads((pq.read_schema(file).metadata or {})[_ABOUT])
            problems = tuple((row, Problem(**entry)) for row, entry in about.pop("problems"))
            sets = tuple(map(tuple, about.pop("concept_sets")))
            scan = TarScan(file, ShardFile(**about.pop("tar")), problems=problems, concept_sets=sets, **about)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return None
        same = (scan.tar.bytes, scan.state, scan.settings) == (tar.bytes, tar.state, self.settings)
        return scan if same else None

    def scan(self, tar: TarFile, progress: Callable[[int], object] = lambda position: None) -> TarScan:
        """Return the result of scanning a tar, of an earlier scan where nothing has changed.

        progress: called with the bytes of the tar that are scanned.
        """
        if known := self.known(tar):
            return known
        found, check = _Found(self.task), _SampleCheck(self.extensions, self.missing_view, self.task)
        with tar.local(self.folder) as path:
            for sample, checked in map_in_order(check, _samples(path, found.add_problem), self.workers):
                found.add(checked)
                progress(max(offset for offset, _ in sample.members.values()))
            table = found.table()
            shard = ShardFile(tar.name, len(table), path.stat().st_size, file_sha256(path))
            problems = tuple((row, _without_folder(problem, path)) for row, problem in found.problems)
        scan = TarScan(
            self.file(tar.name), shard, tar.state, self.settings, tuple(found.concept_sets), problems,
            found.unknown_labels, found.unused,
        )  # fmt: skip
        self.write(scan, table)
        return scan

    def write(self, scan: TarScan, rows: pa.Table) -> None:
        """Keep the result of a scan.  rows: see `TarScan.rows`."""
        about = {each.name: getattr(scan, each.name) for each in fields(scan) if each.name != "file"}
        about |= {"tar": vars(scan.tar), "problems": [(row, asdict(problem)) for row, problem in scan.problems]}
        with atomic_path(scan.file, PATIENT_DATA) as temporary:
            pq.write_table(rows.replace_schema_metadata({_ABOUT: json.dumps(about)}), temporary)

    def file(self, name: str) -> Path:
        """Return the path of the result of scanning a tar."""
        return self.folder / f"{name}.parquet"


def _without_folder(problem: Problem, path: Path) -> Problem:
    """Name the tar without its folder, so that the index of a copied folder is the same."""
    return Problem(problem.lesion_id, problem.kind, problem.where.replace(str(path), path.name, 1), problem.what)


class _Found:
    """The rows and problems of the samples of a tar, so far."""

    def __init__(self, task: Task) -> None:
        self._schema = scan_schema(task)
        self._tables, self._rows, self._before = list[pa.Table](), list[dict[str, Any]](), 0
        self.concept_sets: dict[tuple[str, ...], int] = {}
        self.problems: list[tuple[int, Problem]] = []
        self.unknown_labels, self.unused = Counter[str](), Counter[str]()

    def add_problem(self, problem: Problem) -> None:
        self.problems.append((self._before + len(self._rows), problem))

    def add(self, checked: _Checked) -> None:
        """Add a sample, or the problems that exclude it."""
        for problem in checked.problems:
            self.add_problem(problem)
        self.unused.update(checked.unused)
        if checked.unknown_label:
            self.unknown_labels[checked.unknown_label] += 1
        if checked.row is None:
            return
        number = self.concept_sets.setdefault(checked.concepts, len(self.concept_sets))
        self._rows.append({**checked.row, "concept_set": number})
        if len(self._rows) == TABLE_ROWS:
            self._flush()

    def table(self) -> pa.Table:
        self._flush()
        return pa.concat_tables(self._tables) if self._tables else self._schema.empty_table()

    def _flush(self) -> None:
        if self._rows:
            self._tables.append(pa.Table.from_pylist(self._rows, self._schema))
            self._before += len(self._rows)
            self._rows = []


def scan_schema(task: Task) -> pa.Schema:
    """Return the columns of a scan."""
    schema = rows_schema(task, ())
    for name, kind in (
        ("concept_set", pa.int32()),
        ("concepts", pa.list_(pa.float32())),
        ("rotated", pa.int8()),
        ("recolored", pa.int8()),
    ):
        schema = schema.append(pa.field(name, kind))
    return schema


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
    """A sample's row of `scan_schema`, None if it is invalid, but for `concept_set`, which `concepts` names.

    unused: extensions of members that are not read; the whole name of a file that belongs to no lesion.
    """

    row: dict[str, Any] | None
    concepts: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    unknown_label: str = ""
    unused: tuple[str, ...] = ()


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
                # Without the text: index.json holds problems also where groups are replaced by hashes.
                return _Checked(None, problems=[Problem(record.lesion_id, "record", where, f"group {wrong}")])
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
        unused = tuple(f".{printable(name)}" for name in sample.members if name not in used)
        if problems:
            return _Checked(None, problems=problems, unused=unused)
        row = to_row(record, [*record.concepts.values()], [photos[view] for view in VIEWS], locations)
        row |= {"rotated": rotated, "recolored": recolored}
        return _Checked(row, tuple(record.concepts), unused=unused)

    def _missing(self, view: str, sample: _Sample) -> str:
        wanted = " or .".join(self.extensions[view])
        found = listed([f".{printable(name)}" for name in sorted(sample.members)], MAX_NAMES)
        if other := self._other_format(view, sample):
            return f"no {view} photo named .{wanted}, but .{printable(other)}; shards hold JPEGs, so convert it"
        allow = ", or allow lesions with one photo by missing_view=mark" if len(self.task.views) > 1 else ""
        return f"no {view} photo named .{wanted} among {found}; name its extension by {view}=EXTENSION{allow}"

    def _other_format(self, view: str, sample: _Sample) -> str | None:
        """Return the extension of a photo of a view in another format: with the same name but another suffix."""
        names = {name.rpartition(".")[0] for name in self.extensions[view]}
        return next((name for name in sample.members if is_photo(name) and name.rpartition(".")[0] in names), None)
