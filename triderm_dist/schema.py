"""The data types shared by all modules: tasks, diagnoses, views, concepts, metadata fields, batches, outputs, errors.

Reads no file and imports nothing heavy. Letters of shapes, used throughout: B lesions in a batch, C diagnoses, K
concepts, M metadata fields, L tokens, D width, H x W pixels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from triderm_dist.runtime.messages import did_you_mean, nearest, printable, quoted
from triderm_dist.runtime.redact import redact

if TYPE_CHECKING:
    import numpy as np
    import torch

DIAGNOSES: tuple[str, ...] = (
    "AKIEC",
    "BCC",
    "BEN_OTH",
    "BKL",
    "DF",
    "INF",
    "MAL_OTH",
    "MEL",
    "NV",
    "SCCKA",
    "VASC",
)
"""The 11 diagnoses of MILK10k, in the order of the official ground truth and of the submission."""

VIEWS: tuple[str, str] = ("clinical", "dermoscopic")
"""The two photos of a lesion. Every tensor with a view axis uses this order."""

UNLABELED = -1
"""The label of a lesion whose diagnosis is not known."""


class InputError(Exception):
    """Invalid input. Its text is one line: what is wrong, where, and what to do. Programs exit with status 2.

    The text may quote a file or a URL: secrets are removed (`redact`), what cannot be printed is escaped, and more than
    `LONGEST_TEXT` characters are cut out of its middle.
    """

    LONGEST_TEXT: ClassVar[int] = 1500

    def __init__(self, text: str) -> None:
        text, longest = printable(redact(text)), self.LONGEST_TEXT
        super().__init__(text if len(text) <= longest else f"{text[: longest * 2 // 3]} ... {text[-longest // 3 :]}")


class Busy(Exception):
    """Another process works on the same files. Its text is one line, as that of InputError; programs exit with 3, since
    the same command works once the other one has ended.
    """


class DataError(InputError):
    """An invalid challenge folder, shard or table; the text names the file and the row or sample."""


class ConfigError(InputError):
    """A setting that is unknown, of the wrong type, or incompatible with another one."""


class CheckpointError(InputError):
    """A weight file that does not belong to the network it is loaded into."""


def check_choice(key: str, value: object, known: Sequence[str]) -> None:
    """Raise ConfigError for a value that is none of the known ones."""
    if value not in known:
        raise ConfigError(f"{key}={value}: {did_you_mean(str(value), known)}")


PLAIN_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
"""A number as tables hold it; Python's float() also takes 3_0, inf and the digits of other scripts."""


