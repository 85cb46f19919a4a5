"""Summarize a search, also an unfinished one: its trials as a table, the best settings, and a page with figures.

triderm results run=RUN

Writes RUN/search/{trials.csv, report.html, report/} and RUN/best.yaml. report/ holds the figures and tables.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from triderm_dist.cli import run
from triderm_dist.settings import PathText, Section


class ResultsRun(Section):
    run: PathText = Field("runs/default", description="folder of the run that was searched")

    @model_validator(mode="before")
    @classmethod
    def _former_name(cls, raw: Any) -> Any:
        return {"run": raw["output"]} if isinstance(raw, Mapping) and set(raw) == {"output"} else raw


def main(config: ResultsRun) -> None:
    from triderm_dist.search.page import write_search_page
    from triderm_dist.search.results import print_summary, summarize
    from triderm_dist.search.settings import read_search

    summary = summarize(read_search(Path(config.run)))
    print_summary(summary)
    print(write_search_page(summary))


def start() -> None:
    run(ResultsRun, main, __doc__)


if __name__ == "__main__":
    start()
