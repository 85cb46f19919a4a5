"""Paths among saved settings follow the folder of the run."""

import sys
from pathlib import Path

from triderm_dist.config import Experiment, load, load_run, save


def paths_of(config: Experiment) -> dict[str, str | None]:
    data = {key: getattr(config.data, key) for key in ("source", "test", "shards", "task", "test_truth")}
    return {"output": config.output, "tokens": config.tokens, **data}


def test_run_means_its_folder_from_any_working_directory(saved_run, tmp_path, monkeypatch):
    outside = {"test": f"{tmp_path}/test", "shards": "s3://bucket/train", "task": "derm7pt", "test_truth": None}
    relative = {"output": "runs/one", "source": "runs/one/data/train", "tokens": "runs/one/cache"}
    for config in (
        load(Experiment, None, ["run=runs/one"]),
        load(Experiment, None, ["run=runs/one/"]),
        load_run(Experiment, "runs/one"),
        load(Experiment, "runs/one/config.yaml"),
        load(Experiment, "runs/one/trimodal/fold-0/config.yaml"),
    ):
        assert paths_of(config) == outside | relative and config.seed == 3
    moved = saved_run.rename(tmp_path / "two")
    monkeypatch.chdir("/")
    for file in (moved / "config.yaml", moved / "trimodal" / "fold-0" / "config.yaml"):
        expected = {"output": str(moved), "source": f"{moved}/data/train", "tokens": f"{moved}/cache"}
        assert paths_of(load(Experiment, file)) == outside | expected
    assert load(Experiment, None, [f"run={moved}", "seed=4"]).seed == 4
    monkeypatch.chdir(moved)
    assert paths_of(load(Experiment, "config.yaml"))["source"] == "data/train"


def test_plugin_in_the_run_moves_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "my_plugin.py").write_text("import sys\nsys.loaded_plugins.append(__file__)\n")
    monkeypatch.setattr(sys, "loaded_plugins", loaded := [], raising=False)
    save(load(Experiment, None, ["output=one", "plugins=[one/my_plugin.py, json]"]), Path("one/config.yaml"))
    (tmp_path / "one").rename(tmp_path / "two")
    assert load(Experiment, None, ["run=two"]).plugins == (f"{tmp_path}/two/my_plugin.py", "json")
    assert loaded == [f"{tmp_path}/{run}/my_plugin.py" for run in ("one", "two")]
