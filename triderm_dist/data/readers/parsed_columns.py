"""Parse the columns of a table that a task names, each distinct text once, and collect what is wrong in which row."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.data.ids import why_no_id
from triderm_dist.data.problems import Problem
from triderm_dist.data.readers.cells import is_missing, parse_field, parse_number, parse_score, parsed_texts
from triderm_dist.data.readers.dataset import spelled_alike, why_no_lesion_id
from triderm_dist.data.readers.find_photos import photo_name
from triderm_dist.data.readers.find_table import image_columns, task_columns
from triderm_dist.data.readers.lesion_table import no_labels
from triderm_dist.data.readers.table import Table
from triderm_dist.data.shards.format import Text
from triderm_dist.runtime.messages import did_you_mean, nearest, quoted
from triderm_dist.schema import UNLABELED, MetadataField, Task


@dataclass
class ParsedColumns:
    """The columns of a table of N rows: ids, and the others each parsed when its method is called.

    Rows with an invalid cell become `problems`, and what is tolerated `notes`, in the order of the calls.
    """

    table: Table
    task: Task
    problems: list[Problem] = field(default_factory=list, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    used: set[str] = field(default_factory=set, init=False)
    """Names of the columns that were parsed."""
    labeled: bool = field(default=False, init=False)
    bad: set[int] = field(default_factory=set, init=False)
    """Rows with a problem."""
    codes: np.ndarray = field(init=False)
    """(N,) the lesion of each row, numbered in the order in which they appear."""
    names: Text = field(init=False)
    """The id of each lesion."""

    def __post_init__(self) -> None:
        self.read_ids()

    def read_ids(self) -> None:
        """Set `codes` and `names`; rows with an invalid id become problems."""
        column = self.task.columns.lesion_id
        name = column or image_columns(self.task)[0]
        self.used.add(name)
        self.codes, texts = self.table.encoded(name)
        if not column:
            ids = pa.array(map(photo_name, texts.to_pylist()), pa.string()).dictionary_encode()
            self.codes, texts = ids.indices.to_numpy()[self.codes], ids.dictionary
        self.names = Text(pa.chunked_array([texts]))
        wrong = {code: why for code, lesion_id in enumerate(self.names) if (why := why_no_lesion_id(lesion_id))}
        advice = "" if column else "; name another column by columns.lesion_id in task.yaml, or rename the photo"
        for row, code in rows_of(wrong, self.codes):
            self.add_problem(row, "row", f"{name} {quoted(self.names[code])} {wrong[code]}{advice}")

    def refuse_repeated_lesions(self, kind: str, advice: str) -> None:
        """Make every row of a lesion but its first a problem."""
        first = np.empty(len(self.names), np.int32)
        rows = np.arange(len(self.codes), dtype=np.int32)
        first[self.codes[::-1]] = rows[::-1]
        for row in np.flatnonzero(first[self.codes] != rows).tolist():
            earlier = self.table.numbers[int(first[self.codes[row]])]
            what = f"lesion {self.lesion_id(row)} occurs twice, first in row {earlier}; {advice}"
            self.add_problem(row, kind, what)

    def lesion_id(self, row: int) -> str:
        """Return the id of the lesion of a row."""
        return self.names[int(self.codes[row])]

    def views(self) -> np.ndarray:
        """Return the number of the view of each row (N,), -1 where it is invalid."""
        words = {word.lower(): at for at, view in enumerate(self.task.views) for word in (view.name, *view.words)}
        return self.parsed_views(self.task.columns.view or "", words, _as_words("views"))

    def parsed_views(self, column: str, words: Mapping[str, int], advice: str = "") -> np.ndarray:
        """Return the numbers of the views in a column (N,), -1 where one is unknown. words: the number of each word, in
        lower case. advice: the end of messages.
        """

        def parse(text: str) -> float:
            if text.lower() not in words:
                raise ValueError(f"unknown {column} {quoted(text)}; known are {', '.join(words)}")
            return words[text.lower()]

        return np.nan_to_num(self.parsed(column, parse, "row", advice=advice), nan=-1).astype(np.int8)

    def rows_by_view(self, views: np.ndarray) -> np.ndarray:
        """Return the row of each lesion and view (L, V), -1 for none, of lesions with a row of a known view.

        views: (N,) as `views` returns them. A second row of a view becomes a problem.
        """
        rows = np.full((len(self.names), len(self.task.views)), -1, np.int32)
        placed = np.flatnonzero(views >= 0).astype(np.int32)
        place = self.codes[placed].astype(np.int64) * len(self.task.views) + views[placed]
        rows.reshape(-1)[place[::-1]] = placed[::-1]  # the first row of several is written last
        others = rows.reshape(-1)[place]
        repeated = others != placed
        for row, other in zip(placed[repeated].tolist(), others[repeated].tolist(), strict=True):
            what = f"lesion {self.lesion_id(row)} has two {self.task.view_names[views[row]]} photos"
            earlier = self.table.numbers[other]
            self.add_problem(row, "duplicate photo", f"{what}, the first in row {earlier}; keep one")
        return rows[rows.max(1, initial=-1) >= 0]

    def metadata(self, number: int) -> np.ndarray:
        """Return the values of a metadata field (N,), NaN where missing."""
        about = self.task.fields[number]
        if about.column not in self.table.cells:
            self.notes.append(f"no column {self._absent(about.column)}: {about.label} is missing for every lesion")
            return np.full(len(self.table), np.nan)
        other = ", or list it" if about.is_number else f", list it under synonyms of {about.name} or"
        found = self.parsed_field(about, f"; correct it{other} under missing_words in task.yaml")
        if not about.is_number:
            seen = set(found[~np.isnan(found)].astype(int).tolist())
            if absent := [name for at, name in enumerate(about.categories) if at not in seen]:
                self.notes.append(f"{about.column}: no row has {', '.join(absent)}")
        return found

    def parsed_field(self, about: MetadataField, advice: str) -> np.ndarray:
        """Return the values in the column of a field (N,), NaN where missing. advice: the end of messages."""
        span, words = (about.low, about.high) if about.is_number else None, self.task.missing_words
        return self.parsed(about.column, lambda text: parse_field(about, text, words), "cell", span, advice=advice)

    def concept_columns(self) -> list[str]:
        """Return the columns of concept scores, in an order that is independent of the table's."""
        concepts = self.task.concepts
        if concepts.prefix:
            prefix = concepts.prefix.lower()
            return sorted((each for each in self.table.cells if each.lower().startswith(prefix)), key=str.lower)
        return list(concepts.names)

    def scores(self, column: str) -> np.ndarray:
        """Return the scores of a concept (N,), NaN where missing."""
        if column not in self.table.cells:
            self.notes.append(f"no column {self._absent(column)}: this concept is missing for every lesion")
            return np.full(len(self.table), np.nan)
        return self.parsed_scores(column, "; correct it, or list it under concepts.words in task.yaml")

    def parsed_scores(self, column: str, advice: str) -> np.ndarray:
        """Return the scores in a column (N,), NaN where missing. advice: the end of messages."""
        words = self.task.concepts.words
        return self.parsed(column, lambda text: parse_score(column, text, self.task), "cell", (0.0, 1.0), words, advice)

    def labels(self) -> np.ndarray:
        """Return the label of each row (N,), `UNLABELED` for none."""
        task, column = self.task, self.task.columns.diagnosis
        if column is None:
            return self._one_hot()
        self.labeled = column in self.table.cells
        if not self.labeled:
            self.notes.append(f"no column {self._absent(column)}: no lesion has a diagnosis")
            return no_labels(len(self.table))

        def parse(text: str) -> float:
            if task.label_of(text) is None and is_missing(text, task.missing_words):
                return UNLABELED
            return parse_diagnosis(text, task, column)

        return np.nan_to_num(self.parsed(column, parse, "label"), nan=UNLABELED).astype(np.int16)

    def finer_labels(self) -> np.ndarray | None:
        """Return the finer label of each row (N,), `UNLABELED` for none of the task's; None where no lesion has one."""
        fine = self.task.fine
        if fine is None:
            return None
        if fine.column not in self.table.cells:
            self.notes.append(f"no column {self._absent(fine.column)}: no lesion has a finer label")
            return None
        return self.parsed(fine.column, fine.label_of, "label").astype(np.int16)

    def groups(self) -> tuple[np.ndarray, Text] | None:
        """Return the group of each row (N,), -1 for none, and the names of groups; None without a group column."""
        column = self.task.columns.group
        if column is None:
            return None
        if column not in self.table.cells:
            self.notes.append(f"no column {self._absent(column)}: each lesion is a group of its own")
            return None
        self.used.add(column)
        codes, names = self.table.encoded(column)
        words = pa.array(["", *map(str.lower, self.task.missing_words)])
        missing = pc.is_in(pc.utf8_lower(names), words).to_numpy(zero_copy_only=False)
        texts = Text(pa.chunked_array([names]))
        wrong = {at: why for at, name in enumerate(texts) if not missing[at] and (why := why_no_id(name))}
        for row, code in rows_of(wrong, codes):
            # Without the text: index.json holds problems also where groups are replaced by hashes.
            self.add_problem(row, "row", f"{column} {wrong[code]}")
        self.notes += spelled_alike(names.filter(pa.array(~missing)), column)
        return np.where(missing[codes], -1, codes).astype(np.int32), texts

    def add_problem(self, row: int, kind: str, what: str) -> None:
        """Add a problem, which names the row and its lesion."""
        self.bad.add(row)
        self.problems.append(Problem(self.lesion_id(row), kind, self.table.where(row), what))

    def add_difference(self, rows: np.ndarray, column: str) -> None:
        """Add the problem that the rows of a lesion (R,), -1 for none, differ in a column."""
        row = int(rows[-1])
        what = f"the photos of lesion {self.lesion_id(row)} differ in {column}; all rows need the same"
        self.add_problem(row, "rows differ", what)

    def valid_lesions(self) -> np.ndarray:
        """Return whether no row of a lesion has a problem (L,)."""
        valid = np.ones(len(self.names), bool)
        valid[self.codes[list(self.bad)]] = False
        return valid

    def cells_of(self, column: str, rows: np.ndarray) -> list[str]:
        """Return the cells of some rows (n,), which ascend."""
        found, start = list[str](), 0
        for (cells,) in self.table.parts(column):
            first, last = np.searchsorted(rows, (start, start + len(cells)))
            found += cells.take(pa.array(rows[first:last] - start)).to_pylist()
            start += len(cells)
        return found

    def _one_hot(self) -> np.ndarray:
        names = self.task.diagnosis_names
        self.labeled = any(name in self.table.cells for name in names)
        if not self.labeled:
            self.notes.append("no column of a diagnosis: no lesion has one")
            return np.full(len(self.table), UNLABELED)
        self.table.require(names, "; every diagnosis needs a column of zeros and ones")
        truth = {"true": 1.0, "false": 0.0}

        def parse(text: str) -> float:
            if is_missing(text, self.task.missing_words):
                return math.nan
            number = truth.get(text.lower(), parse_number(text))
            return number if number is not None else -1.0

        ones, zeros, empty = (np.zeros(len(self.table), np.int16) for _ in range(3))
        labels = no_labels(len(self.table))
        for at, name in enumerate(names):
            values = self.parsed(name, parse, "label")
            labels[values == 1] = at
            ones += values == 1
            zeros += values == 0
            empty += np.isnan(values)
        right = (ones == 1) & (zeros == len(names) - 1)
        for row in np.flatnonzero(~right & (empty < len(names))).tolist():
            what = f"lesion {self.lesion_id(row)} needs a single 1 and otherwise 0 over the diagnoses"
            self.add_problem(row, "label", f"{what}; leave all empty if it is unlabeled")
        return np.where(right, labels, UNLABELED).astype(np.int16)

    def _absent(self, column: str) -> str:
        """Return the name of a column that the table lacks, with the most similar unused column, for messages."""
        known = {name.lower() for name in task_columns(self.task)}
        near = nearest(column, (name for name in self.table.header if name.lower() not in known))
        return f"{column!r} (is {near!r} meant?)" if near else repr(column)

    def parsed(
        self,
        column: str,
        parse: Callable[[str], float],
        kind: str,
        span: tuple[float, float] | None = None,
        words: Iterable[str] = (),
        advice: str = "",
    ) -> np.ndarray:
        """Parse a column (N,), each distinct text of a part once; NaN and a problem where that raises ValueError.

        span: numbers in this range are parsed at once, without `parse`, unless they are one of `words`.
        advice: the end of messages.
        """
        self.used.add(column)
        result, start = np.empty(len(self.table)), 0
        missing = [*words, *self.task.missing_words]
        for (cells,) in self.table.parts(column):
            encoded = cells.dictionary_encode()
            values, errors = parsed_texts(encoded.dictionary, parse, span, missing)
            codes = encoded.indices.to_numpy()
            for row, code in rows_of(errors, codes):
                self.add_problem(start + row, kind, f"{errors[code]}{advice}")
            result[start : start + len(codes)] = values[codes]
            start += len(codes)
        return result


def rows_of(chosen: Collection[int], codes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (row, code) of the rows whose code, of codes (N,), is one of the chosen ones."""
    rows = np.flatnonzero(np.isin(codes, list(chosen))) if chosen else np.empty(0, np.int64)
    return zip(rows.tolist(), codes[rows].tolist(), strict=True)


def parse_diagnosis(text: str, task: Task, column: str) -> int:
    """Return the label that a text names. Raises ValueError, with the nearest word, for an unknown one."""
    label = task.label_of(text)
    if label is not None:
        return label
    hint = did_you_mean(text.lower(), task.label_words)
    raise ValueError(f"unknown {column} {quoted(text)}; {hint}{_as_words('diagnoses')}")


def _as_words(key: str) -> str:
    return f" Correct it, or add it to the words of one of the {key} in task.yaml"