@dataclass(frozen=True)
class MetadataField:
    """One field of the patient metadata: its column, its values, and how it is shown.

    A value is one float: the number, or the index of the category; NaN where missing. Networks embed the categories of
    a `category` and of an `ordinal` field alike; the order of an ordinal one matters to tree models and in reports.

    column: name in the tables of the data set.  categories: names in shards and reports, matched in any case.
    synonyms: category by other spellings of it.  low, high: range of a number, both included.  full_scale: the number
    that networks scale to 1, as they scale `low` to 0; None: `high`.  unit: of a number, or the meaning of an ordinal
    field's ends.  title: name in reports; "": from `name`.  cuts: numbers at which the report cuts slices; (): at the
    quartiles.

    Raises ConfigError for a definition that contradicts itself.
    """

    name: str
    column: str
    kind: Literal["number", "category", "ordinal"]
    categories: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict, hash=False)
    low: float = 0.0
    high: float = 1.0
    full_scale: float | None = None
    unit: str = ""
    title: str = ""
    cuts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        spelled = [text.lower() for text in (*self.categories, *self.synonyms)]
        if not self.name.isidentifier():
            wrong = "its name must consist of letters, digits and underscores"
        elif self.kind not in ("number", "category", "ordinal"):
            wrong = f"its kind is {self.kind!r}; known are number, category and ordinal"
        elif self.kind == "number" and (self.categories or self.synonyms):
            wrong = "a number has no categories"
        elif self.kind == "number" and not self.low < min(self.high, self.full_scale or self.high):
            wrong = "low must be below high and full_scale"
        elif self.kind != "number" and len(self.categories) < 2:
            wrong = "at least two categories are needed"
        elif len(set(spelled)) < len(spelled) or not set(self.synonyms.values()) <= set(self.categories):
            wrong = "a spelling occurs twice, or a synonym names an unknown category"
        else:
            return
        raise ConfigError(f"metadata field {self.name!r}: {wrong}")

    @property
    def is_number(self) -> bool:
        return self.kind == "number"

    @property
    def label(self) -> str:
        """The name in reports and notes."""
        return self.title or self.name.replace("_", " ")

    def meaning(self) -> list[Any]:
        """Return, as JSON types, what its values mean to a network."""
        return [self.name, self.kind, [*self.categories], self.low, self.high, self.full_scale]

    def parse(self, text: str) -> float:
        """Return the value of a cell's text. Raises ValueError for a number out of range or an unknown category."""
        if self.is_number:
            number = float(text) if PLAIN_NUMBER.fullmatch(text) else math.nan
            if not self.low <= number <= self.high:
                unit = f" {self.unit}" if self.unit else ""
                raise ValueError(
                    f"{self.column} {quoted(text)} is not a number from {self.low:g} to {self.high:g}{unit}"
                )
            return number
        index = {name.lower(): float(at) for at, name in enumerate(self.categories)}
        index |= {other.lower(): index[name.lower()] for other, name in self.synonyms.items()}
        joined = {re.sub(r"[\s_-]+", "_", name): at for name, at in index.items()}
        # pandas writes a column of integers with gaps as 3.0; some tables write a b for a_b.
        for spelling in (text.lower(), text.lower().removesuffix(".0"), re.sub(r"[\s_-]+", "_", text.lower())):
            if (found := index.get(spelling, joined.get(spelling))) is not None:
                return found
        near = nearest(text, index)
        hint = f"did you mean {near!r}? Known" if near else "known"
        raise ValueError(f"unknown {self.column} {quoted(text)}; {hint} are {', '.join(self.categories)}")

    def cell(self, value: float) -> float | str | None:
        """Return a value as JSON holds it: the number, the name of the category, None where missing."""
        if math.isnan(value):
            return None
        return value if self.is_number else self.categories[int(value)]

    def show(self, value: float) -> str:
        """Format a value with its unit."""
        if math.isnan(value):
            return "missing"
        return f"{value:g} {self.unit}".rstrip() if self.is_number else self.categories[int(value)]

    def scaled(self, numbers: Any) -> Any:
        """Scale numbers (an array or a tensor): `low` to 0, `full_scale` to 1."""
        return (numbers - self.low) / ((self.high if self.full_scale is None else self.full_scale) - self.low)


