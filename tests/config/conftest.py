"""A saved run."""

from pathlib import Path

import pytest

from triderm_dist.config import Experiment, load, save


@pytest.fixture
def saved_run(tmp_path, monkeypatch) -> Path:
    """A run of relative paths, in and outside its folder, saved from the working directory."""
    monkeypatch.chdir(tmp_path)
    words = ["output=runs/one", "data.source=runs/one/data/train", "data.test=test", "data.shards=s3://bucket/train"]
    config = load(Experiment, None, [*words, "data.task=derm7pt", "tokens=runs/one/cache", "seed=3"])
    save(config, Path("runs/one/config.yaml"))
    save(config, Path("runs/one/trimodal/fold-0/config.yaml"))
    return tmp_path / "runs" / "one"
