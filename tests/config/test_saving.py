"""Settings written by a run and read again."""

from triderm_dist.config import Experiment, load, save


def test_saved_settings_round_trip_and_can_be_overridden(tmp_path):
    config = load(Experiment, None, ["models.a.train.epochs=3", "models.b.width=64", "train.optim.lr=1e-3"])
    save(config, tmp_path / "config.yaml")
    assert load(Experiment, tmp_path / "config.yaml") == config
    changed = load(Experiment, tmp_path / "config.yaml", ["train.epochs=5"])
    assert (changed.models["a"].train.epochs, changed.models["b"].train.epochs) == (3, 5)
