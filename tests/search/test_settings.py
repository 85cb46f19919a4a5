"""Settings of a search."""

from pathlib import Path

import pytest

from triderm_dist.config import Experiment, find_file, load
from triderm_dist.schema import ConfigError
from triderm_dist.search.settings import SearchRun, read_search
from triderm_dist.search.space import read_space
from triderm_dist.search.study import _open_folder


def test_short_names_set_the_section():
    config = load(SearchRun, None, ["space=x.yaml", "trials=3", "seed=7", "search.seed=8", "search.cpus=2"])
    assert (config.search.space, config.search.trials, config.search.seed, config.search.cpus) == ("x.yaml", 3, 8, 2)
    assert config.seed == 7 and isinstance(config.experiment, Experiment)
    with pytest.raises(ConfigError, match=r"search.seed: input should be less than 4294967296"):
        load(SearchRun, None, ["search.seed=4294967296"])  # NumPy's limit
    for misspelt in ("search.trails=3", "trails=3"):
        with pytest.raises(ConfigError, match=r"did you mean 'search.trials'"):
            load(SearchRun, None, [misspelt])


def test_search_of_relative_paths_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = read_space(find_file("spaces", "losses"))
    words = ["output=run", "data.shards=packed", "tokens=run/tokens"]
    _open_folder(load(SearchRun, None, words), space)
    _open_folder(load(SearchRun, None, [*words, "resume=true"]), space)
    with pytest.raises(ConfigError, match=r"data\.shards: differs from the search in run"):
        _open_folder(load(SearchRun, None, [*words, "data.shards=other", "resume=true"]), space)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert read_search(Path("moved")).tokens == "moved/tokens"
