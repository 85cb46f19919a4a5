"""Settings written by a run and read again."""

from pathlib import Path

import pytest

from triderm_dist.config import Experiment, load, save


def test_saved_settings_round_trip_and_can_be_overridden(tmp_path):
    config = load(Experiment, None, ["models.a.train.epochs=3", "models.b.width=64", "train.optim.lr=1e-3"])
    save(config, tmp_path / "config.yaml")
    assert load(Experiment, tmp_path / "config.yaml") == config
    changed = load(Experiment, tmp_path / "config.yaml", ["train.epochs=5"])
    assert (changed.models["a"].train.epochs, changed.models["b"].train.epochs) == (3, 5)


@pytest.mark.parametrize(
    "setting",
    [
        "models.a.train.augment.extra={hue: {}}",
        "models.a.train.loss.terms={mine: {settings: {scale: null}}}",
        "train.tracker_settings={wandb: {name: '12e5', id: '7', notes: '', tags: ['true', 'null', '-.5']}}",
    ],
)
def test_settings_without_a_type_round_trip(setting, tmp_path):
    shared = ["train.augment.extra={blur: {}}", "train.loss.terms={mine: {weight: 1}}", "models.b.width=64"]
    config = load(Experiment, None, [setting, *shared])
    save(config, tmp_path / "config.yaml")
    assert load(Experiment, tmp_path / "config.yaml") == config


def test_paths_of_models_are_saved_as_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = "models.a.extra_towers=[{init: runs/one/b}]"
    config = load(Experiment, None, ["output=runs/one", "models.a.init=runs/zero", "models.a.tower.frozen=true", extra])
    Path("runs/one").mkdir(parents=True)
    save(config, Path("runs/one/config.yaml"))
    monkeypatch.chdir("/")
    model = load(Experiment, tmp_path / "runs" / "one" / "config.yaml").models["a"]
    assert model.init == f"{tmp_path}/runs/zero"
    assert model.extra_towers[0].init == f"{tmp_path}/runs/one/b"
