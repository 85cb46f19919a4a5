"""Read and check the index of a packed set.

A packed set is a folder of plain WebDataset tars with an index:

    *.tar              LESION.clinical.jpg, LESION.dermoscopic.jpg, LESION.json; any WebDataset reader reads it
    index.json         format and version, the task, names of concepts and diagnoses, size and checksum of each shard,
                       counts of photo sizes, lesions that share a photo
    samples.parquet    one row per lesion: ids, label, scores, and the offsets of its photos in the shard

`samples.parquet` gives random access without opening a tar: `pread(shard, size, offset)` returns a JPEG. The index
scales to 10 million lesions: a column is read at its first use, or mapped (see `columns`), and no Python object is
built per row.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from triderm_dist.data.folds import assign_folds, decimal_order
from triderm_dist.data.lesions import LesionInputs, one_hot
from triderm_dist.data.problems import Problem
from triderm_dist.data.shards.columns import (
    MAPPED_FROM,
    Columns,
    ParquetColumns,
    array_columns,
    content_key,
    share_columns,
    unreadable,
)
from triderm_dist.data.shards.format import (
    EXTENSIONS,
    FORMAT,
    INDEX,
    SAMPLES,
    VERSION,
    ShardFile,
    Text,
    samples_schema,
)
from triderm_dist.data.shards.index_schema import IndexContent, check_content, read_index_json
from triderm_dist.data.threads import available_cores, map_in_order
from triderm_dist.files import file_sha256, json_text, why_no_folder
from triderm_dist.schema import UNLABELED, VIEWS, ConfigError, DataError, Signature, Task
from triderm_dist.tasks import milk10k_task, recorded_task

if TYPE_CHECKING:
    from triderm_dist.data.shards.cache import Cache

MAX_NAMED_PAIRS = 5
"""Pairs of lesions that a note lists by name."""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The index of a packed set: N lesions in the order of the tars, K concepts, M metadata fields.

    problems: why lesions were left out.  extensions: file extensions of a view's photo in the tars.  fingerprint:
    SHA-256 of what results depend on: index.json, which holds the checksums of all other files, and of its task the
    meaning (`Task.meaning`).  columns: those of samples.parquet, each read or mapped at its first use.
    """

    folder: Path
    task: Task
    concepts: tuple[str, ...]
    stored_concepts: tuple[str, ...]
    """The same concepts in the order of samples.parquet."""
    stored_fields: tuple[str, ...]
    """The metadata fields that samples.parquet holds, in its order."""
    shards: tuple[ShardFile, ...]
    rows: int
    columns: Columns
    problems: tuple[Problem, ...]
    fingerprint: str
    photo_sizes: Mapping[tuple[int, int], int]
    """Number of photos of each (width, height)."""
    shared_photos: tuple[tuple[str, str], ...]
    """Pairs of labeled lesions of different groups that share a photo: their folds may differ."""
    extensions: Mapping[str, tuple[str, ...]]
    label_words: Mapping[str, int]
    """The labels of the samples' own records, in lower case, as indices into the task's diagnoses."""
    converted: Mapping[str, int]
    """The number of photos by what packing converted in them."""
    short_side: int | None
    """The short side in pixels to which packing reduced larger photos; None: none were, as far as is known."""
    group_salt: str | None
    """The fingerprint of the salt under which groups are hashes (`GroupHashes`); None: they are as in the table."""
    selected: str | None
    """The condition by which its lesions were taken from a larger set; None: all that the tars hold."""
    remote: Cache | None = None
    """The cache through which shards of a URL are read (see `open.open_index`); None: all tars are in `folder`."""
    _folds: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)
    """The folds that were assigned, by their number and seed."""

    def __len__(self) -> int:
        return self.rows

    @property
    def diagnoses(self) -> tuple[str, ...]:
        return self.task.diagnosis_names

    @property
    def signature(self) -> Signature:
        """What a network for this set takes and predicts."""
        return self.task.signature(self.concepts)

    def with_concepts(self, names: Sequence[str]) -> ShardIndex:
        """Return this index with its concepts in another order, such as that of the set of a training."""
        return self if tuple(names) == self.concepts else replace(self, concepts=tuple(names))

    @cached_property
    def lesion_ids(self) -> Text:
        return self.columns.text("lesion_id")

    @cached_property
    def groups(self) -> Text:
        return self.columns.text("group")

    @property
    def has_groups(self) -> bool:
        """Whether lesions have a group other than themselves."""
        return self.group_salt is not None or not self.groups.equals(self.lesion_ids)

    @property
    def fold_groups(self) -> np.ndarray:
        """The groups by which folds are assigned, (N,) int32, as numbers in the order of their ids; of hashes, of the
        numbers that they have in the order of the lesions, so that folds do not depend on the salt.
        """
        if self.group_salt is None:
            return self.groups.sorted_codes
        numbers = self.groups.codes
        return decimal_order(int(numbers.max(initial=-1)) + 1)[numbers]

    def folds(self, folds: int, seed: int) -> np.ndarray:
        """Return the fold of each lesion (N,), -1 for one without a label. Raises DataError as `assign_folds` does."""
        if (folds, seed) not in self._folds:
            self._folds[folds, seed] = self.columns.folds(
                folds, seed, lambda: assign_folds(self.labels, self.fold_groups, folds, seed)
            )
        return self._folds[folds, seed]

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64, `UNLABELED` where unknown."""
        return self.columns.array("label")

    @cached_property
    def fine(self) -> np.ndarray:
        """(N,) int64 numbers of the task's finer labels, `UNLABELED` where unknown."""
        if self.task.fine is None:
            return np.full(len(self), UNLABELED)
        fine = self.columns.array("fine")
        if fine.min(initial=0) < UNLABELED or fine.max(initial=0) >= len(self.task.fine.names):
            raise DataError(f"{self.folder / SAMPLES}: a finer label is out of range; pack the data again")
        return fine

    @cached_property
    def shard(self) -> np.ndarray:
        """(N,) int32 into `shards`."""
        return self.columns.array("shard")

    @cached_property
    def offsets(self) -> np.ndarray:
        """(N, 2) int64, where the JPEG of each of `VIEWS` begins in its tar."""
        return self.columns.array("offsets")

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32, bytes of the JPEG of each of `VIEWS`, 0 if missing."""
        return self.columns.array("sizes")

    @cached_property
    def concept_scores(self) -> np.ndarray:
        """(N, K) float32, NaN where missing."""
        stored = self._list_column("concepts", len(self.stored_concepts))
        if self.concepts == self.stored_concepts:
            return stored
        return np.ascontiguousarray(stored[:, [self.stored_concepts.index(name) for name in self.concepts]])

    @cached_property
    def metadata(self) -> np.ndarray:
        """(N, M) float32 in the order of the task's fields, NaN where missing, as are fields that the shards lack."""
        stored = self._list_column("metadata", len(self.stored_fields))
        if self.stored_fields == self.task.field_names:
            return stored
        matrix = np.full((len(self), len(self.task.fields)), np.nan, np.float32)
        for column, name in enumerate(self.task.field_names):
            if name in self.stored_fields:
                matrix[:, column] = stored[:, self.stored_fields.index(name)]
        return matrix

    def inputs(self, rows: np.ndarray) -> LesionInputs:
        """Return the lesions in these rows (B,)."""
        return LesionInputs(
            self.lesion_ids[rows].tolist(), self.sizes[rows] > 0, self.concept_scores[rows], self.metadata[rows],
            self.labels[rows], fine=None if self.task.fine is None else one_hot(self.fine[rows], self.task.fine.names),
        )  # fmt: skip

    @property
    def canvas(self) -> tuple[int, int]:
        """The most frequent (width, height), to which the loader fits all other photos; of equally frequent ones the
        largest, then the widest.
        """
        return max(self.photo_sizes, key=lambda size: (self.photo_sizes[size], size[0] * size[1], size))

    @property
    def photos(self) -> int:
        """The number of photos."""
        return sum(self.photo_sizes.values())

    @property
    def bytes(self) -> int:
        """The size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def notes(self) -> list[str]:
        """Return warnings for training on this set, one line each."""
        return [*_note_on_sizes(self), *_note_on_shared(self), *_note_on_fields(self)]

    def flow(self) -> dict[str, dict[str, int]]:
        """Return what packing did with the lesions: those `dropped` by why (each by its first problem), photos
        `converted` by what was converted, and by view the lesions of the set with `missing_photos`.
        """
        kinds = {problem.lesion_id: problem.kind for problem in reversed(self.problems)}
        missing = (self.sizes == 0).sum(axis=0).tolist()
        return {
            "dropped": dict(sorted(Counter(kinds.values()).items())),
            "converted": dict(self.converted),
            "missing_photos": {view: missing[VIEWS.index(view)] for view in self.task.view_names},
        }

    def path(self, shard: int) -> Path:
        return self.folder / self.shards[shard].url

    def counts(self) -> dict[str, int]:
        """Return the number of lesions of each diagnosis."""
        counts = np.bincount(self.labels[self.labels != UNLABELED], minlength=len(self.diagnoses))
        return dict(zip(self.diagnoses, counts.tolist(), strict=True))

    @property
    def unlabeled(self) -> int:
        """The number of lesions without a diagnosis."""
        return int((self.labels == UNLABELED).sum())

    def _list_column(self, name: str, width: int) -> np.ndarray:
        """Return a column of lists, which samples.parquet lacks where they would be empty."""
        return self.columns.array(name) if width else np.empty((len(self), 0), np.float32)


def read_index(
    folder: str | os.PathLike[str],
    verify: bool = False,
    tars: slice = slice(None),
    shared: Path | None = None,
) -> ShardIndex:
    """Read the index of a folder of shards and check it against the sizes of the files.

    verify: also hash every tar; the table of samples, which holds the labels, always is.  tars: those of which the size
    is checked; of others, which need not be there yet, the names.  shared: the folder in which the processes of a node
    share the columns of large sets (see `columns`); None: each process reads them.

    Raises DataError for a folder without an index, another format or version, a shard that is missing or of another
    size, a table of samples whose checksum differs, and, with `verify`, a shard whose checksum does.
    """
    folder = Path(folder)
    path, raw = folder / INDEX, _read_raw(folder)
    content = check_content(raw, path)
    table, task = content.samples.file, _task(raw, path)
    _check_meaning(content, task, path)
    for shard in content.shards[tars]:
        _check_size(folder, shard.file)
    _check_size(folder, table)
    try:
        file = pa.OSFile(str(folder / SAMPLES))
    except OSError as error:
        raise unreadable(folder / SAMPLES, error) from None
    layout = array_columns(len(content.concepts), len(content.metadata_fields), bool(task.fine))
    columns = ParquetColumns(folder / SAMPLES, file, table.samples, layout)
    index = _to_index(folder, content, task, columns, index_fingerprint(path, raw))

    def check_samples() -> None:
        _check_sha256(folder, table)
        _check_rows(index, columns)

    if verify or shared is None or len(index) < MAPPED_FROM:
        check_samples()
    if shared is not None and len(index) >= MAPPED_FROM:
        index = replace(index, columns=share_columns(columns, shared / content_key(path), check_samples))
    if verify:
        verify_shards(index)
    return index


def _read_raw(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's index.json. Raises DataError where it is missing or of another version."""
    if not folder.is_dir():
        raise DataError(f"{folder}: {why_no_folder(folder)}; create it by triderm pack")
    path = folder / INDEX
    if not path.is_file():
        raise DataError(
            f"{folder}: no {INDEX} in this folder; create it by triderm pack, or for other WebDataset shards by "
            "triderm index"
        )
    raw = read_index_json(path)
    if raw.get("format") != FORMAT or raw.get("version") != VERSION:
        found = f"{raw.get('format')!r} version {raw.get('version')!r}"
        raise DataError(
            f"{path}: {found}, this program reads {FORMAT!r} version {VERSION}; pack the data again by triderm pack, "
            "or index other WebDataset shards again by triderm index"
        )
    return raw


