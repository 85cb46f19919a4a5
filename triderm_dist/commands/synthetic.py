"""Write a small SYNTHETIC data set of a task: generated lesions with the task's columns and words, and a test set.

triderm synthetic output=demo
triderm synthetic output=demo7pt task=derm7pt

OUTPUT/train is a folder with labels, OUTPUT/test one without, OUTPUT/truth holds the labels of the test set.
triderm_dist/data/synthetic describes how lesions are drawn.
"""

import shlex
from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Extensible
from triderm_dist.data.synthetic import LESIONS, TEST_LESIONS
from triderm_dist.settings import PathText


class SyntheticConfig(Extensible):
    output: PathText = Field(description="folder to write; it appears when it is complete")
    task: PathText = Field("milk10k", description="name of a task that ships, or a task.yaml")
    lesions: int = Field(LESIONS, ge=100, description="lesions of the training part")
    test_lesions: int = Field(TEST_LESIONS, ge=50, description="lesions of the test part")
    seed: int = Field(0, ge=0, description="seed of everything that is drawn")


def main(config: SyntheticConfig) -> None:
    from triderm_dist.data.synthetic import truth_file, write_synthetic
    from triderm_dist.tasks import load_task

    output, task = Path(config.output), load_task(config.task)
    if write_synthetic(output, task, config.lesions, config.test_lesions, config.seed):
        print(f"{config.lesions} + {config.test_lesions} SYNTHETIC lesions in {output}: train/, test/, truth/")
    else:
        print(f"{output} holds this synthetic data already")
    settings = [f"data.source={output / 'train'}", f"data.test={output / 'test'}"]
    settings += [f"data.test_truth={truth_file(output, task)}", f"data.task={config.task}"]
    print(f"next: {shlex.join(['triderm', 'pipeline', '--config', 'demo', *settings])}")


def start() -> None:
    run(SyntheticConfig, main, __doc__)


if __name__ == "__main__":
    start()
