"""The union of a packed set with extra sets, whose lesions join its training only.

Rows of the union are those of the main set, then those of each extra set. An extra set may belong to another task: its
diagnoses are mapped to those of the main set's task, its views, concepts, fields and categories are matched by name.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from triderm_dist.config import ExtraSetConfig
from triderm_dist.data.augment import LesionRng, to_device
from triderm_dist.data.lesions import LesionInputs, one_hot
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.threads import Decoders
from triderm_dist.data.view_source import Fetched, ViewSource
from triderm_dist.runtime.messages import did_you_mean
from triderm_dist.schema import UNLABELED, VIEWS, Batch, ConfigError, MetadataField, Task

MAX_NAMED_GROUPS = 5
"""Groups that a note lists by name."""


@dataclass(frozen=True, eq=False)
class ExtraSet:
    """A packed set in the terms of the main set's task, with C diagnoses, K concepts and M fields.

    labels: (N,) int64, `UNLABELED` for lesions that do not join: without a label, mapped to null, or dropped.
    class_mask: (C,) bool, the diagnoses that the set distinguishes: those that its map names.  weight: of the loss of
    its lesions.  views: (2,) bool, those of `VIEWS` that both tasks have.  concepts: (K,) the set's own column of each
    concept, -1 if it has none.  metadata: (N, M), NaN where missing.  notes: how it was matched, one line each.
    """

    name: str
    index: ShardIndex
    labels: np.ndarray
    class_mask: np.ndarray
    weight: float
    views: np.ndarray
    concepts: np.ndarray
    metadata: np.ndarray
    notes: tuple[str, ...]

    @property
    def rows(self) -> np.ndarray:
        """The rows (n,) of the lesions that join."""
        return np.flatnonzero(self.labels != UNLABELED)

    def json(self) -> dict[str, object]:
        """Return what fold.json records of the set."""
        names = {"task": self.name, "fingerprint": self.index.fingerprint}
        return {**names, "lesions": len(self.rows), "weight": self.weight}

    def without(self, rows: np.ndarray) -> ExtraSet:
        """Return the set without the lesions in these rows."""
        labels = self.labels.copy()
        labels[rows] = UNLABELED
        return replace(self, labels=labels)

    def inputs(self, rows: np.ndarray) -> LesionInputs:
        """Return the lesions in these rows (B,), as a network of the main set takes them; ids are `NAME/ID`."""
        own = self.index.inputs(rows)
        concepts = np.full((len(rows), len(self.concepts)), np.nan, np.float32)
        has = self.concepts >= 0
        concepts[:, has] = own.concepts[:, self.concepts[has]]
        return LesionInputs(
            [f"{self.name}/{lesion}" for lesion in own.lesion_ids], own.view_present & self.views, concepts,
            self.metadata[rows], self.labels[rows], np.broadcast_to(self.class_mask, (len(rows), len(self.class_mask))),
            np.full(len(rows), self.weight, np.float32),
        )  # fmt: skip


def match_extra_set(config: ExtraSetConfig, index: ShardIndex, main: ShardIndex, where: str) -> ExtraSet:
    """Match a packed set with the main one. where: the setting, for messages, as `data.extra.0`.

    Raises ConfigError for the main set itself, a map with an unknown diagnosis, without one that lesions have, or to
    fewer than two diagnoses, for a finer label of another diagnosis, and if no lesion is left.
    """
    if index.fingerprint == main.fingerprint:
        raise ConfigError(f"{where}.shards: {config.shards} is the training set itself; remove it")
    labels, class_mask = map_labels(config.map, index, main.diagnoses, where)
    views = np.array([view in index.task.view_names and view in main.task.view_names for view in VIEWS])
    mapped = int((labels != UNLABELED).sum())
    labels = np.where(((index.sizes > 0) & views).any(1), labels, UNLABELED)
    extra = ExtraSet(
        index.task.name, index, labels, class_mask, config.weight, views,
        np.array([index.concepts.index(name) if name in index.concepts else -1 for name in main.concepts], np.int64),
        *_match_fields(index, main),
    )  # fmt: skip
    if not len(extra.rows):
        why = "no photo of them shows a view of the training set's task" if mapped else "the map leaves none of them"
        raise ConfigError(f"{where}: none of its {len(index):,} lesions can join the training: {why}")
    notes = (*extra.notes, *_match_fine(config.map, index.task, main.task, where), *_note_on_groups(extra, main))
    return replace(extra, notes=notes)


class LesionUnion:
    """The main set and extra sets as one `Lesions`."""

    def __init__(self, main: ShardIndex, extra: Sequence[ExtraSet]) -> None:
        self.main, self.extra = main, tuple(extra)
        self._starts = np.cumsum([0, len(main), *(len(each.index) for each in extra)])

    @cached_property
    def _fine(self) -> list[np.ndarray | None]:
        """The finer labels (n, F) of each extra set, of those that the main set's task has too; None: it has none."""
        fine = self.main.task.fine
        if fine is None:
            return [None] * len(self.extra)
        found = list[np.ndarray | None]()
        for each in self.extra:
            own = each.index.task.fine
            numbers = [fine.label_of(name) for name in own.names] if own else []
            known = np.array([*numbers, UNLABELED], np.int64)  # the last entry is that of UNLABELED
            found.append(one_hot(known[each.index.fine], fine.names))
        return found

    @cached_property
    def labels(self) -> np.ndarray:
        return np.concatenate([self.main.labels, *(each.labels for each in self.extra)])

    @cached_property
    def shard(self) -> np.ndarray:
        indexes = [self.main, *(each.index for each in self.extra)]
        first = np.cumsum([0, *(len(index.shards) for index in indexes)])
        return np.concatenate([index.shard + start for index, start in zip(indexes, first, strict=False)])

    def extra_rows(self, views: Sequence[str]) -> np.ndarray:
        """Return the rows (n,) of the extra sets' lesions that join the training of a network that uses these views."""
        used = [VIEWS.index(view) for view in views]
        rows = []
        for each, start in zip(self.extra, self._starts[1:], strict=False):
            own = each.rows
            if used:
                own = own[((each.index.sizes[own] > 0) & each.views)[:, used].any(1)]
            rows.append(own + start)
        return np.concatenate(rows)

    def split(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (number of the set, positions (n,) in `rows`, rows (n,) of that set), for sets with a row in `rows`."""
        number = np.searchsorted(self._starts, rows, "right") - 1
        for each in np.unique(number):
            positions = np.flatnonzero(number == each)
            yield int(each), positions, rows[positions] - self._starts[each]

    def inputs(self, rows: np.ndarray) -> LesionInputs:
        parts = [(positions, self._inputs(number, own)) for number, positions, own in self.split(rows)]
        order = np.argsort(np.concatenate([positions for positions, _ in parts]))
        names = [name for _, part in parts for name in part.lesion_ids]
        columns = ["view_present", "concepts", "metadata", "labels", "class_mask", "weights"]
        if self.main.task.fine:
            columns.append("fine")
        joined = {name: np.concatenate([getattr(part, name) for _, part in parts])[order] for name in columns}
        return LesionInputs([names[at] for at in order], **joined)

    def _inputs(self, number: int, rows: np.ndarray) -> LesionInputs:
        if number:
            fine = self._fine[number - 1]
            inputs = self.extra[number - 1].inputs(rows)
            return inputs if fine is None else replace(inputs, fine=fine[rows])
        full = np.ones((len(rows), len(self.main.diagnoses)), bool)
        return replace(self.main.inputs(rows), class_mask=full, weights=np.ones(len(rows), np.float32))


class UnionSource(ViewSource):
    """The views of a union's lesions, read by the source of each set; zeros for a view that a set's task lacks.

    sources: of the main set, then of each extra set, all of the same kind and size.  views: of the main set's task.
    """

    def __init__(self, union: LesionUnion, sources: Sequence[ViewSource], views: Sequence[str]) -> None:
        self.union, self.sources, self.views = union, tuple(sources), tuple(views)

    @contextlib.contextmanager
    def read_ahead(self, rows: np.ndarray, batch: int) -> Iterator[Callable[[int], None]]:
        with contextlib.ExitStack() as stack:
            marks = []
            for number, positions, own in self.union.split(rows):
                order = np.full(len(rows), -1, np.int64)
                order[positions] = own
                marks.append(stack.enter_context(self.sources[number].read_ahead(order, batch)))

            def mark_read(steps: int) -> None:
                for mark in marks:
                    mark(steps)

            yield mark_read

    def fetch(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, device: torch.device) -> Fetched:
        parts = [
            _Part(number, positions, self.sources[number].fetch(pool, own, rng and rng.take(positions), device))
            for number, positions, own in self.union.split(rows)
        ]
        return Fetched.join([part.fetched for part in parts], parts)

    def finish(self, fetched: Fetched, device: torch.device, rng: LesionRng | None) -> dict[str, torch.Tensor]:
        parts: list[_Part] = fetched.memory
        read = [
            self.sources[part.number].finish(part.fetched, device, rng and rng.take(part.lesions)) for part in parts
        ]
        if len(parts) == 1 and read[0].keys() == set(self.views):
            return read[0]
        lesions, result = sum(len(part.lesions) for part in parts), {}
        for view in self.views:
            like = next((views[view] for views in read if view in views), next(iter(read[0].values())))
            shape = (lesions, *like.shape[1:])
            layout = torch.channels_last if like.ndim == 4 else torch.contiguous_format
            result[view] = torch.zeros(shape, dtype=like.dtype, device=device).contiguous(memory_format=layout)
            for part, views in zip(parts, read, strict=True):
                if view in views:
                    result[view][to_device(part.lesions, device)] = views[view]
        return result

    def transformed(self, batch: Batch, rows: np.ndarray, transform: int) -> Batch:
        raise TypeError("lesions of extra sets are trained on, never predicted")


@dataclass(frozen=True)
class _Part:
    """The part of a batch that comes from one set. lesions: positions (n,) in the batch."""

    number: int
    lesions: np.ndarray
    fetched: Fetched = field(repr=False)


def map_labels(
    mapping: dict[str, str | None], index: ShardIndex, known: Sequence[str], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels (N,) of an extra set in the diagnoses `known` of the main set, and the class mask (C,).

    Raises ConfigError for a map that names an unknown diagnosis, lacks one, or keeps fewer than two.
    """
    own = index.diagnoses
    table = np.full(len(own) + 1, UNLABELED, np.int64)  # the last entry is that of UNLABELED
    for name, target in mapping.items():
        if name not in own:
            raise ConfigError(f"{where}.map: {_unknown(name, own)} of the set's task {index.task.name!r}")
        if target is not None and target not in known:
            raise ConfigError(f"{where}.map.{name}: {_unknown(target, known)} of the training set's task")
        table[own.index(name)] = UNLABELED if target is None else known.index(target)
    counts = index.counts()
    if missing := [f"{name} ({counts[name]:,} lesions)" for name in own if name not in mapping and counts[name]]:
        raise ConfigError(
            f"{where}.map: lacks {', '.join(missing)}; map each to a diagnosis of the training set's task, or to null "
            "to leave its lesions out"
        )
    class_mask = np.isin(known, [target for target in mapping.values() if target is not None])
    if class_mask.sum() < 2:
        raise ConfigError(
            f"{where}.map: name at least two diagnoses of the training set's task, which the set distinguishes"
        )
    return table[index.labels], class_mask


def _match_fine(mapping: dict[str, str | None], task: Task, main: Task, where: str) -> Iterator[str]:
    """Yield a note if a set with finer labels lacks some of the main task's, which have no mask.

    Raises ConfigError for a finer label of both tasks whose diagnosis is mapped to another than it has in the main one.
    """
    if task.fine is None or main.fine is None:
        return
    common = set[str]()
    for diagnosis, names in task.fine.labels.items():
        for name in names:
            number, target = main.fine.label_of(name), mapping.get(diagnosis)
            if number == UNLABELED or target is None:
                continue
            common.add(main.fine.names[number])
            if target != (parent := main.fine.diagnosis_of(number)):
                raise ConfigError(
                    f"{where}.map.{diagnosis}: its finer label {name!r} is one of {parent} in the training set's task, "
                    f"and the map says {target}; correct one"
                )
    if common and (lacking := [name for name in main.fine.names if name not in common]):
        yield (
            f"its lesions have no finer label {', '.join(lacking)}; the loss of finer labels has no mask and takes "
            "that as true: if the set only does not state them, pack it with a task.yaml without fine"
        )


def _unknown(name: str, known: Sequence[str]) -> str:
    return f"{name!r} is not a diagnosis ({did_you_mean(name, known)})"


def _match_fields(index: ShardIndex, main: ShardIndex) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the metadata (N, M) in the main set's fields, and notes on what has no counterpart."""
    metadata = np.full((len(index), len(main.task.fields)), np.nan, np.float32)
    notes = []
    for column, target in enumerate(main.task.fields):
        if target.name not in index.task.field_names:
            continue
        at = index.task.field_names.index(target.name)
        metadata[:, column], note = _convert(index.metadata[:, at], index.task.fields[at], target)
        notes += [note] if note else []
    absent = [name for name in main.task.field_names if name not in index.task.field_names]
    if absent:
        notes.append(f"{', '.join(absent)}: no such field, so missing")
    return metadata, tuple(notes)


def _convert(values: np.ndarray, own: MetadataField, target: MetadataField) -> tuple[np.ndarray, str | None]:
    """Return the values (N,) of a field as values of the main set's field, NaN where it has no such value."""
    if own.is_number != target.is_number or (own.is_number and own.unit and target.unit and own.unit != target.unit):
        kinds = [f"{each.kind} {each.unit}".strip() if each.is_number else each.kind for each in (own, target)]
        note = f"{target.name}: {kinds[0]} here, {kinds[1]} in the training set, so missing"
        return np.full(len(values), np.nan), note
    if own.is_number:
        inside = (values >= target.low) & (values <= target.high)
        outside = int((~inside & ~np.isnan(values)).sum())
        note = f"{target.name}: {outside:,} values outside {target.low:g} to {target.high:g}, so missing"
        return np.where(inside, values, np.nan), note if outside else None
    spelled = {_plain(name): float(at) for at, name in enumerate(target.categories)}
    spelled |= {_plain(other): spelled[_plain(name)] for other, name in target.synonyms.items()}
    table = np.array([spelled.get(_plain(name), math.nan) for name in own.categories] + [math.nan])
    codes = np.where(np.isnan(values), len(own.categories), values).astype(np.int64)
    unknown = [name for at, name in enumerate(own.categories) if np.isnan(table[at]) and (codes == at).any()]
    lost = int((np.isnan(table[codes]) & ~np.isnan(values)).sum())
    note = f"{target.name}: no such category as {', '.join(unknown)} in the training set, so missing ({lost:,} lesions)"
    return table[codes], note if lost else None


def _note_on_groups(extra: ExtraSet, main: ShardIndex) -> Iterator[str]:
    """Yield a note if a group has an id of the main set, so that the sets may have patients in common; also where that
    cannot be seen, since their groups are hashes under different salts.
    """
    if extra.index.group_salt != main.group_salt:
        if extra.index.has_groups and main.has_groups:
            yield (
                "its groups and those of the training set are not hashes under the same salt, so that patients in "
                f"common are not found; pack it with salt={main.folder}"
            )
        return
    if shared := sorted(set(extra.index.groups[extra.rows].tolist()).intersection(main.groups)):
        named = ", ".join(shared[:MAX_NAMED_GROUPS]) + (", ..." if len(shared) > MAX_NAMED_GROUPS else "")
        yield (
            f"{len(shared):,} groups have the id of a group of the training set ({named}); if they are the same "
            "patients, pack the set without them"
        )


def _plain(name: str) -> str:
    """Return the name of a category without differences in case and in blanks, underscores and hyphens."""
    return re.sub(r"[\s_-]+", " ", name.lower())
