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
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from triderm_dist.config import RemoteConfig
from triderm_dist.data.group_hashes import GroupHashes, GroupHashing, hashes_for
from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.progress import Progress, no_progress
from triderm_dist.data.shards.foreign_folder import list_tars
from triderm_dist.data.shards.format import EXTENSIONS
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.merged_scans import MergedScans
from triderm_dist.data.shards.open import TARS, is_url, open_index
from triderm_dist.data.shards.publish import RemoteFolder, local_name
from triderm_dist.data.shards.scan_tar import MAX_NAMES, TarFile, TarScan, TarScanner
from triderm_dist.data.shards.slice_locks import lock_all, lock_slice
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.data.threads import Distribute, available_cores, map_in_order
from triderm_dist.files import PATIENT_DATA, follow_link, is_writable, write_text
from triderm_dist.runtime.messages import listed, printable
from triderm_dist.runtime.redact import redact, redact_tree, register_secrets
from triderm_dist.schema import DataError, Task
from triderm_dist.tasks import milk10k_task

MAX_LABELS = 30
"""Unknown labels named in the error."""


def index_shards(
    folder: str | os.PathLike[str],
    *,
    task: Task | None = None,
    extensions: Mapping[str, tuple[str, ...]] = EXTENSIONS,
    missing_view: Literal["refuse", "mark"] = "refuse",
    invalid: Literal["refuse", "drop"] = "refuse",
    workers: int | None = None,
    progress: Progress = no_progress,
    note: Callable[[str], object] = lambda text: None,
    hashing: GroupHashing | None = None,
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
    for one.  hashing: write hashes in the place of groups, as triderm pack does; the tars are not changed.
    distribute: has the tars scanned, None for threads of this process.  output: a local folder for the index of tars
    behind a URL, None for the URL itself.

    Raises InvalidLesions with all problems; Busy where another process indexes the folder; DataError for labels that
    name no diagnosis, with their counts, for a folder without plain tars or one written by triderm pack, and for a URL
    that cannot be read or written to.
    """
    where, task = os.fspath(folder), task or milk10k_task()
    target, part = _target(where, output), _part_of(where)
    tars, others = list_tars(where)
    if others:
        note(f"not read, as no plain tar in this folder: {listed([printable(name) for name in others], MAX_NAMES)}")
    if target and not is_writable(target):  # before the scan, which may take hours
        advice = f"the index of {Path(where).absolute().as_uri()} can be elsewhere, by output=FOLDER"
        raise DataError(f"{target}: read-only for this user; {'choose another output folder' if output else advice}")
    with lock_all(part, _refusal(part)):
        scanner = TarScanner(part, task, extensions, missing_view)
        if distribute:
            scans = _distributed(replace(scanner, workers=workers or 1), tars, progress, distribute)
        else:
            scans = _scan(scanner, tars, workers or available_cores(), progress)
        found = MergedScans(task, [*scans])
        _check(redact(where).rstrip("/"), found, invalid, len(tars))
        for text in found.notes():
            note(text)
        hashes = _hash_groups(found, output or local_name(where), hashing, note) if hashing else None
        _write(target or part / "index", found, extensions, hashes)
        if output:
            register_secrets(where, pass_on=True)
            write_text(Path(output) / TARS, f"{redact_tree(where)}\n", PATIENT_DATA)
        if target is None:
            _publish_index(part / "index", where)
        index = read_index(where) if target == Path(where) else open_index(output or where, RemoteConfig())
        shutil.rmtree(part)
    return index


def _hash_groups(
    found: MergedScans, output: str | os.PathLike[str], hashing: GroupHashing, note: Callable[[str], object]
) -> GroupHashes | None:
    """Return the hashes of the groups (see `hashes_for`), after calling `note` with each note on them."""
    hashes, notes = hashes_for(*found.ids_and_groups(), output, hashing, found.task.columns.group)
    if hashes:
        count = len(hashes.groups)
        notes.append(f"index and predictions hold hashes of {count:,} groups; the tars hold their ids")
    for text in notes:
        note(text)
    return hashes


def _write(
    folder: Path, found: MergedScans, extensions: Mapping[str, tuple[str, ...]], hashes: GroupHashes | None
) -> None:
    """Write the index into a folder."""
    about: dict[str, Any] = {"extensions": {view: list(names) for view, names in extensions.items()}}
    problems = found.problems
    if hashes:
        about["groups"] = {"salt": hashes.fingerprint}
        problems = hashes.without_ids(problems)
    write_index(folder, found.tables(hashes), found.shards, found.task, found.concepts, problems, about)


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
    return follow_link(target)


def _publish_index(folder: Path, url: str) -> None:
    """Upload the index, index.json last. Raises DataError if the URL is not written to."""
    try:
        RemoteFolder(url).put_index(folder)
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
    progress: Progress = no_progress,
) -> list[Problem]:
    """Scan every `of`-th tar from the `number`-th on (1 to `of`), for `index_shards` with the same settings to finish.

    For processes on several machines with a file system in common. Returns the problems of these tars. Raises Busy
    where another process scans the slice or the whole folder, DataError as `index_shards`.
    """
    where = os.fspath(folder)
    tars, part = list_tars(where)[0][number - 1 :: of], _part_of(where)
    scanner = TarScanner(part, task or milk10k_task(), extensions, missing_view)
    with lock_slice(part, number, of, _refusal(part)):
        scans = [*_scan(scanner, tars, workers or available_cores(), progress)]
    return [problem for scan in scans for _, problem in scan.problems]


def _part_of(folder: str) -> Path:
    return Path(f"{os.path.abspath(local_name(folder))}.index.part")


def _refusal(part: Path) -> str:
    return f"{part}: another process is indexing these tars; wait for it or end it"


def _scan(scanner: TarScanner, tars: Sequence[TarFile], workers: int, progress: Progress) -> Iterator[TarScan]:
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
                progress(done, total)

        found = scanner.scan(tar, advance)
        advance(tar.bytes)
        return found

    for _, found in map_in_order(scan, tars, at_once):
        yield found


def _distributed(
    scanner: TarScanner,
    tars: Sequence[TarFile],
    progress: Progress,
    distribute: Distribute,
) -> Iterator[TarScan]:
    """Yield the scans of tars in order, after `distribute` has had those scanned that no earlier scan knows."""
    missing = {tar.name: tar for tar, scan in map_in_order(scanner.known, tars, available_cores()) if scan is None}
    total = sum(tar.bytes for tar in tars)
    done = total - sum(tar.bytes for tar in missing.values())
    for name in distribute(functools.partial(_scan_piece, scanner), missing.items()):
        done += missing[name].bytes
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


def _check(folder: str, found: MergedScans, invalid: str, tars: int) -> None:
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
        raise InvalidLesions(problems, found.lesions)
    if not found.shards:
        why = f"{len(problems)} problems, the first: {problems[0]}" if problems else "; ".join(found.unread())
        raise DataError(f"{folder}: no valid lesion in {tars} tars; {why}")