def verify_shards(index: ShardIndex) -> None:
    """Hash every shard, on all cores. Raises DataError naming the first whose checksum differs."""
    for _ in map_in_order(lambda shard: _check_sha256(index.folder, shard), index.shards, available_cores()):
        pass


def read_photo_bytes(index: ShardIndex, row: int, view: str, tar: Path | None = None) -> bytes:
    """Return the JPEG of one view of one lesion, empty if the view is missing. tar: its tar, where that is not in the
    folder of the index.
    """
    column = VIEWS.index(view)
    with (tar or index.path(int(index.shard[row]))).open("rb") as file:
        file.seek(int(index.offsets[row, column]))
        return file.read(int(index.sizes[row, column]))


def index_fingerprint(path: Path, raw: Mapping[str, Any]) -> str:
    """Return the `ShardIndex.fingerprint` of an index.json and its content: for MILK10k the hash of the file that
    earlier versions wrote, without a task, so that their finished work stays finished.
    """
    if "task" not in raw:
        return file_sha256(path)
    task, content = recorded_task(raw, str(path)), {key: value for key, value in raw.items() if key != "task"}
    if not task.matches(milk10k_task()):
        content["task"] = task.meaning()
    if task.fine:
        content["fine"] = [*task.fine.names]
    return hashlib.sha256(json_text(content).encode()).hexdigest()


