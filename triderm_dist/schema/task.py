"""The description of a data set: diagnoses, views, concepts, metadata fields, and how its tables are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from triderm_dist.runtime.messages import did_you_mean, quoted
from triderm_dist.schema.errors import ConfigError
from triderm_dist.schema.mapping import as_mapping, build_dataclass
from triderm_dist.schema.metadata import MetadataField

VIEWS: tuple[str, str] = ("clinical", "dermoscopic")
"""The two photos of a lesion. Every tensor with a view axis uses this order."""

UNLABELED = -1
"""The label of a lesion whose diagnosis is not known."""


@dataclass(frozen=True)
class Diagnosis:
    """One class of a task. malignant: None if unknown. words: its spellings in the tables."""

    name: str
    title: str = ""
    malignant: bool | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """One kind of photo of a task, its name one of `VIEWS`. words: its spellings in the column `TaskColumns.view`."""

    name: str
    title: str = ""
    words: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name in reports and notes."""
        return self.title or self.name


@dataclass(frozen=True)
class ConceptColumns:
    """The columns with concept scores from 0 to 1: those that start with `prefix`, or `names`; by default none.

    words: scores of words, as in {absent: 0, present: 1}.
    """

    prefix: str | None = None
    names: tuple[str, ...] = ()
    words: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskColumns:
    """The names of the columns of a data set's table, matched in any case.

    lesion_id: None takes the photo's name, so that every photo is a lesion.  image: id, file name or path of the photo;
    a mapping of view to column where a row holds a lesion with its photos, by default of the names of the views.
    view: the kind of photo, in tables with one row per photo.  diagnosis: None if each diagnosis has a column of zeros
    and ones, or the table has no labels.
    group: the unit that must not be split over folds, such as the patient; None takes the lesion.
    """

    image: str | Mapping[str, str] = field(default_factory=dict)
    lesion_id: str | None = None
    view: str | None = None
    diagnosis: str | None = None
    group: str | None = None

    def image_of(self, view: str) -> str:
        """Return the column that names a view's photos."""
        return self.image if isinstance(self.image, str) else self.image.get(view, view)


@dataclass(frozen=True)
class FineLabels:
    """Labels finer than the diagnoses, which an auxiliary head may learn (`train.loss.fine_weight`).

    column: of the table.  labels: by diagnosis, its finer labels as the column spells them, in any case; a diagnosis
    may have none. Other texts of the column count as missing.
    """

    column: str
    labels: Mapping[str, tuple[str, ...]] = field(hash=False)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The F finer labels."""
        return tuple(name for names in self.labels.values() for name in names)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name.lower(): number for number, name in enumerate(self.names)}

    def label_of(self, text: str) -> int:
        """Return the number of a finer label, `UNLABELED` for another text."""
        return self._index.get(text.lower(), UNLABELED)

    def diagnosis_of(self, number: int) -> str:
        """Return the diagnosis of a finer label."""
        name = self.names[number]
        return next(diagnosis for diagnosis, names in self.labels.items() if name in names)


@dataclass(frozen=True)
class TableFormat:
    """How a table is stored, where that cannot be seen. encoding: as Python names it, such as `cp1252` for Excel's
    plain CSV; None for UTF-8 or UTF-16.  sheet: of an Excel workbook with several.
    """

    encoding: str | None = None
    sheet: str | None = None


@dataclass(frozen=True)
class ReferenceResult:
    """A published result on a task's data, as text. source: where it was published."""

    who: str
    validation: str = ""
    test: str = ""
    source: str = ""


MISSING_WORDS: tuple[str, ...] = (
    *("na", "n/a", "nan", "none", "null", "unknown", "unk", "missing"),
    *("#n/a", "<na>", "-", "--", "?", "."),
)
"""Words that mean a missing value, in any case, unless a task lists its own. An empty cell always does."""

DECISIONS: tuple[str, ...] = ("argmax", "threshold", "fitted")
SUBMISSIONS: tuple[str, ...] = ("milk10k",)
RESERVED_NAMES: tuple[str, ...] = ("lesion_id", "unlabelled")
"""Columns of tables of predictions, which no diagnosis can be named like."""
_NAME = re.compile(r"[^\s,;/\\'\"]{1,60}")


