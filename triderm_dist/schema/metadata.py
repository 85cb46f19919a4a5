"""Fields of the patient metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from triderm_dist.runtime.messages import nearest, quoted
from triderm_dist.schema.errors import ConfigError

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
        elif self.kind == "number" and not self.low < min(self.high, self.scale_end):
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

    @property
    def scale_end(self) -> float:
        """The number that networks scale to 1."""
        return self.high if self.full_scale is None else self.full_scale

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
        """Scale numbers (an array or a tensor): `low` to 0, `scale_end` to 1."""
        return (numbers - self.low) / (self.scale_end - self.low)