def _task(raw: Mapping[str, Any], path: Path) -> Task:
    try:
        return recorded_task(raw, str(path))
    except ConfigError as error:
        raise DataError(f"{error}; pack the data again") from None


def _check_meaning(content: IndexContent, task: Task, path: Path) -> None:
    """Raise DataError if labels or categories have another meaning in the task."""
    if tuple(content.diagnoses) != task.diagnosis_names:
        raise DataError(f"{path}: its diagnoses are not those of its task {task.name!r}; pack the data again")
    # Written by earlier versions for the fields of plugins.
    for name, values in content.metadata_categories.items():
        known = next((field.categories for field in task.fields if field.name == name), tuple(values))
        if known != tuple(values):
            raise DataError(
                f"{path}: metadata field {name!r} was packed with categories {', '.join(values)}, its task has "
                f"{', '.join(known)}; pack the data again"
            )
    if unknown := next((name for name in content.labels.values() if name not in content.diagnoses), None):
        raise DataError(f"{path}: labels names a diagnosis {unknown!r} that the task lacks; pack the data again")


def _to_index(folder: Path, content: IndexContent, task: Task, columns: ParquetColumns, fingerprint: str) -> ShardIndex:
    """Return the index of a folder from what its index.json holds."""
    concepts = tuple(content.concepts)
    label_words = {word: content.diagnoses.index(name) for word, name in content.labels.items()}
    return ShardIndex(
        folder=folder,
        task=task,
        concepts=concepts,
        stored_concepts=concepts,
        stored_fields=tuple(content.metadata_fields),
        shards=tuple(shard.file for shard in content.shards),
        rows=columns.rows,
        columns=columns,
        problems=tuple(Problem(**problem.model_dump()) for problem in content.problems),
        fingerprint=fingerprint,
        photo_sizes={_size(text): count for text, count in content.photo_sizes.items()},
        shared_photos=tuple((one, other) for one, other in content.shared_photos),
        extensions={view: tuple(content.extensions.get(view, EXTENSIONS[view])) for view in VIEWS},
        label_words=label_words or task.label_words,
        converted=content.converted,
        short_side=content.packed_with.short_side,
        group_salt=content.groups.salt if content.groups else None,
        selected=content.selected,
    )