# --- tasks -----------------------------------------------------------------------------------------------------------


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
    a mapping of view to column where a row holds a lesion with its photos.  view: the kind of photo, in tables with one
    row per photo.  diagnosis: None if each diagnosis has a column of zeros and ones, or the table has no labels.
    group: the unit that must not be split over folds, such as the patient; None takes the lesion.
    """

    image: str | Mapping[str, str]
    lesion_id: str | None = None
    view: str | None = None
    diagnosis: str | None = None
    group: str | None = None


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
    columns: TaskColumns
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
            return _build(cls, raw, "")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_mapping(self) -> dict[str, Any]:
        """Return the mapping, fit for JSON and without defaults, from which `from_mapping` builds an equal task."""
        return _plain(self)

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
            if not _NAME.fullmatch(name) or name.lower() in ("lesion_id", "unlabelled"):
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
            if tuple(columns.image) != self.view_names:
                yield f"columns.image: needs a column for each view: {', '.join(self.view_names)}"
            if columns.view:
                yield "columns.view: has no effect where columns.image has a column for each view; remove one"
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


def _lower(words: Iterable[str]) -> list[str]:
    return [word.lower() for word in words]


def _twice(words: Iterable[str]) -> str | None:
    """Return the first word that occurs twice, None if there is none."""
    seen: set[str] = set()
    return next((word for word in words if word in seen or seen.add(word)), None)  # type: ignore[func-returns-value]


def _build(kind: type[Any], raw: Any, at: str) -> Any:
    """Build one of the dataclasses above from a mapping; `at`: where in the file, as `fields[2]`."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{at or 'the file'}: expected a mapping of keys, got {_type_in_words(raw)}")
    known = {each.name: each for each in fields(kind)}
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown key {f'{at}.{key}' if at else key!r}; {did_you_mean(str(key), known)}")
    for name, each in known.items():
        if name not in raw and each.default is MISSING and each.default_factory is MISSING:
            raise ConfigError(f"{f'{at}.' if at else ''}{name}: is missing")
    values = {
        key: _PARSERS[str(known[key].type)](value, f"{at}.{key}" if at else str(key)) for key, value in raw.items()
    }
    return kind(**values)


def _type_in_words(value: Any) -> str:
    """Describe the type of a value that was found instead of the expected one, for messages."""
    return "a list" if isinstance(value, list | tuple) else "a mapping" if isinstance(value, Mapping) else repr(value)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in ("", "~", "null"))


def _text(value: Any, at: str) -> str:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{at}: expected text, got {_type_in_words(value)}")


def _number(value: Any, at: str) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number):
        return number
    raise ConfigError(f"{at}: expected a number, got {_type_in_words(value)}")


def _flag(value: Any, at: str) -> bool:
    known = {"true": True, "false": False}
    if str(value).lower() in known:
        return known[str(value).lower()]
    raise ConfigError(f"{at}: expected true or false, got {_type_in_words(value)}")


