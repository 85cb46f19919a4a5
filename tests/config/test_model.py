"""Names of models, and of their seeds."""

import pytest
import yaml

from triderm_dist.config import RESERVED_MODELS, Experiment, build, load, save
from triderm_dist.ensemble.run_files import RESERVED
from triderm_dist.schema import ConfigError


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "..", ".a", "a/b", "a\\b", "../a", "a b", "-a", "=a", "+a", "@a", "a,b", "a:b"),
        *("a\n", "a\x00", "a\u202eb", "x" * 65, "stack", "Mean", "fitted", "chosen", "ensemble"),
        *("shards", "tokens", "towers", "refit", "fold-0"),
    ],
)
def test_model_whose_name_cannot_be_a_folder_or_is_taken_is_refused(name):
    with pytest.raises(ConfigError, match=r"models: .*(can't be named|holds U\+)") as error:
        build(Experiment, {"models": {name: {}}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a", "CNN-2", "v1.5", "großes_netz", "1", "a+b", "x" * 64])
def test_other_names_of_models_are_allowed(name):
    assert list(build(Experiment, {"models": {name: {}}}).models) == [name]


def test_models_that_differ_in_case_only_are_refused():
    with pytest.raises(ConfigError, match="models: the models 'cnn' and 'CNN' differ in case only"):
        build(Experiment, {"models": {"cnn": {}, "CNN": {}}})


def test_names_of_ensemble_members_are_reserved():
    assert set(RESERVED) <= RESERVED_MODELS


def test_seeds_are_models_that_follow_theirs(tmp_path):
    words = ["models={a: {width: 64, seeds: 3, train: {epochs: 9}}, b: {}}", "train.epochs=7", f"output={tmp_path}"]
    experiment = load(Experiment, None, [*words, "seed=5"])
    assert list(experiment.models) == ["a", "a-s1", "a-s2", "b"]
    assert [experiment.seed_of(name) for name in experiment.models] == [5, 6, 7, 5]
    assert [each.train.epochs for each in experiment.models.values()] == [9, 9, 9, 7]
    # Dumped and saved settings follow a change of the model, and of the number of its seeds.
    dumped = experiment.model_dump(mode="json")
    assert build(Experiment, dumped) == experiment
    save(experiment, tmp_path / "config.yaml")
    for again in (dumped, yaml.safe_load((tmp_path / "config.yaml").read_text().replace("${config_dir}", "x"))):
        again["models"]["a"] |= {"width": 32, "seeds": 2}
        changed = build(Experiment, again)
        assert [(name, each.width) for name, each in changed.models.items()] == [("a", 32), ("a-s1", 32), ("b", 768)]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("{a: {seeds: 2}, a-s1: {}}", r"'a-s1' is a model, and the name of a further seed of 'a'; rename one"),
        ("{a: {seeds: 2}, a-seeds: {}}", r"'a-seeds' is a model, and the name of the mean of the seeds of 'a'; rename"),
        ("{a: {seeds: 0}}", r"a\.seeds: write 1 or more"),
        ("{a: {}, b-s1: {seeds: 0}}", r"b-s1\.seeds: write 1 or more"),
        ("{a: {seeds: -1}}", "greater than or equal to 0"),
    ],
)
def test_seeds_without_a_model_of_their_own_are_refused(models, message):
    with pytest.raises(ConfigError, match=message):
        load(Experiment, None, [f"models={models}"])
