"""The table of the fault matrix in docs/reliability.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.faults.matrix import FAULTS, Outcome

BEGIN, END = "<!-- python -m tests.faults -->", "<!-- end -->"
KINDS = ("lost", "silent", "left over", "hang")


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Return a summary and a table: of each cell the number of faults, and of those that failed."""
    cells: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        cells[outcome.row, outcome.fault].append(outcome)
    lines = [*summary(outcomes), "", f"| program | {' | '.join(FAULTS)} |", "| --- |" + " --: |" * len(FAULTS)]
    for row in dict.fromkeys(outcome.row for outcome in outcomes):
        texts = []
        for fault in FAULTS:
            cell = cells[row, fault]
            failed = sum(bool(outcome.problems) for outcome in cell)
            texts.append("–" if not cell else f"{len(cell) - failed} of {len(cell)}" if failed else str(len(cell)))
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join(lines)


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Return nine lines of counts."""

    def count(kind: str) -> int:
        return sum(any(problem.startswith(f"{kind}:") for problem in outcome.problems) for outcome in outcomes)

    in_spite = sum(outcome.status == 0 for outcome in outcomes)
    refused = sum(outcome.status == 2 for outcome in outcomes)
    stopped = sum(outcome.status == 3 for outcome in outcomes)
    killed = len(outcomes) - in_spite - refused - stopped
    return [
        f"- faults tried: {len(outcomes)}",
        f"- lost or changed after running again: {count('lost')}",
        f"- silent (a damaged result, no message, or another exit status): {count('silent')}",
        f"- files or processes left over: {count('left over')}",
        f"- hangs: {count('hang')}",
        f"- ended with 2 and one line: {refused}",
        f"- ended with 3 and one line: {stopped}",
        f"- killed: {killed}",
        f"- finished in spite of the fault, with the same result: {in_spite}",
    ]


def write_into(path: Path, text: str) -> None:
    """Put the text between the two marks in a file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
