"""Compare runs on the same lesions: paired differences with 95% intervals, McNemar tests, settings that differ.

triderm compare RUN RUN
triderm compare RUN RUN output=FOLDER

The second also writes FOLDER/report.html and its tables. Takes two runs or more, and subtracts the earlier run from the
later one, for each pair. "Beyond the noise" is corrected for the number of pairs.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import PathText, Section


class CompareRun(Section):
    runs: tuple[PathText, ...] = Field((), description="folders of the runs, two or more")
    output: PathText | None = Field(None, description="folder for the page and its tables; null prints only")


def main(config: CompareRun) -> None:
    from triderm_dist.report.comparison import Comparison
    from triderm_dist.report.comparison_page import write_comparison
    from triderm_dist.runtime.terminal import table

    comparison = Comparison([Path(folder) for folder in config.runs])
    scores = [
        (each.name, f"{score.value:.3f}", f"{score.low:.3f} to {score.high:.3f}")
        for each, score in zip(comparison.runs, comparison.macro_f1, strict=True)
    ]
    print(table(("run", "macro F1, nested", "95% interval"), scores))
    differences = []
    for pair in comparison.pairs:
        value, low, high = pair.macro_f1.signed()
        verdict, correct = "yes" if pair.beyond_noise else "no", f"{pair.mcnemar.first} and {pair.mcnemar.second}"
        name = f"{pair.first} minus {pair.second}"
        differences.append((name, value, f"{low} to {high}", verdict, correct, f"{pair.mcnemar.adjusted:.2g}"))
    header = ("difference", "macro F1", "95% interval", "beyond the noise", "correct in one only", "McNemar p")
    print(f"\n{table(header, differences)}")
    if config.output:
        print(f"\n{write_comparison(comparison, Path(config.output))}")


def start() -> None:
    run(CompareRun, main, __doc__, first="runs")


if __name__ == "__main__":
    start()
