"""Index WebDataset shards written by other programs, in one scan; the tars are not changed.

Supported: plain .tar files (GNU, pax or ustar) whose consecutive members share a key, as `webdataset` groups them, in
any order; one JPEG per view, recognized by its extension; `.json` with what `record.parse_record` reads; `.cls` with a
label.

Every tar is scanned on its own (`scan_tar`), and until the index is written, FOLDER.index.part holds what was found, so
that a scan resumes where it was interrupted, and several processes can each scan a slice of the tars (`index_slice`),
or tasks on a cluster one tar each (`Distribute`).

The folder may be one behind a URL. A tar is fetched for the time of its scan, into the .part folder, which lies in the
working folder then, and the index is uploaded, or written into a local folder with the URL of the tars (`open.TARS`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from triderm_dist.config import RemoteConfig
from triderm_dist.data.group_hashes import GroupHashes, hashes_for
from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.milk10k import CONCEPTS
from triderm_dist.data.shards.format import (
    EXTENSIONS,
    INDEX,
    SAMPLES,
    SHARD_NAME_RULE,
    is_shard_name,
    rows_schema,
    to_array,
)
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.open import TARS, is_url, open_index
from triderm_dist.data.shards.publish import RemoteFolder, local_name
from triderm_dist.data.shards.scan_tar import TarFile, TarScan, TarScanner, some
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.data.threads import Distribute, available_cores, map_in_order
from triderm_dist.files import PATIENT_DATA, exclusive_lock, write_text
from triderm_dist.runtime.redact import redact, redact_tree, remember
from triderm_dist.schema import UNLABELED, ConfigError, DataError, Task, printable
from triderm_dist.tasks import TASK_FILE, load_task, milk10k_task

MAX_LABELS = 30
"""Unknown labels named in the error."""

LISTED_AT_ONCE = 16
"""Files of a server that gives a list of links of which the size is asked for at the same time."""

_OTHER_TAR = re.compile(r"\.tar\..+|\.(tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


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
    distribute: Distribute | None = None,
    output: str | os.PathLike[str] | None = None,
) -> ShardIndex:
    """Write index.json and samples.parquet into a folder of tars, or one behind a URL, and return the index.

    Every record is checked and every photo decoded. The K concepts are those of the first sample that has any; where
    none has, those that the task names, with all scores missing. `note` is called with each tolerated deviation,
    `progress` with (bytes scanned, bytes in all). Tars that an interrupted scan, one that refused the folder, or
    `index_slice` has scanned with these settings are not scanned again unless they have changed.

    task: gives labels, fields and views their meaning; None takes MILK10k's. A number is a label like any other word,
    since its meaning is not known.  workers: threads, None for one per core; with `distribute` those of each task, None
    for one.  hash_groups: write hashes in the place of groups, as triderm pack does; the tars are not changed.  salt,
    asked: see `hashes_for`.  distribute: has the tars scanned, None for threads of this process.  output: a local
    folder for the index of tars behind a URL, None for the URL itself.

    Raises InvalidLesions with all problems; Busy where another process indexes the folder; DataError for labels that
    name no diagnosis, with their counts, for a folder without plain tars or one written by triderm pack, and for a URL
    that cannot be read or written to.
    """
    where, task = os.fspath(folder), task or milk10k_task()
    shown, target = redact(where).rstrip("/"), _target(where, output)
    (tars, others), part = _tars(where), _part_of(where)
    if others:
        note(f"not read, as no plain tar in this folder: {some([printable(name) for name in others])}")
    with exclusive_lock(part / "lock", _refusal(part)), ExitStack() as stack:
        for lock in sorted(part.glob("slice-*.lock")):
            stack.enter_context(exclusive_lock(lock, _refusal(part)))
        scanner = TarScanner(part, task, extensions, missing_view)
        if distribute:
            scans = [*_distributed(replace(scanner, workers=workers or 1), tars, progress, distribute)]
        else:
            scans = [*_scan(scanner, tars, workers or available_cores(), progress)]
        found = _Merged(task, scans)
        _check(shown, found, invalid, len(tars))
        for text in found.notes():
            note(text)
        about: dict[str, Any] = {"extensions": {view: list(names) for view, names in extensions.items()}}
        problems, hashes = found.problems, None
        if hash_groups:
            hashes, notes = hashes_for(
                *found.ids_and_groups(), output or local_name(where), task.columns.group, salt, asked
            )
            if hashes:
                about["groups"] = {"salt": hashes.fingerprint}
                problems = hashes.without_ids(problems)
                count = len(hashes.groups)
                notes.append(f"index and predictions hold hashes of {count:,} groups; the tars hold their ids")
            for text in notes:
                note(text)
        write_index(target or part / "index", found.tables(hashes), found.shards, task, found.concepts, problems, about)
        if output:
            remember(where, pass_on=True)
            write_text(Path(output) / TARS, f"{redact_tree(where)}\n", PATIENT_DATA)
        if target is None:
            _publish_index(part / "index", where)
        index = read_index(where) if target == Path(where) else open_index(output or where, RemoteConfig())
        shutil.rmtree(part)
    return index


def _target(where: str, output: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder for the index, None for the URL of the tars. Raises DataError if `output` is no choice."""
    if output is None:
        return None if is_url(where) else Path(where)
    if not is_url(where):
        at = Path(where).absolute().as_uri()
        raise DataError(f"output={output}: the index of a folder is written into it; for another place give {at}")
    if is_url(output):
        raise DataError(
            f"output={redact(os.fspath(output))}: not a local folder; leave out output= to write to the URL"
        )
    target = Path(output)
    if target.exists() and not (target / TARS).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists and is not an index of tars behind a URL; choose another output folder")
    return target


