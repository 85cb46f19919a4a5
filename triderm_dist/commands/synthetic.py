"""Write a small SYNTHETIC challenge folder: generated lesions in the official layout, with a labeled test set.

triderm synthetic output=demo

OUTPUT/train is a training folder, OUTPUT/test a test folder without labels, OUTPUT/truth holds the test labels.
triderm_dist/data/synthetic.py describes how lesions are drawn.
"""

from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Extensible
from triderm_dist.data.synthetic import LESIONS, TEST_LESIONS
from triderm_dist.settings import PathText


class SyntheticConfig(Extensible):
    output: PathText = Field(description="folder to write; it appears when it is complete")
    lesions: int = Field(LESIONS, ge=100, description="lesions of the training part")
    test_lesions: int = Field(TEST_LESIONS, ge=50, description="lesions of the test part")
    seed: int = Field(0, ge=0, description="seed of everything that is drawn")


def main(config: SyntheticConfig) -> None:
    from triderm_dist.data.synthetic import write_demo

    output = Path(config.output)
    if write_demo(output, config.lesions, config.test_lesions, config.seed):
        print(f"{config.lesions} + {config.test_lesions} SYNTHETIC lesions in {output}: train/, test/, truth/")
    else:
        print(f"{output} holds this demo data already")


def start() -> None:
    run(SyntheticConfig, main, __doc__)


if __name__ == "__main__":
    start()