def _or_null(read: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return lambda value, at: None if _is_null(value) else read(value, at)


def _list_of(read: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[Any, ...]]:
    def read_list(value: Any, at: str) -> tuple[Any, ...]:
        if _is_null(value):
            return ()
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{at}: expected a list, got {_type_in_words(value)}")
        return tuple(read(item, f"{at}[{number}]") for number, item in enumerate(value))

    return read_list


def _mapping_of(read: Callable[[Any, str], Any]) -> Callable[[Any, str], dict[str, Any]]:
    def read_mapping(value: Any, at: str) -> dict[str, Any]:
        if _is_null(value):
            return {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{at}: expected a mapping, got {_type_in_words(value)}")
        return {str(key): read(item, f"{at}.{key}") for key, item in value.items()}

    return read_mapping


def _dataclass_of(kind: type[Any]) -> Callable[[Any, str], Any]:
    return lambda value, at: _build(kind, value, at)


_PARSERS: dict[str, Callable[[Any, str], Any]] = {
    "str": _text,
    "str | None": _or_null(_text),
    "str | Mapping[str, str]": lambda value, at: (_mapping_of(_text) if isinstance(value, Mapping) else _text)(
        value, at
    ),
    "float": _number,
    "float | None": _or_null(_number),
    "bool | None": _or_null(_flag),
    "tuple[str, ...]": _list_of(_text),
    "tuple[float, ...]": _list_of(_number),
    "Mapping[str, str]": _mapping_of(_text),
    "Mapping[str, float]": _mapping_of(_number),
    "Mapping[str, tuple[str, ...]]": _mapping_of(_list_of(_text)),
    "FineLabels | None": _or_null(_dataclass_of(FineLabels)),
    "Literal['number', 'category', 'ordinal']": _text,
    "TaskColumns": _dataclass_of(TaskColumns),
    "ConceptColumns": _dataclass_of(ConceptColumns),
    "TableFormat": _dataclass_of(TableFormat),
    "tuple[Diagnosis, ...]": _list_of(_dataclass_of(Diagnosis)),
    "tuple[View, ...]": _list_of(_dataclass_of(View)),
    "tuple[MetadataField, ...]": _list_of(_dataclass_of(MetadataField)),
    "tuple[ReferenceResult, ...]": _list_of(_dataclass_of(ReferenceResult)),
}
"""Functions that parse a value of a mapping, by the annotation of its field."""


def _plain(value: Any) -> Any:
    """Convert a dataclass, mapping or sequence to JSON types; fields with their default value are left out."""
    if isinstance(value, str) or value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    given = {}
    for each in fields(value):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if (item := getattr(value, each.name)) != default:
            given[each.name] = _plain(item)
    return given


@dataclass(frozen=True, slots=True)
class Lesion:
    """One checked lesion of a data set, before any pixel is read.

    images: path of each view, None if the photo is missing.  concepts: K floats, NaN where missing.  metadata: M
    floats in the order of the task's fields, NaN where missing.  label: of its diagnoses, or `UNLABELED`.  group:
    the patient, or the lesion itself; all lesions of a group are in the same fold.  fine: of the task's finer labels,
    or `UNLABELED`.
    """

    lesion_id: str
    images: dict[str, str | None]
    concepts: tuple[float, ...]
    metadata: tuple[float, ...]
    label: int
    group: str
    fine: int = UNLABELED


@dataclass
class Batch:
    """The input of a network for B lesions, on one device.

    clinical, dermoscopic: (B, 3, H, W) normalized pixels, or (B, L, D) tokens of a frozen tower; (B, 0) where the task
    lacks the view.
    view_present: (B, 2) bool, in the order of `VIEWS`; False if the photo is missing or dropped.
    concepts: (B, K) float, NaN where missing or dropped.  metadata: (B, M) float, NaN where missing.
    labels: (B,) int64, `UNLABELED` where unknown.  valid: (B,) bool, False for padding rows.
    draws: in training, a function that returns 64 random bits for each lesion and name, (B, names) uint64 on the host,
    the same ones whenever it is called.

    Where lesions of extra sets join a training: class_mask: (B, C) bool, the diagnoses that the lesion's set
    distinguishes.  weights: (B,) float, of the lesion's loss. None: all diagnoses, and 1.

    targets: (B, C) float distributions over diagnoses where lesions are mixed (`data.mixing`); None: the labels.

    fine: (B, F) float, one-hot finer labels, mixed as the lesions are; rows of zeros where unknown. None if the task
    has none.
    """

    lesion_ids: list[str]
    clinical: torch.Tensor
    dermoscopic: torch.Tensor
    view_present: torch.Tensor
    concepts: torch.Tensor
    metadata: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    class_mask: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    draws: Callable[[Sequence[str]], np.ndarray] | None = None
    targets: torch.Tensor | None = None
    fine: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; from pinned memory without blocking the host."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("lesion_ids", "draws")}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)


class Outputs(NamedTuple):
    """The output of a network: raw logits (B, C) of the main and of each view's head, pooled features (B, D).

    aux_clinical, aux_dermoscopic: None if the task lacks the view. A named tuple, since DDP, FSDP2, DeepSpeed and
    Accelerate search tuples for tensors.
    """

    logits: torch.Tensor
    aux_clinical: torch.Tensor | None
    aux_dermoscopic: torch.Tensor | None
    features: torch.Tensor

    @property
    def heads(self) -> list[torch.Tensor]:
        """The logits of all heads, the main one first."""
        return [logits for logits in self[:3] if logits is not None]


class FineOutputs(NamedTuple):
    """The output of a network that learns finer labels, in training: as `Outputs`, and their raw logits (B, F)."""

    logits: torch.Tensor
    aux_clinical: torch.Tensor | None
    aux_dermoscopic: torch.Tensor | None
    features: torch.Tensor
    fine: torch.Tensor

    @property
    def heads(self) -> list[torch.Tensor]:
        """The logits of the heads of diagnoses, the main one first."""
        return [logits for logits in self[:3] if logits is not None]
