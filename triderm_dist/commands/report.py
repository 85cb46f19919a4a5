"""Write RUN/report.html, a self-contained page, and its figures, from the files that triderm stack wrote.

triderm report run=RUN
triderm report run=RUN output=FOLDER

The second writes into FOLDER, and nothing into the run.
"""

from triderm_dist.cli import run
from triderm_dist.commands import programs_using
from triderm_dist.config import RunReader


class ReportRun(RunReader):
    uses = ("output",)

    @property
    def is_stage(self) -> bool:
        return self.results == self.folder


def main(config: ReportRun) -> None:
    from triderm_dist.ensemble.model_card import write_card
    from triderm_dist.ensemble.xgboost_stacker import import_xgboost_alone
    from triderm_dist.report import write_report

    if config.stack.enabled and not config.plugins:  # they may need its estimators
        import_xgboost_alone()
    print(write_report(config.folder, config.results))
    if config.results == config.folder:
        write_card(config)


def start() -> None:
    run(ReportRun, main, __doc__, users=programs_using)


if __name__ == "__main__":
    start()
