"""What a page is made of: sections with tables and figures, and how their values are written.

A table holds raw values. Their text, for the page and for sentences that quote a cell, is made by `shown` alone.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triderm_dist.intervals import Interval

UNKNOWN = "–"
"""Shown in place of a value that is None or NaN."""


@dataclass(frozen=True)
class Share:
    """Some of all, such as lesions of a set: shown as `12 of 300 (4.0%)`."""

    part: int
    total: int


@dataclass(frozen=True)
class Flag:
    """A verdict; `strong` ones are highlighted, others are shown in gray."""

    text: str
    strong: bool = True


Value = None | bool | int | float | str | Interval | Share | Flag | np.generic


@dataclass(frozen=True)
class Column:
    """A column of values.

    name: for CSV files and for looking up a cell.  title: on the page, with the unit.  spec: the format of its numbers,
    as for `format`; without one, floats have three decimals and integers thousands separators. With a sign, they are
    differences, which have more decimals where their interval needs them.  bar: a bar from 0 to 1
    is drawn beside the number.  long: its text may wrap.
    """

    name: str
    title: str
    spec: str = ""
    bar: bool = False
    long: bool = False


@dataclass(frozen=True)
class Row:
    """A row: its name, one value for each column, and how it is shown.

    note: in gray after the name.  lead: highlighted.  group: rows of one group follow each other under its heading.
    """

    name: str
    values: Sequence[Value]
    note: str = ""
    lead: bool = False
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page, also written as report/NAME.csv.

    caption: one line that says what the rows are.  columns: the one that matters first, because a narrow screen shows
    that one beside the names of the rows.  head: the heading of the names.  emphasis: whether the first column is set
    in bold.

    Raises ValueError where a row has another number of values than there are columns.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    head: str = ""
    emphasis: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.values) != len(self.columns):
                raise ValueError(
                    f"table {self.name}, row {row.name}: {len(row.values)} values for {len(self.columns)} columns"
                )

    def column(self, name: str) -> Column:
        """Return the column of a name; raise KeyError where there is none."""
        return self.columns[self._position(name)]

    def value(self, row: str, column: str, group: str = "") -> Value:
        """Return the raw value of a cell; raise KeyError where there is none, or several rows have this name."""
        found = [each for each in self.rows if (each.group, each.name) == (group, row)]
        if len(found) != 1:
            raise KeyError(f"table {self.name} has {len(found)} rows {row!r}" + (f" in {group!r}" if group else ""))
        return found[0].values[self._position(column)]

    def text(self, row: str, column: str, part: str = "", group: str = "") -> str:
        """Return a cell as the table shows it, for a sentence.  part: `value`, `low` or `high` of an interval."""
        value = self.value(row, column, group)
        spec = self.column(column).spec
        return part_text(value, part, spec) if part and isinstance(value, Interval) else shown(value, spec)

    def csv(self) -> str:
        """Return the raw values as CSV, with `NAME_low` and `NAME_high` for intervals and `NAME_of` for shares.

        The names of the rows are under `head`, or under `name` where that is the name of a column.
        """
        extra = [set().union(*(_parts(row.values[at]) for row in self.rows), {""}) for at in range(len(self.columns))]
        parts = [[each for each in ("", "low", "high", "of") if each in found] for found in extra]
        grouped, noted = any(row.group for row in self.rows), any(row.note for row in self.rows)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [
            column.name + (f"_{part}" if part else "")
            for column, some in zip(self.columns, parts, strict=True)
            for part in some
        ]
        head = self.head if self.head and self.head not in names else "name"
        writer.writerow([*(["group"] if grouped else []), head, *(["note"] if noted else []), *names])
        for row in self.rows:
            cells = [_raw(value, part) for value, some in zip(row.values, parts, strict=True) for part in some]
            writer.writerow([*([row.group] if grouped else []), row.name, *([row.note] if noted else []), *cells])
        return text.getvalue()

    def _position(self, name: str) -> int:
        for at, column in enumerate(self.columns):
            if column.name == name:
                return at
        raise KeyError(f"table {self.name} has no column {name!r}")


@dataclass(frozen=True)
class Figure:
    """A figure of the page, also written as report/NAME.svg and report/NAME.png.

    draw: draws into an empty `matplotlib.figure.Figure`.  alt: what the figure shows, in words, for those who do not
    see it.  size: in inches, see `report.style` for the widths.  Many points are to be drawn with `rasterized=True`.
    """

    name: str
    draw: Callable[[Any], None]
    alt: str
    caption: str
    size: tuple[float, float]


@dataclass(frozen=True)
class Section:
    """A section of the page.

    template: a file of `report/templates`, or the path of another one; the default one shows `values["text"]`, then all
    tables and figures. A template sees `tables` and `figures` by name, and `values` under their own names.
    """

    title: str
    template: str | Path = "section.html"
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    values: Mapping[str, Any] = field(default_factory=dict)


def shown(value: Value, spec: str = "") -> str:
    """Return the text of a value.  spec: the format of numbers, see `Column`."""
    if isinstance(value, np.generic):
        value = value.item()
    match value:
        case None:
            return UNKNOWN
        case bool():
            return "yes" if value else "no"
        case str():
            return value
        case Flag():
            return value.text
        case Interval():
            ends = "" if math.isnan(value.value) else f" {interval_text(value, spec)}"
            return part_text(value, "value", spec) + ends
        case Share():
            percent = f" ({100 * value.part / value.total:.1f}%)" if value.total else ""
            return f"{value.part:,} of {value.total:,}{percent}"
        case int():
            return format(value, spec or ",")
        case float():
            return UNKNOWN if math.isnan(value) else format(value, spec or ".3f")
    raise TypeError(f"no text for {type(value).__name__}")


def interval_text(interval: Interval, spec: str = "") -> str:
    """Return both ends of an interval in parentheses."""
    return f"({part_text(interval, 'low', spec)} to {part_text(interval, 'high', spec)})"


def part_text(interval: Interval, part: str, spec: str = "") -> str:
    """Return the text of `value`, `low` or `high` of an interval."""
    if spec.startswith("+."):
        spec = f"+.{interval.decimals(int(spec[2:-1]))}f"
    return shown(getattr(interval, part), spec)


def _parts(value: Value) -> set[str]:
    if isinstance(value, Interval):
        return {"low", "high"}
    return {"of"} if isinstance(value, Share) else set()


def _raw(value: Value, part: str) -> str:
    """Return a value for CSV: numbers with all digits, nothing where there is none."""
    if isinstance(value, np.generic):
        value = value.item()
    if part not in {"", *_parts(value)}:
        return ""
    if isinstance(value, Interval):
        value = getattr(value, part or "value")
    elif isinstance(value, Share):
        value = value.total if part else value.part
    if isinstance(value, Flag):
        return value.text
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return shown(value) if isinstance(value, bool) else str(value)
