"""The fault matrix: every program under every fault; run again, its result is that of an undisturbed run, bit for bit.

python -m tests.faults                          all rows and faults, four moments each
python -m tests.faults rows=stack,report faults=SIGKILL,'disk full' moments=0
python -m tests.faults keep=FILE                writes each outcome into FILE as JSON
python -m tests.faults read=FILE,FILE write=docs/reliability.md         runs nothing, writes the table of kept outcomes

moments=0 takes all kinds of moments and all damages. Exits with 1 where a program lost, hid or left anything.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.matrix import FAULTS, Matrix, Outcome
from tests.faults.report import markdown, write_into
from tests.faults.rows import ROWS


def main(words: list[str]) -> int:
    settings = {"rows": "", "faults": "", "moments": "4", "write": "", "keep": "", "read": ""}
    for word in words:
        key, _, value = word.partition("=")
        if key not in settings:
            print(__doc__)
            return 2
        settings[key] = value
    rows = [row for row in ROWS if not settings["rows"] or row.name in settings["rows"].split(",")]
    faults = [fault for fault in FAULTS if not settings["faults"] or fault in settings["faults"].split(",")]
    outcomes: list[Outcome] = []
    begun = time.monotonic()
    if settings["read"]:
        lines = [line for name in settings["read"].split(",") for line in Path(name).read_text().splitlines()]
        outcomes, rows = [Outcome(**json.loads(line)) for line in lines], []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        matrix = Matrix(Path(folder), print_outcome)
        for row in rows:
            for fault in faults:
                for case in matrix.cases(row, fault, int(settings["moments"])):
                    outcomes.append(case())
                    if settings["keep"]:
                        lines = [json.dumps(vars(outcome)) for outcome in outcomes]
                        Path(settings["keep"]).write_text("\n".join(lines) + "\n")
    text = markdown(outcomes)
    print(f"{text}\n\n{time.monotonic() - begun:.0f} s")
    if settings["write"]:
        write_into(Path(settings["write"]), text)
    return int(any(outcome.problems for outcome in outcomes))


def print_outcome(outcome: Outcome) -> None:
    """Print an outcome as it comes."""
    verdict = "ok" if not outcome.problems else "FAILED"
    print(
        f"{verdict}  {outcome.row}, {outcome.fault}, {outcome.case}: {outcome.status}, {outcome.seconds} s", flush=True
    )
    if outcome.message:
        print(f"    {outcome.message[:300]}", flush=True)
    for problem in outcome.problems:
        print(f"    {problem}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
