"""Write OUTPUT/report.html, one page that opens from disk, and its pictures, from what triderm stack left.

triderm report --config RUN/config.yaml
"""

from triderm_dist.cli import run
from triderm_dist.config import Experiment


def main(config: Experiment) -> None:
    from triderm_dist.report import write_report

    print(write_report(config.folder))


def start() -> None:
    run(Experiment, main, __doc__)


if __name__ == "__main__":
    start()