def _size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


def _check_size(folder: Path, file: ShardFile) -> None:
    path = folder / file.url
    try:
        actual = path.stat().st_size
    except OSError:
        raise DataError(
            f"{path}: missing, but {INDEX} lists it; copy the whole folder or pack the data again"
        ) from None
    if actual != file.bytes:
        raise DataError(f"{path}: {actual} bytes, {INDEX} lists {file.bytes}; copy it again or pack the data again")


def _check_sha256(folder: Path, file: ShardFile) -> None:
    path = folder / file.url
    actual = file_sha256(path)
    if actual != file.sha256:
        raise DataError(
            f"{path}: checksum {actual[:16]}... is not the {str(file.sha256)[:16]}... of {INDEX}: changed or damaged; "
            "copy it again or pack the data again"
        )


def _check_rows(index: ShardIndex, columns: ParquetColumns) -> None:
    """Check that rows, shards and offsets agree, in batches of rows; readers rely on it.

    Raises DataError if they do not.
    """
    path = index.folder / SAMPLES
    shard_bytes = np.array([shard.bytes for shard in index.shards], np.int64)
    lesions, photos = np.zeros(len(index.shards), np.int64), 0
    outside = f"{path}: a shard number, an offset or a label is out of range; pack the data again"
    try:
        file = pq.ParquetFile(columns.file)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from None
    if file.metadata.num_rows != index.rows:
        raise DataError(f"{path}: {file.metadata.num_rows} rows, {INDEX} lists {index.rows}; pack the data again")
    if not file.schema_arrow.equals(
        samples_schema(len(index.stored_concepts), len(index.stored_fields), bool(index.task.fine))
    ):
        raise DataError(f"{path}: its columns are not those of version {VERSION}; pack the data again")
    checked = {each.name: each for each in columns.layout if each.name in ("shard", "label", "offsets", "sizes")}
    for batch in columns.batches([source for each in checked.values() for source in each.sources]):
        shard, label, offsets, sizes = (checked[name].of(batch) for name in ("shard", "label", "offsets", "sizes"))
        if shard.min(initial=0) < 0 or shard.max(initial=0) >= len(shard_bytes):
            raise DataError(outside)
        lesions += np.bincount(shard, minlength=len(shard_bytes))
        wrong = (label < UNLABELED) | (label >= len(index.diagnoses))
        # A sum of offset and size could overflow.
        wrong |= ((offsets < 0) | (sizes < 0) | (offsets > shard_bytes[shard][:, None] - sizes)).any(axis=1)
        photos += int(np.count_nonzero(sizes))
        if wrong.any():
            raise DataError(outside)
    if lesions.tolist() != [shard.samples for shard in index.shards]:
        raise DataError(f"{path}: its rows do not match the counts of {INDEX}; pack the data again")
    if photos != index.photos:
        raise DataError(f"{path}: its {photos} photos do not match the photo_sizes of {INDEX}; pack the data again")


def _note_on_sizes(index: ShardIndex) -> Iterator[str]:
    width, height = index.canvas
    if other := index.photos - index.photo_sizes[index.canvas]:
        yield (
            f"{other:,} of {index.photos:,} photos are not {width}x{height}; each is rotated by 90 degrees if only one "
            "of them is a portrait, scaled to the short side, and cropped or mirrored at both ends to the long side"
        )


def _note_on_shared(index: ShardIndex) -> Iterator[str]:
    if pairs := index.shared_photos:
        named = ", ".join(f"{one} and {other}" for one, other in pairs[:MAX_NAMED_PAIRS])
        more = f", and {len(pairs) - MAX_NAMED_PAIRS} more pairs in {INDEX}" if len(pairs) > MAX_NAMED_PAIRS else ""
        yield (
            f"lesions of different groups share a photo, so it may be in two folds: {named}{more}; give them one "
            f"{index.task.columns.group or 'group'}, or remove one"
        )


def _note_on_fields(index: ShardIndex) -> Iterator[str]:
    for name in index.stored_fields:
        if name not in index.task.field_names:
            yield f"metadata field {name!r} of these shards is not used: their task does not describe it"
