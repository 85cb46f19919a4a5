"""Settings of a search."""

import pytest

from triderm_dist.config import Experiment, load
from triderm_dist.schema import ConfigError
from triderm_dist.search.settings import SearchRun


def test_short_names_set_the_section():
    config = load(SearchRun, None, ["space=x.yaml", "trials=3", "seed=7", "search.seed=8", "search.cpus=2"])
    assert (config.search.space, config.search.trials, config.search.seed, config.search.cpus) == ("x.yaml", 3, 8, 2)
    assert config.seed == 7 and isinstance(config.experiment, Experiment)
    for misspelt in ("search.trails=3", "trails=3"):
        with pytest.raises(ConfigError, match=r"did you mean 'search.trials'"):
            load(SearchRun, None, [misspelt])
