"""Predict by a boosted tree model of XGBoost with NumPy alone.

XGBoost takes a second to import and is an optional package; a model that it has fitted needs neither. Shapes: n rows,
F columns, T trees, C diagnoses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from triderm_dist.schema import DataError

CELLS = 4_000_000
"""Rows times trees that are evaluated at once."""
_NUMBERS = {"i": "b", "U": "B", "I": ">h", "l": ">i", "L": ">q", "d": ">f", "D": ">d"}
"""Formats of the numbers of UBJSON."""


@dataclass(frozen=True, eq=False)
class BoostedTrees:
    """A multi-class model with a tree per round and diagnosis.

    base: (C,) margins of no tree.  first: (T,) node of each tree's root; a tree belongs to diagnosis `number % C`.
    Of each node of all trees: left, right its children (itself for a leaf), column and threshold of the split,
    to_left: whether a missing value goes left; value: of a leaf.
    """

    base: np.ndarray
    first: np.ndarray
    left: np.ndarray
    right: np.ndarray
    column: np.ndarray
    threshold: np.ndarray
    to_left: np.ndarray
    value: np.ndarray
    depth: int

    @staticmethod
    def read(model: bytes) -> BoostedTrees | None:
        """Read a model that XGBoost saved as UBJ; None for a kind that is not supported here (multi-output trees).

        Raises DataError for other bytes.
        """
        try:
            reader = _Ubj(model)
            learner = reader.value()["learner"]
            if reader.at != len(model):
                raise ValueError("bytes after its end")
            forest = learner["gradient_booster"]["model"]
            trees, classes = forest["trees"], int(learner["learner_model_param"]["num_class"])
            known = (
                learner["objective"]["name"] == "multi:softprob"
                and learner["gradient_booster"]["name"] == "gbtree"
                and list(forest["tree_info"]) == [number % classes for number in range(len(trees))]
                and all(tree["tree_param"]["size_leaf_vector"] in ("0", "1") for tree in trees)
                and not any(np.any(tree["split_type"]) for tree in trees)
            )
            if not known:
                return None
            base = np.array(learner["learner_model_param"]["base_score"].strip("[]").split(","), np.float32)
            found = _flatten(trees, np.broadcast_to(base, (classes,)))
            columns = int(learner["learner_model_param"]["num_feature"])
            if len(found.column) and not 0 <= found.column.min() <= found.column.max() < columns:
                raise ValueError("a split by a column that the model does not have")
            return found
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise DataError(f"not a model of XGBoost ({type(error).__name__})") from None

    def predict(self, columns: np.ndarray) -> np.ndarray:
        """Return (n, C) float32 probabilities of (n, F) columns, NaN where missing."""
        columns = np.asarray(columns, np.float32)
        size = max(1, CELLS // max(1, len(self.first)))
        parts = [self._margins(columns[start : start + size]) for start in range(0, len(columns), size)]
        margins = np.concatenate(parts) if parts else np.empty((0, len(self.base)), np.float32)
        exponentials = np.exp(margins - margins.max(axis=1, keepdims=True))
        total = exponentials.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        return np.asarray(exponentials / total)

    def _margins(self, columns: np.ndarray) -> np.ndarray:
        rows = np.arange(len(columns))[:, None]
        node = np.broadcast_to(self.first, (len(columns), len(self.first)))
        for _ in range(self.depth):
            value = columns[rows, self.column[node]]
            goes_left = np.where(np.isnan(value), self.to_left[node], value < self.threshold[node])
            node = np.where(goes_left, self.left[node], self.right[node])
        # One addition after the other in float32, as XGBoost adds them.
        leaves = self.value[node].reshape(len(columns), -1, len(self.base))
        start = np.broadcast_to(self.base, (len(columns), 1, len(self.base)))
        return np.asarray(np.cumsum(np.concatenate([start, leaves], axis=1), axis=1, dtype=np.float32)[:, -1])


def _flatten(trees: list[dict[str, Any]], base: np.ndarray) -> BoostedTrees:
    """Put the nodes of all trees into one array."""
    sizes = np.array([len(tree["left_children"]) for tree in trees], np.int64)
    first = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64)
    shift = np.repeat(first, sizes)

    def joined(key: str, kind: type) -> np.ndarray:
        return np.concatenate([np.asarray(tree[key], kind) for tree in trees])

    keys = ("left_children", "right_children", "split_indices", "split_conditions", "default_left")
    for tree in trees:
        if not len(tree["left_children"]) or len({len(tree[key]) for key in keys}) > 1:
            raise ValueError("a tree without nodes, or with lists of different lengths")
    left, right = joined("left_children", np.int64), joined("right_children", np.int64)
    leaf, own = left < 0, np.arange(len(left))
    last = np.repeat(sizes, sizes)
    if ((left >= last) | (right >= last) | (~leaf & (right < 0))).any():
        raise ValueError("a child that is not in its tree")
    left, right = np.where(leaf, own, left + shift), np.where(leaf, own, right + shift)
    depth, reached = 0, first
    while not leaf[reached].all():
        if depth > sizes.max():
            raise ValueError("a node below itself")
        reached, depth = np.unique(np.concatenate([left[reached], right[reached]])), depth + 1
    return BoostedTrees(
        base=base, first=first, left=left, right=right,
        column=joined("split_indices", np.int64), threshold=joined("split_conditions", np.float32),
        to_left=joined("default_left", bool), value=joined("split_conditions", np.float32), depth=depth,
    )  # fmt: skip


class _Ubj:
    """Parses UBJSON (https://ubjson.org, draft 12) as XGBoost writes it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def value(self, kind: str | None = None) -> Any:
        kind = kind or self._char()
        if kind in _NUMBERS:
            return self._numbers(kind, 1)[0].item()
        if kind == "S":
            return self._text()
        if kind in "TFZ":
            return {"T": True, "F": False, "Z": None}[kind]
        if kind == "{":
            return self._mapping()
        if kind == "[":
            return self._list()
        raise ValueError(f"unknown type {kind!r}")

    def _char(self) -> str:
        self.at += 1
        return chr(self.data[self.at - 1])

    def _peek(self) -> str:
        return chr(self.data[self.at])

    def _numbers(self, kind: str, count: int) -> np.ndarray:
        numbers = np.frombuffer(self.data, _NUMBERS[kind], count, self.at)
        self.at += numbers.nbytes
        return numbers

    def _text(self) -> str:
        length = self._count()
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def _count(self) -> int:
        count = self.value()
        if not isinstance(count, int) or not 0 <= count <= len(self.data):
            raise ValueError("a length outside of the file")
        return count

    def _mapping(self) -> dict[str, Any]:
        found = {}
        while self._peek() != "}":
            key = self._text()
            found[key] = self.value()
        self.at += 1
        return found

    def _list(self) -> Any:
        kind = count = None
        if self._peek() == "$":
            self.at += 1
            kind = self._char()
        if self._peek() == "#":
            self.at += 1
            count = self._count()
        if count is None:
            found = []
            while self._peek() != "]":
                found.append(self.value())
            self.at += 1
            return found
        return self._numbers(kind, count) if kind in _NUMBERS else [self.value(kind) for _ in range(count)]