def _publish_index(folder: Path, url: str) -> None:
    """Upload the index, index.json last. Raises DataError if the URL is not written to."""
    try:
        for name in (SAMPLES, INDEX):
            RemoteFolder(url).put(folder / name, name)
    except OSError as error:
        raise DataError(
            f"{error.filename}: {error.strerror}; run the same command with output=FOLDER for an index in a local "
            "folder, which scans no tar again"
        ) from None


def index_slice(
    folder: str | os.PathLike[str],
    number: int,
    of: int,
    *,
    task: Task | None = None,
    extensions: Mapping[str, tuple[str, ...]] = EXTENSIONS,
    missing_view: Literal["refuse", "mark"] = "refuse",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Scan every `of`-th tar from the `number`-th on (1 to `of`), for `index_shards` with the same settings to finish.

    For processes on several machines with a file system in common. Returns the problems of these tars. Raises Busy
    where another process scans the slice or the whole folder, DataError as `index_shards`.
    """
    where = os.fspath(folder)
    tars, part = _tars(where)[0][number - 1 :: of], _part_of(where)
    scanner = TarScanner(part, task or milk10k_task(), extensions, missing_view)
    with ExitStack() as stack:
        with exclusive_lock(part / "lock", _refusal(part)):  # `index_shards` holds it, and waits for the slice's own
            stack.enter_context(exclusive_lock(part / f"slice-{number}-of-{of}.lock", _refusal(part)))
        scans = [*_scan(scanner, tars, workers or available_cores(), progress)]
    return [problem for scan in scans for _, problem in scan.problems]


def folder_task(folder: str) -> Task | None:
    """Return the task of the task.yaml in a folder or behind its URL, None if there is none.

    Raises ConfigError for a bad one, DataError for a URL that cannot be read.
    """
    if not is_url(folder):
        own = Path(folder) / TASK_FILE
        return load_task(own) if own.is_file() else None
    try:
        content = RemoteFolder(folder).read(TASK_FILE)
    except OSError as error:
        raise _unreadable(error) from None
    if content is None:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / TASK_FILE
        path.write_bytes(content)
        try:
            return load_task(path)
        except ConfigError as error:
            raise ConfigError(str(error).replace(temporary, redact(folder).rstrip("/"))) from None


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename}: {error.strerror}; check the address and the credentials")


def _part_of(folder: str) -> Path:
    return Path(f"{os.path.abspath(local_name(folder))}.index.part")


def _refusal(part: Path) -> str:
    return f"{part}: another process is indexing these tars; wait for it or end it"


def _scan(
    scanner: TarScanner, tars: Sequence[TarFile], workers: int, progress: Callable[[int, int], None] | None
) -> Iterator[TarScan]:
    """Yield the scans of tars in order. Tars are scanned side by side, and the samples of a tar where there are fewer
    tars than threads.
    """
    at_once = max(1, min(workers, len(tars)))
    scanner = replace(scanner, workers=max(1, workers // at_once))
    total, done, lock = sum(tar.bytes for tar in tars), 0, threading.Lock()
    if any(is_url(tar.folder) for tar in tars):
        at_once *= 2  # one is fetched while another is scanned

    def scan(tar: TarFile) -> TarScan:
        own = 0

        def advance(position: int) -> None:
            nonlocal own, done
            with lock:
                done, own = done + position - own, position
                if progress:
                    progress(done, total)

        found = scanner.scan(tar, advance)
        advance(tar.bytes)
        return found

    for _, found in map_in_order(scan, tars, at_once):
        yield found


def _distributed(
    scanner: TarScanner,
    tars: Sequence[TarFile],
    progress: Callable[[int, int], None] | None,
    distribute: Distribute,
) -> Iterator[TarScan]:
    """Yield the scans of tars in order, after `distribute` has had those scanned that no earlier scan knows."""
    missing = {tar.name: tar for tar, scan in map_in_order(scanner.known, tars, available_cores()) if scan is None}
    total = sum(tar.bytes for tar in tars)
    done = total - sum(tar.bytes for tar in missing.values())
    for name in distribute(functools.partial(_scan_piece, scanner), missing.items()):
        done += missing[name].bytes
        if progress:
            progress(done, total)
    for tar, scan in map_in_order(scanner.known, tars, available_cores()):
        if scan is None:
            raise DataError(
                f"{scanner.file(tar.name)}: missing, though its task has ended; give a folder, or for a URL a working "
                "folder, that every machine of the cluster sees under this name"
            )
        yield scan


def _scan_piece(scanner: TarScanner, name: str, tar: TarFile) -> None:
    scanner.scan(tar)


def _check(folder: str, found: _Merged, invalid: str, tars: int) -> None:
    """Raise InvalidLesions or DataError where the folder is refused."""
    if found.unknown_labels and (invalid == "refuse" or not found.labeled):
        known = ", ".join(found.task.label_words)
        counts = ", ".join(
            f"{label!r} in {count} lesions" for label, count in found.unknown_labels.most_common(MAX_LABELS)
        )
        raise DataError(
            f"{folder}: labels that name no diagnosis: {counts}; list them in a task.yaml, as words of the "
            f"diagnoses or as missing_words (no label), and give task=FILE (known are {known})"
        )
    problems = [replace(problem, where=f"{folder}/{problem.where}") for problem in found.problems]
    if problems and invalid == "refuse":
        raise InvalidLesions(problems, found.lesions + len({problem.lesion_id for problem in problems}))
    if not found.shards:
        why = f"{len(problems)} problems, the first: {problems[0]}" if problems else "; ".join(found.unread())
        raise DataError(f"{folder}: no valid lesion in {tars} tars; {why}")


class _Merged:
    """The scans of all tars as one set: a lesion that occurs twice, or has a concept that the set lacks, is left out.

    concepts: those of the task, else of the first sample that has any; where none has, those of the task's reader.
    """

    def __init__(self, task: Task, scans: Sequence[TarScan]) -> None:
        self.task, self.scans = task, scans
        sets = [names for scan in scans for names in scan.concept_sets if names]
        self._scored = bool(sets)
        chosen = task.concept_names or (sets[0] if sets else ())
        self._given, self.concepts = chosen, chosen or (CONCEPTS if task.reader == "milk10k" else ())
        self.unknown_labels = sum((Counter(scan.unknown_labels) for scan in scans), Counter[str]())
        self._unused = sum((Counter(scan.unused) for scan in scans), Counter[str]())
        extra: list[list[tuple[int, Problem]]] = [[] for _ in scans]
        self._keep = self._known_concepts(extra)
        self._drop_doubles(extra)
        self.problems = [
            problem
            for scan, own in zip(scans, extra, strict=True)
            for _, _, problem in sorted(
                [*((row, 0, each) for row, each in scan.problems), *((row, 1, each) for row, each in own)],
                key=lambda entry: entry[:2],
            )
        ]
        kept = [int(keep.sum()) for keep in self._keep]
        self.lesions = sum(kept)
        self.shards = [replace(scan.tar, samples=count) for scan, count in zip(scans, kept, strict=True) if count]
        self._empty = [scan.tar.url for scan, count in zip(scans, kept, strict=True) if not count]
        self.labeled = self._rotated = self._recolored = 0
        for rows in self._tables("label", "rotated", "recolored"):
            self.labeled += int((rows["label"].to_numpy() != UNLABELED).sum())
            self._rotated += int(rows["rotated"].to_numpy().sum())
            self._recolored += int(rows["recolored"].to_numpy().sum())

    def ids_and_groups(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """Return the id and the group of each lesion."""
        rows = pa.concat_tables(self._tables("lesion_id", "group"))
        return rows["lesion_id"], rows["group"]

    def tables(self, hashes: GroupHashes | None) -> Iterator[pa.Table]:
        """Yield the rows of each tar with a lesion, as `write_index` takes them."""
        schema = rows_schema(len(self.concepts), len(self.task.fields), bool(self.task.fine))
        shard = 0
        for scan, rows in zip(self.scans, self._tables(), strict=True):
            if not len(rows):
                continue
            columns = {name: rows[name] for name in schema.names if name != "concepts"}
            columns["shard"] = pa.array(np.full(len(rows), shard, np.int32))
            if hashes:
                columns["group"] = pa.array(map(hashes.of, rows["group"].to_pylist()), pa.string())
            if self.concepts:
                scores = scan.scores(rows, self.concepts).ravel()
                columns["concepts"] = pa.FixedSizeListArray.from_arrays(scores, len(self.concepts))
            yield pa.table({name: columns[name] for name in schema.names}).cast(schema)
            shard += 1

    def unread(self) -> Iterator[str]:
        """Yield a line about tars without a lesion, and one about members that are not read."""
        if self._empty:
            yield f"no lesion in {some(self._empty)}; not in the index"
        if self._unused:
            counted = [f"{name} ({count} times)" if count > 1 else name for name, count in self._unused.most_common()]
            yield f"not used, as neither a record nor a photo of a view: {some(counted)}"

    def notes(self) -> Iterator[str]:
        """Yield a line for each tolerated deviation."""
        yield from self.unread()
        if not self._scored and (self._given or self.task.concepts.prefix):
            yield "no sample has concept scores; every score is missing"
        if self._rotated:
            yield (
                f"the EXIF of {self._rotated} photos asks for a rotation, which training ignores; triderm pack would "
                "apply it"
            )
        if self._recolored:
            yield (
                f"{self._recolored} photos have CMYK colors or a color profile other than sRGB, which training "
                "ignores; triderm pack would convert them"
            )
        if not self.labeled:
            yield "no sample has a label; these shards can be predicted, not trained on"
        elif self.labeled < self.lesions:
            yield f"{self.lesions - self.labeled} of {self.lesions} lesions have no label; they are not trained on"

    def _tables(self, *columns: str) -> Iterator[pa.Table]:
        """Yield the rows of each tar that are kept."""
        for scan, keep in zip(self.scans, self._keep, strict=True):
            rows = scan.rows(*columns)
            yield rows if keep.all() else rows.filter(pa.array(keep))

    def _known_concepts(self, extra: list[list[tuple[int, Problem]]]) -> list[np.ndarray]:
        """Return (n,) bool of each tar, whether its lesions have concepts of the set only; add the other problems."""
        keep, of = [], "the task" if self.task.concept_names else "the first lesion"
        for scan, problems in zip(self.scans, extra, strict=True):
            keep.append(np.ones(scan.tar.samples, bool))
            for number, names in enumerate(scan.concept_sets):
                if (unknown := next((name for name in names if name not in self._given), None)) is None:
                    continue
                rows = scan.rows("lesion_id", "concept_set")
                for row in np.flatnonzero(rows["concept_set"].to_numpy() == number).tolist():
                    lesion = rows["lesion_id"][row].as_py()
                    what = f"lesion {lesion} has a concept {unknown!r} that {of} lacks"
                    problems.append((row, Problem(lesion, "record", scan.tar.url, what)))
                    keep[-1][row] = False
        return keep

    def _drop_doubles(self, extra: list[list[tuple[int, Problem]]]) -> None:
        """Leave out lesions that have occurred before; add the problems."""
        ids = pa.chunked_array((rows["lesion_id"].combine_chunks() for rows in self._tables("lesion_id")), pa.string())
        codes = to_array(ids.dictionary_encode().combine_chunks().indices)
        first = np.maximum.accumulate(np.concatenate([[-1], codes]))[:-1] < codes  # numbers come in order
        if first.all():
            return
        starts = np.cumsum([0, *(int(keep.sum()) for keep in self._keep)])
        where = {}
        for at in np.flatnonzero(np.isin(codes, codes[~first])).tolist():
            tar = int(np.searchsorted(starts, at, "right")) - 1
            lesion = ids[at].as_py()
            if first[at]:
                where[lesion] = self.scans[tar].tar.url
                continue
            row = int(np.flatnonzero(self._keep[tar])[at - starts[tar]])
            what = f"lesion {lesion} occurs twice, first in {where[lesion]}"
            extra[tar].append((row, Problem(lesion, "duplicate lesion", self.scans[tar].tar.url, what)))
        ends = starts[1:]
        for keep, begin, end in zip(self._keep, starts, ends, strict=False):
            keep[np.flatnonzero(keep)[~first[begin:end]]] = False


def _tars(folder: str) -> tuple[list[TarFile], list[str]]:
    """Return the tars of a folder or behind its URL, sorted by name, and the names of tars that are not read:
    compressed, partly downloaded, or in folders of the folder. Raises DataError for a folder that is not indexed.
    """
    shown = redact(folder).rstrip("/")
    tars, others, is_packed = (_listed if is_url(folder) else _found)(folder)
    if is_packed:
        raise DataError(f"{shown}: written by triderm pack, which made its index; use the folder as it is")
    for tar in tars:
        if not is_shard_name(tar.name):
            raise DataError(f"{printable(f'{shown}/{tar.name}')}: {SHARD_NAME_RULE}; rename it")
    if not tars:
        first = (
            f"; decompress {others[0]} to a plain tar first, since photos are read at random offsets" if others else ""
        )
        raise DataError(f"{shown}: no *.tar in this folder{first}")
    return sorted(tars, key=lambda tar: tar.name), sorted(others)


def _found(folder: str) -> tuple[list[TarFile], list[str], bool]:
    """Return the tars of a folder, the names of other tars, and whether triderm pack has written it."""
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give the folder that holds the WebDataset tars")
    if _was_packed(path / INDEX):
        return [], [], True
    tars = []
    for each in path.iterdir():
        if _is_tar(each.name):
            if not each.is_file():
                raise DataError(f"{each}: not a file; move it away, or restore the file that it links to")
            status = each.stat()
            tars.append(TarFile(os.path.abspath(path), each.name, status.st_size, status.st_mtime_ns))
    others = [each.name for each in path.iterdir() if _is_other_tar(each.name)]
    return tars, [*others, *(str(each.relative_to(path)) for each in path.glob("*/*.tar"))], False


def _listed(url: str) -> tuple[list[TarFile], list[str], bool]:
    """Return what `_found` does of a folder behind a URL, whose folders are not looked into."""
    remote, shown = RemoteFolder(url), redact(url).rstrip("/")
    try:
        if b'"packed_with"' in (remote.read(INDEX) or b""):
            return [], [], True
        found = remote.list()
        names = [name for name in found if _is_tar(name)]
        unknown = [name for name in names if found[name]["size"] is None]
        found.update((name, info or {}) for name, info in map_in_order(remote.info, unknown, LISTED_AT_ONCE))
    except FileNotFoundError:
        raise DataError(f"{shown}: no such folder, or its server lists no files; give the URL of a folder") from None
    except OSError as error:
        raise _unreadable(error) from None
    tars = []
    for name in names:
        if (size := found[name].get("size")) is None:
            raise DataError(f"{shown}/{name}: the server does not say how many bytes it has; copy the tars to a folder")
        said = hashlib.sha256(repr(sorted(found[name].items())).encode()).digest()
        tars.append(TarFile(url, name, size, int.from_bytes(said[:7])))
    return tars, [name for name in found if _is_other_tar(name)], False


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not _is_hidden(name)


def _is_other_tar(name: str) -> bool:
    return bool(_OTHER_TAR.search(name)) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return name.startswith("._")  # macOS writes ._NAME beside each file on disks of other systems


def _was_packed(index: Path) -> bool:
    """Return whether an index.json, which may be damaged, was written by triderm pack."""
    try:
        return index.is_file() and b'"packed_with"' in index.read_bytes()
    except OSError as error:
        raise DataError(f"{index}: not readable ({error.strerror}); remove it") from None
