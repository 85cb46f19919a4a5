"""Summarize a search, also an unfinished one: its trials as a table, the best settings, and a page with figures.

triderm results output=RUN

Writes RUN/search/{trials.csv, report.html, curves.png, importance.png, settings.png, parallel.png} and RUN/best.yaml.
"""

from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import PathText, Section


class ResultsRun(Section):
    output: PathText = Field("runs/default", description="folder of the run that was searched")


def main(config: ResultsRun) -> None:
    from triderm_dist.search.page import write_page
    from triderm_dist.search.results import print_summary, summarize
    from triderm_dist.search.settings import read_search

    summary = summarize(read_search(Path(config.output)))
    print_summary(summary)
    page, figures = write_page(summary)
    for path in (*figures, page):
        print(path)


def start() -> None:
    run(ResultsRun, main, __doc__)


if __name__ == "__main__":
    start()
