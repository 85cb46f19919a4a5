"""The data set that every reader returns, and checks of ids that readers share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.data.ids import why_no_id
from triderm_dist.data.problems import Problem
from triderm_dist.data.readers.text_index import HashIndex
from triderm_dist.runtime.messages import quoted
from triderm_dist.schema import Lesion, Task

# A lesion id names files in the shards, where WebDataset ends the key at the first dot.
_LESION_ID = re.compile(r"[^\s./\\]+( +[^\s./\\]+)*")


def why_no_lesion_id(text: str) -> str | None:
    """Return why a text cannot be the id of a lesion; None for a valid id."""
    if wrong := why_no_id(text):
        return wrong
    if _LESION_ID.fullmatch(text):
        return None
    if re.fullmatch(r"[0-9]+\.0", text):
        return f"is a number as pandas writes a column with gaps; write {text[:-2]}, by reading the column as text"
    return "holds a dot, a slash or an unusual space"


def folded(text: str) -> str:
    """Normalize an id: case, leading zeros, `.0`, separators, a leading apostrophe, full width, invisible characters.

    Programs change these when they write tables; two ids with the same result are probably the same id.
    """
    text = re.sub(r"[\s_-]+", "_", text.lower().lstrip("'"))
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).casefold()
        text = "".join(each for each in text if unicodedata.category(each) != "Cf")
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?(e\+?[0-9]{1,3})?", text):
        return str(Decimal(text).normalize())
    return re.sub(r"0*([0-9]+)", r"\1", text)


_FOLDED_IN_BULK = (("^'", ""), (r"[\s_-]+", "_"), (r"^([0-9]+)\.0+$", r"\1"), ("0*([0-9]+)", r"\1"))
"""Patterns and replacements that approximate `folded` for many ids at once."""
_CHUNK = 1 << 16
"""Ids that are compared at a time."""


def spelled_alike(distinct: pa.Array, what: str) -> list[str]:
    """Return a note on pairs of distinct ids that differ in spelling only (see `folded`); [] if there are none."""
    hashes = np.empty(len(distinct), np.int64)
    for start in range(0, len(distinct), _CHUNK):
        column = distinct.slice(start, _CHUNK)
        for pattern, by in _FOLDED_IN_BULK:
            column = pc.replace_substring_regex(column, pattern, by)
        texts = pc.utf8_lower(pc.utf8_normalize(column, form="NFKC")).to_pylist()
        hashes[start : start + len(texts)] = [hash(text) for text in texts]
    ordered = np.sort(hashes)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(repeated):
        return []
    first: dict[str, str] = {}
    near = distinct.take(pa.array(np.flatnonzero(np.isin(hashes, repeated)))).to_pylist()
    pairs = [(first[key], name) for name in near if first.setdefault(key := folded(name), name) != name]
    if not pairs:
        return []
    one, other = map(quoted, pairs[0])
    return [f"{what}: {len(pairs)} equal another one but for case, zeros or separators, such as {one} and {other}"]


class Spellings:
    """The ids of a data set, for messages that suggest the one that a misspelled id means."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids
        self._by_folded: HashIndex | None = None

    def hint(self, name: str, otherwise: str = "") -> str:
        """Return `is X meant ...?` for an id X that equals `name` after `folded`, else `otherwise`."""
        if self._by_folded is None:
            self._by_folded = HashIndex.of(map(folded, self._ids))
        key = folded(name)
        found = (self._ids[at] for at in self._by_folded.positions(key))
        near = next((each for each in found if each != name and folded(each) == key), None)
        return f"is {quoted(near)} meant (case, zeros, separators)?" if near else otherwise


@dataclass(frozen=True)
class Dataset:
    """Checked lesions of one folder, in the order of its table; those of a reader are a `LesionTable`.

    task: gives labels and metadata their meaning.  concepts: names of the K concept scores.  labeled: whether the
    folder has labels.  notes: what was tolerated, with counts.  problems: why lesions were dropped.
    folder: root that `relative` removes from paths in problems; "" removes nothing.
    """

    task: Task
    lesions: Sequence[Lesion]
    concepts: tuple[str, ...]
    labeled: bool
    notes: list[str]
    problems: tuple[Problem, ...] = ()
    folder: str = ""

    def relative(self, problems: Iterable[Problem]) -> list[Problem]:
        """Return problems with paths relative to the folder, so that copies of the folder give equal indexes."""
        name = re.escape(self.folder.rstrip("/"))
        if not name:
            return [*problems]
        path = re.compile(rf"(?<![\w./~-]){name}(?:/|(?![\w./-]))")

        def text(value: str) -> str:
            # macOS composes the accents of names in another way.
            return unicodedata.normalize("NFC", path.sub(lambda found: "" if found[0][-1] == "/" else ".", value))

        return [replace(problem, where=text(problem.where), what=text(problem.what)) for problem in problems]
