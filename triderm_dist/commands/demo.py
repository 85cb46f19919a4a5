"""Make synthetic lesions and run the whole pipeline on them: two networks, two folds, submission, report.

triderm demo
triderm demo task=derm7pt output=runs/demo7pt

Takes a minute or two on two cores. Equal to `triderm synthetic output=runs/demo/data`, then
`triderm pipeline --config demo`.
"""

import os
import sys
from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.files import check_no_file
from triderm_dist.settings import PathText, Section


class DemoRun(Section):
    output: PathText = Field("runs/demo", description="folder of the run; the lesions go into its folder `data`")
    task: PathText = Field("milk10k", description="name of a task that ships, or a task.yaml")


def main(config: DemoRun) -> None:
    from triderm_dist.data.synthetic import LESIONS, TEST_LESIONS, truth_file, write_synthetic
    from triderm_dist.tasks import load_task

    check_no_file("output", config.output)
    data, task = Path(config.output) / "data", load_task(config.task)
    write_synthetic(data, task, LESIONS, TEST_LESIONS, seed=0)
    print(f"{LESIONS} + {TEST_LESIONS} SYNTHETIC lesions in {data}", flush=True)
    settings = [
        f"output={config.output}",
        f"data.source={data / 'train'}",
        f"data.test={data / 'test'}",
        f"data.test_truth={truth_file(data, task)}",
    ]
    if config.task != "milk10k":
        settings.append(f"data.task={config.task}")
    # One thread per fold: the networks are small, and the numbers are the same on any number of cores.
    command = [sys.executable, "-m", "triderm_dist.commands.pipeline", "--config", "demo", *settings, "cpus=1"]
    os.execv(sys.executable, command)


def start() -> None:
    run(DemoRun, main, __doc__)


if __name__ == "__main__":
    start()
