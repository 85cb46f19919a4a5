"""The tree of settings: every one described and checked, shared by models, used or not by a program."""

import re
from pathlib import Path

import pytest
from pydantic import Field

from triderm_dist.config import Experiment, RunReader, has_effect, load, load_run
from triderm_dist.schema import ConfigError
from triderm_dist.settings import describe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"unknown setting 'train.epoch'; did you mean 'train.epochs'\?"),
        ("models.a.widht=3", r"unknown setting 'models.a.widht'; did you mean 'models.NAME.width'\?"),
        ("epoch=3", r"unknown setting 'epoch'; did you mean 'train.epochs'\?"),
        ("lr=1e-3", r"unknown setting 'lr'; did you mean 'train.optim.lr'\?"),
        ("xyzzy=3", "unknown setting 'xyzzy'; --help-all lists them"),
        ("train.epochs=many", "train.epochs: input should be a valid integer"),
        ("models.a.width=30", "width 30 is not a multiple of heads 8"),
        ("models.a.train.loss.alpha=0.3", "alpha works with head=sigmoid only"),
        ("models.a.mlp_ratio=1e-9", "mlp_ratio 1e-09 of width 768 leaves no hidden unit"),
        ("models.a.width=9000000000000000000", "models.a.width: input should be less than or equal to 1048576"),
        ("models.a.tower.image_size=1000000000", "image_size: input should be less than or equal to 16384"),
        ("train.global_batch=1000000000000", "train.global_batch: input should be less than or equal to 1048576"),
        ("predict.batch=1000000000000", "predict.batch: input should be less than or equal to 1048576"),
        ("rank_timeout=1e30", "rank_timeout: input should be less than or equal to 1000000000"),
        ("epochs", "'epochs' is not a setting; write key.subkey=value"),
        ("train.optim.lr=[1", "train.optim.lr: '\\[1': not readable as YAML"),
    ],
)
def test_invalid_settings_give_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(Experiment, None, [override])
    assert "\n" not in str(error.value)


def test_default_model_trains_with_the_shared_settings():
    assert load(Experiment, None, ["train.epochs=7"]).models["trimodal"].train.epochs == 7


def test_every_setting_has_a_description():
    rows = list(describe(Experiment))
    assert len(rows) > 80
    assert all(text for *_, text in rows)
    assert "models.NAME.train.optim.layer_decay" in {key for key, *_ in rows}


def test_every_path_setting_has_the_path_type():
    """Without the path type `~` would not be expanded; settings described as folder or URL must have it."""
    rows = {key: type_name for key, type_name, _, text in describe(Experiment) if re.search(r"\b(folder|URL)\b", text)}
    assert {key for key, type_name in rows.items() if "path" not in type_name} <= {
        "data.invalid",
        "data.verify",
        "data.missing_view",
        "data.remote.cache_gb",
        "data.remote.allow_commands",
    }


def test_home_is_expanded_in_paths():
    config = load(Experiment, None, ["output=~/run", "data.remote.cache=~/cache", "data.shards=s3://bucket/~x"])
    assert (config.output, config.data.remote.cache) == (
        str(Path("~/run").expanduser()),
        str(Path("~/cache").expanduser()),
    )
    assert config.data.shards == "s3://bucket/~x"


def test_settings_that_affect_a_program():
    class Program(Experiment):
        uses = ("output", "data.shards", "train")
        own: int = Field(1, description="own")

    affecting = ["own", "output", "data", "data.shards", "train", "train.optim.lr"]
    others = ["seed", "data.source", "models.a.width", "stack"]
    assert [key for key in affecting + others if has_effect(Program, key)] == affecting


def test_reader_of_a_run_writes_where_output_says(saved_run):
    config = load(RunReader, None, ["run=runs/one", "output=elsewhere"])
    assert (config.folder, config.results, config.experiment.output) == (
        Path("runs/one"),
        Path("elsewhere"),
        "runs/one",
    )
    assert load_run(RunReader, "runs/one").results == Path("runs/one")
    assert load(RunReader, "runs/one/config.yaml").folder == Path("runs/one")
