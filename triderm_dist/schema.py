"""The data types shared by all modules: diagnoses, views, concepts, metadata fields, batches, outputs, errors.

Reads no file and imports nothing heavy. Letters of shapes, used throughout: B lesions in a batch, C diagnoses, K
concepts, M metadata fields, L tokens, D width, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
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

DIAGNOSIS_NAMES: dict[str, str] = {
    "AKIEC": "actinic keratosis / intraepidermal carcinoma",
    "BCC": "basal cell carcinoma",
    "BEN_OTH": "other benign proliferation",
    "BKL": "benign keratinocytic lesion",
    "DF": "dermatofibroma",
    "INF": "inflammatory or infectious condition",
    "MAL_OTH": "other malignant proliferation",
    "MEL": "melanoma",
    "NV": "melanocytic nevus",
    "SCCKA": "squamous cell carcinoma / keratoacanthoma",
    "VASC": "vascular lesion or hemorrhage",
}

VIEWS: tuple[str, str] = ("clinical", "dermoscopic")
"""The two photos of a lesion. Every tensor with a view axis uses this order."""

MONET_COLUMNS: tuple[str, ...] = (
    "MONET_ulceration_crust",
    "MONET_hair",
    "MONET_vasculature_vessels",
    "MONET_erythema",
    "MONET_pigmented",
    "MONET_gel_water_drop_fluid_dermoscopy_liquid",
    "MONET_skin_markings_pen_ink_purple_pen",
)
"""Concept scores that the challenge publishes for each photo, hence once per view of a lesion."""

CONCEPTS: tuple[str, ...] = tuple(
    f"{view}/{column.removeprefix('MONET_')}" for view in VIEWS for column in MONET_COLUMNS
)
"""Names of MILK10k's 14 concepts. Networks take K and the names from the index of the shards instead."""

UNLABELED = -1
"""The label of a lesion whose diagnosis is not known."""


class InputError(Exception):
    """Invalid input. Its text is one line: what is wrong, where, and what to do. Programs exit with status 2."""


class DataError(InputError):
    """An invalid challenge folder, shard or table; the text names the file and the row or sample."""


class ConfigError(InputError):
    """A setting that is unknown, of the wrong type, or incompatible with another one."""


class CheckpointError(InputError):
    """A weight file that does not belong to the network it is loaded into."""


def one_line(error: object, limit: int | None = None, with_type: bool = False) -> str:
    """Return an error's text on one line of at most `limit` characters; the name of its type where it has no text.

    with_type: put the name of the type in front, as in `KeyError: 'age'`.
    """
    name, text = type(error).__name__, " ".join(str(error).split())
    text = (f"{name}: {text}" if with_type else text) if text else name
    return text if limit is None or len(text) <= limit else text[: limit - 4] + " ..."


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
    synonyms: Mapping[str, str] = field(default_factory=dict)
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
            wrong = "a spelling occurs twice, or a synonym stands for no category"
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

    def parse(self, text: str) -> float:
        """Return the value of a cell's text. Raises ValueError for a number out of range or an unknown category."""
        if self.is_number:
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if not self.low <= number <= self.high:
                unit = f" {self.unit}" if self.unit else ""
                raise ValueError(f"{self.column} {text!r} is not a number from {self.low:g} to {self.high:g}{unit}")
            return number
        index = {name.lower(): float(at) for at, name in enumerate(self.categories)}
        index |= {other.lower(): index[name.lower()] for other, name in self.synonyms.items()}
        # pandas writes a column of integers with gaps as 3.0.
        for spelling in (text.lower(), text.lower().removesuffix(".0")):
            if spelling in index:
                return index[spelling]
        raise ValueError(f"unknown {self.column} {text!r}; known are {', '.join(self.categories)}")

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


MILK10K_FIELDS: tuple[MetadataField, ...] = (
    MetadataField("age", "age_approx", "number", high=120.0, full_scale=100.0, unit="years", cuts=(40, 60, 75)),
    MetadataField("sex", "sex", "category", ("female", "male")),
    # Not the Fitzpatrick scale, whose 1 is the lightest.
    MetadataField(
        "skin_tone", "skin_tone_class", "ordinal", ("0", "1", "2", "3", "4", "5"), unit="0 very dark, 5 very light"
    ),
    MetadataField(
        "site",
        "site",
        "category",
        ("trunk", "head_neck_face", "lower_extremity", "upper_extremity", "hand", "foot", "genital"),
    ),
)
"""The metadata of MILK10k."""

METADATA_FIELDS: dict[str, MetadataField] = {each.name: each for each in MILK10K_FIELDS}
"""The metadata fields by name, in the order of the axis M. `add_field` adds one; read the table when you need it."""


def add_field(new: MetadataField) -> None:
    """Add a field to `METADATA_FIELDS`; call it before any data are read. Adding the same field again does nothing.

    Readers, networks, stacker, report and the synthetic data walk that table. Raises ConfigError where another field
    has the same name or column.
    """
    for known in METADATA_FIELDS.values():
        if known != new and (known.name == new.name or known.column == new.column):
            raise ConfigError(
                f"metadata field {new.name!r} (column {new.column!r}): field {known.name!r} has this name or column"
            )
    METADATA_FIELDS.setdefault(new.name, new)


def added_fields() -> list[MetadataField]:
    """Return the fields that are not in `MILK10K_FIELDS`."""
    return [each for each in METADATA_FIELDS.values() if each not in MILK10K_FIELDS]


@dataclass(frozen=True)
class Lesion:
    """One checked lesion of a challenge folder, before any pixel is read.

    images: path of each view, None where the photo is missing.  concepts: K floats, NaN where missing.  metadata: M
    floats in the order of `METADATA_FIELDS`, NaN where missing.  label: index in `DIAGNOSES`, or `UNLABELED`.  group:
    the patient, or the lesion itself; all lesions of a group are in the same fold.
    """

    lesion_id: str
    images: dict[str, str | None]
    concepts: tuple[float, ...]
    metadata: tuple[float, ...]
    label: int
    group: str


@dataclass
class Batch:
    """The input of a network for B lesions, on one device.

    clinical, dermoscopic: (B, 3, H, W) normalized pixels, or (B, L, D) tokens of a frozen tower.
    view_present: (B, 2) bool, in the order of `VIEWS`; False where the photo is missing or dropped.
    concepts: (B, K) float, NaN where missing or dropped.  metadata: (B, M) float, NaN where missing.
    labels: (B,) int64, `UNLABELED` where unknown.  valid: (B,) bool, False for padding rows.
    """

    lesion_ids: list[str]
    clinical: torch.Tensor
    dermoscopic: torch.Tensor
    view_present: torch.Tensor
    concepts: torch.Tensor
    metadata: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; from pinned memory without blocking the host."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lesion_ids"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


class Outputs(NamedTuple):
    """The output of a network: raw logits (B, C) of the main and of each view's head, pooled features (B, D).

    A named tuple, since DDP, FSDP2, DeepSpeed and Accelerate search tuples for tensors.
    """

    logits: torch.Tensor
    aux_clinical: torch.Tensor
    aux_dermoscopic: torch.Tensor
    features: torch.Tensor
