"""Files that ship with the package."""

import pytest

from tests.processes import ROOT
from triderm_dist.config import Experiment, load

EXPERIMENTS = ROOT / "launch" / "experiments"


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda file: file.stem)
def test_experiment_files_are_valid(file):
    config = load(Experiment, file)
    for model in config.models.values():
        assert model.train.global_batch % model.train.micro_batch == 0
