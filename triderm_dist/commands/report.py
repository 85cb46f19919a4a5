"""Write OUTPUT/report.html, a self-contained page, and its figures, from the files that triderm stack wrote.

triderm report --config RUN/config.yaml
"""

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import Experiment


class ReportRun(Experiment):
    uses = ("output",)


def main(config: ReportRun) -> None:
    from triderm_dist.report import write_report

    print(write_report(config.folder))


def start() -> None:
    run(ReportRun, main, __doc__, users=programs_using)


if __name__ == "__main__":
    start()