@dataclass(frozen=True)
class Task:
    """The description of a data set and of how its tables are read: a task.yaml, and the entry `task` of index.json.

    fine: finer labels; None for none.  reader: a name in `data.readers.source.READERS`.  table: how the table is
    stored.  missing_words: in any case;
    replace `MISSING_WORDS`.  decision: how a diagnosis is chosen: the largest probability, each p > 0.5, or thresholds
    fitted on out-of-fold predictions.  reference_note: what to know when comparing with the reference results.
    submission: the format of a challenge's file, None for none.

    Raises ConfigError for a task that contradicts itself.
    """

    name: str
    diagnoses: tuple[Diagnosis, ...]
    columns: TaskColumns = TaskColumns()
    title: str = ""
    views: tuple[View, ...] = (View("clinical"), View("dermoscopic"))
    concepts: ConceptColumns = ConceptColumns()
    fields: tuple[MetadataField, ...] = ()
    fine: FineLabels | None = None
    reader: str = "lesions_csv"
    table: TableFormat = TableFormat()
    missing_words: tuple[str, ...] = MISSING_WORDS
    decision: str = "fitted"
    reference_results: tuple[ReferenceResult, ...] = ()
    reference_note: str = ""
    submission: str | None = None

    def __post_init__(self) -> None:
        if wrong := next(self._contradictions(), None):
            raise ConfigError(wrong)

    @classmethod
    def from_mapping(cls, raw: Any, where: str) -> Task:
        """Build a task from the mapping of a YAML or JSON file. Raises ConfigError, with `where` in front."""
        try:
            return build_dataclass(cls, raw)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_mapping(self) -> dict[str, Any]:
        """Return the mapping, fit for JSON and without defaults, from which `from_mapping` builds an equal task."""
        return as_mapping(self)

    @property
    def diagnosis_names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.diagnoses)

    @property
    def view_names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.views)

    @property
    def field_names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.fields)

    @property
    def row_per_photo(self) -> bool:
        """Whether a row of the table is one of several photos of a lesion."""
        return isinstance(self.columns.image, str) and len(self.views) > 1

    @property
    def concept_names(self) -> tuple[str, ...]:
        """The concepts of a lesion that the task names; none where the table does, by a prefix."""
        return self.per_lesion(self.concepts.names)

    def per_lesion(self, scores: Iterable[str]) -> tuple[str, ...]:
        """Return the names of a lesion's concepts, given those in a row: `view/name` where a row is a photo."""
        names = tuple(scores)
        return tuple(f"{view}/{name}" for view in self.view_names for name in names) if self.row_per_photo else names

    @cached_property
    def label_words(self) -> dict[str, int]:
        """The index of a diagnosis by each of its spellings, in lower case."""
        return {word.lower(): label for label, each in enumerate(self.diagnoses) for word in (each.name, *each.words)}

    def label_of(self, text: str) -> int | None:
        """Return the index of the diagnosis that a text names in any case, None if it names none."""
        # pandas writes a column of integers with gaps as 3.0.
        return self.label_words.get(text.lower(), self.label_words.get(text.lower().removesuffix(".0")))

    def fine_contradiction(self, label: int, fine: int) -> str | None:
        """Say why a lesion cannot have this diagnosis and this finer label, None if it can."""
        if self.fine is None or UNLABELED in (label, fine):
            return None
        diagnosis, parent = self.diagnosis_names[label], self.fine.diagnosis_of(fine)
        if diagnosis == parent:
            return None
        what = f"{self.fine.column} {quoted(self.fine.names[fine])}"
        return f"{what} is a label of {parent}, and the diagnosis is {diagnosis}; correct one"

    def signature(self, concepts: Sequence[str]) -> Signature:
        """Return what a network for this task takes and predicts, with concepts of these names."""
        return Signature(self.diagnosis_names, self.view_names, tuple(concepts), self.fields)

    def matches(self, other: Task) -> bool:
        """Return whether labels, views and metadata values mean the same in both tasks.

        Titles, columns, words, the decision and reference results may differ.
        """
        return self.meaning() == other.meaning()

    def named_other(self, other: Task) -> str:
        """Return how a message about this task names one that does not match it."""
        return "another description of it" if self.name == other.name else f"task {other.name!r}"

    def meaning(self) -> list[Any]:
        """Return, as JSON types, what labels, views and metadata values mean: what networks depend on."""
        return [self.name, [*self.diagnosis_names], [*self.view_names], [each.meaning() for each in self.fields]]

    def _contradictions(self) -> Iterator[str]:
        names, columns = self.diagnosis_names, self.columns
        if not _NAME.fullmatch(self.name):
            yield f"name {self.name!r} must have 1 to 60 characters, no space, comma, slash or quote"
        for name in names:
            if not _NAME.fullmatch(name) or name.lower() in RESERVED_NAMES:
                yield f"diagnosis {name!r}: its name must have 1 to 60 characters, no space, comma, slash or quote"
        if len(names) < 2:
            yield f"diagnoses: a task needs at least 2, got {len(names)}"
        if twice := _twice(
            spelling for each in self.diagnoses for spelling in {each.name.lower(), *_lower(each.words)}
        ):
            yield f"diagnoses: {twice!r} is written twice (names and words, in any case)"
        for view in self.view_names:
            if view not in VIEWS:
                yield f"views: unknown view {view!r}; known are {', '.join(VIEWS)}"
        if not self.views or self.view_names != tuple(view for view in VIEWS if view in self.view_names):
            yield f"views: list one or both of {', '.join(VIEWS)}, in this order"
        if twice := _twice(spelling for each in self.views for spelling in {each.name, *_lower(each.words)}):
            yield f"views: {twice!r} is written twice (names and words, in any case)"
        if self.concepts.prefix and self.concepts.names:
            yield "concepts: write a prefix or names, not both"
        if twice := _twice(_lower(self.concepts.names)):
            yield f"concepts: {twice!r} is written twice"
        if twice := _twice(_lower(self.concepts.words)):
            yield f"concepts.words: {twice!r} is written twice (in any case)"
        if wrong := next((word for word, score in self.concepts.words.items() if not 0 <= score <= 1), None):
            yield f"concepts.words: the score of {wrong!r} is {self.concepts.words[wrong]:g}; write one from 0 to 1"
        if twice := _twice(each.name for each in self.fields) or _twice(each.column.lower() for each in self.fields):
            yield f"fields: the name or column {twice!r} is written twice"
        if self.fine:
            yield from self._fine_contradictions(self.fine)
        for each in self.fields:
            if clash := {*_lower(each.categories), *_lower(each.synonyms)} & {*_lower(self.missing_words)}:
                yield (
                    f"fields: {min(clash)!r} is a category of {each.name} and a missing word; "
                    "list missing_words without it"
                )
        if not isinstance(columns.image, str):
            if columns.image and tuple(columns.image) != self.view_names:
                yield f"columns.image: needs a column for each view: {', '.join(self.view_names)}"
            if columns.view:
                has_many = "has no effect where columns.image has a column for each view; remove one"
                yield f"columns.view: {has_many if columns.image else 'needs columns.image, the column of the photos'}"
        elif len(self.views) > 1 and not columns.view:
            yield "columns.view: name the column with the kind of photo, or give columns.image a column for each view"
        for key, value, known in (
            ("decision", self.decision, DECISIONS),
            ("submission", self.submission, (None, *SUBMISSIONS)),
        ):
            if value not in known:
                yield f"{key}: unknown value {value!r}; known are {', '.join(filter(None, known))}"

    def _fine_contradictions(self, fine: FineLabels) -> Iterator[str]:
        if unknown := next((name for name in fine.labels if name not in self.diagnosis_names), None):
            yield f"fine.labels: {unknown!r} is not a diagnosis; {did_you_mean(unknown, self.diagnosis_names)}"
        if twice := _twice(_lower(fine.names)):
            yield f"fine.labels: {twice!r} is written twice (in any case)"
        if len(fine.names) < 2:
            yield f"fine.labels: at least 2 finer labels are needed, got {len(fine.names)}"
        if clash := {*_lower(fine.names)} & {*_lower(self.missing_words)}:
            yield f"fine.labels: {min(clash)!r} is a missing word; list missing_words without it"


@dataclass(frozen=True)
class Signature:
    """What a network takes and predicts: the names of C diagnoses, the task's views, K concepts, M metadata fields.

    views: one or both of `VIEWS`. The columns of every tensor with an axis C, K or M are in the order of these names.
    """

    diagnoses: tuple[str, ...]
    views: tuple[str, ...]
    concepts: tuple[str, ...]
    fields: tuple[MetadataField, ...]

    @property
    def field_names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.fields)

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the task has of clinical, dermoscopic, concepts and metadata, as `models.NAME.use` names it."""
        return (*self.views, *(["concepts"] if self.concepts else []), *(["metadata"] if self.fields else []))


def _lower(words: Iterable[str]) -> list[str]:
    return [word.lower() for word in words]


def _twice(words: Iterable[str]) -> str | None:
    """Return the first word that occurs twice, None if there is none."""
    seen: set[str] = set()
    return next((word for word in words if word in seen or seen.add(word)), None)  # type: ignore[func-returns-value]
