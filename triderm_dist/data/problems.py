"""Problems of single lesions: their type, the error that carries them, and their CSV table."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from triderm_dist.data.ids import cell_text
from triderm_dist.files import PATIENT_DATA, atomic_path
from triderm_dist.runtime.messages import printable
from triderm_dist.runtime.redact import redact
from triderm_dist.schema import DataError


@dataclass(frozen=True)
class Problem:
    """One problem of one lesion.

    kind: a few words, by which problems are counted. where: file and row, photo or shard. what: what is wrong and what
    to do.
    """

    lesion_id: str
    kind: str
    where: str
    what: str

    def __post_init__(self) -> None:
        for name in ("where", "what"):  # both may quote what cannot be printed, or a URL with a token
            text = printable(getattr(self, name))
            object.__setattr__(self, name, redact(text) if "://" in text else text)

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class InvalidLesions(DataError):
    """A data set with invalid lesions; the message holds the first of its `problems` and their number.

    valid: the number of lesions without a problem.
    """

    def __init__(self, problems: Sequence[Problem], valid: int) -> None:
        bad = len({problem.lesion_id for problem in problems})
        super().__init__(
            f"{problems[0]} ({len(problems)} problem{'s' * (len(problems) > 1)} in {bad} of {valid + bad} lesions; "
            "correct them, or drop these lesions by invalid=drop)"
        )
        self.problems = tuple(problems)


def count_by_kind(problems: Sequence[Problem]) -> dict[str, int]:
    """Return the number of problems of each kind, most frequent first."""
    return dict(Counter(problem.kind for problem in problems).most_common())


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Write the problems as CSV, atomically; ids and cells of the data in them act on no spreadsheet."""
    with atomic_path(path, PATIENT_DATA) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Problem))
        writer.writerows(map(cell_text, astuple(problem)) for problem in problems)
