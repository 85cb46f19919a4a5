"""Select lesions of a packed set by a condition on their diagnosis, metadata, concepts and photos.

    site == 'back' and age >= 60
    diagnosis in ('melanoma', 'nevus') or diagnosis is None
    has_clinical and not (sex == 'male' or 'dermoscopic / hair' > 0.5)

Names are `diagnosis`, the task's metadata fields and concepts, and `has_VIEW` of its views; one with spaces stands in
quotes. Values are numbers, or the names of diagnoses and categories in quotes. `is None` finds missing values, for
which every comparison is false. The condition is parsed and never run as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.runtime.messages import did_you_mean
from triderm_dist.schema import UNLABELED, VIEWS, ConfigError

ORDERS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class _Column:
    """Values (N,) float, NaN where missing.  words: what the values name, if they name something."""

    name: str
    values: np.ndarray
    words: tuple[str, ...] | None = None


def select_rows(index: ShardIndex, condition: str) -> np.ndarray:
    """Return whether each lesion meets the condition, (N,) bool. Raises ConfigError for an invalid condition."""
    try:
        return _mask(ast.parse(condition.strip(), mode="eval").body, index)
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        raise ConfigError(f"select: {condition!r:.200} is not a condition such as {_example(index)!r}") from None


def _mask(node: ast.expr, index: ShardIndex) -> np.ndarray:
    match node:
        case ast.BoolOp(op, values):
            join = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return join.reduce([_mask(value, index) for value in values])
        case ast.UnaryOp(ast.Not(), operand):
            return ~_mask(operand, index)
        case ast.Name(name) if name in _views(index):
            return index.sizes[:, VIEWS.index(name.removeprefix("has_"))] > 0
        case ast.Compare(ast.Name(str(name)) | ast.Constant(str(name)), [comparison], [value]):
            return _compare(_column(index, name), comparison, value)
    raise ConfigError(
        f"select: {ast.unparse(node)!r:.200} is not a condition; write NAME == VALUE, <, in (...), is None, joined by "
        f"and, or, not, such as {_example(index)!r}"
    )


def _compare(column: _Column, comparison: ast.cmpop, value: ast.expr) -> np.ndarray:
    known = ~np.isnan(column.values)
    match comparison, value:
        case ((ast.Is() | ast.IsNot()), ast.Constant(None)):
            return ~known if isinstance(comparison, ast.Is) else known
        case ((ast.In() | ast.NotIn()), (ast.Tuple(elements) | ast.List(elements))):
            # In the column's own precision, as == compares them: float32 has no 0.3.
            found = np.isin(column.values, np.array([_value(column, each) for each in elements], column.values.dtype))
            return found if isinstance(comparison, ast.In) else known & ~found
        case ((ast.Eq() | ast.NotEq()), _):
            equal = column.values == _value(column, value)
            return equal if isinstance(comparison, ast.Eq) else known & ~equal
    compare = ORDERS.get(type(comparison))
    if compare is None or column.words is not None:
        which = "==, !=, in, not in, is None" + ("" if column.words else ", <, <=, >, >=")
        raise ConfigError(f"select: {column.name} is compared by {which}")
    return compare(column.values, _value(column, value))


def _value(column: _Column, node: ast.expr) -> float:
    """Return the number that a constant is in a column."""
    found = ast.literal_eval(node)
    if column.words is None:
        if isinstance(found, int | float) and not isinstance(found, bool):
            return float(found)
        raise ConfigError(f"select: {column.name} holds numbers, not {found!r:.80}")
    words = [word.lower() for word in column.words]
    if isinstance(found, str) and found.lower() in words:
        return float(words.index(found.lower()))
    raise ConfigError(f"select: {found!r:.80} is no value of {column.name}; known: {', '.join(column.words)}")


def _column(index: ShardIndex, name: str) -> _Column:
    task = index.task
    if name == "diagnosis":
        labels = index.labels.astype(np.float64)
        return _Column(name, np.where(index.labels == UNLABELED, np.nan, labels), index.diagnoses)
    if name in task.field_names:
        position = task.field_names.index(name)
        field = task.fields[position]
        return _Column(name, index.metadata[:, position], None if field.is_number else field.categories)
    if name in index.concepts:
        return _Column(name, index.concept_scores[:, index.concepts.index(name)])
    known = ["diagnosis", *task.field_names, *index.concepts, *_views(index)]
    raise ConfigError(f"select: {name!r} is not known; {did_you_mean(name, known) or 'known: ' + ', '.join(known)}")


def _views(index: ShardIndex) -> tuple[str, ...]:
    return tuple(f"has_{view}" for view in index.task.view_names)


def _example(index: ShardIndex) -> str:
    return f"diagnosis == '{index.diagnoses[0]}'"
