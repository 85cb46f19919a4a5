"""Search spaces are validated before a trial starts, and widened to the experiment."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.processes import ROOT
from tests.search.conftest import space_file
from triderm_dist.config import Experiment, load
from triderm_dist.schema import ConfigError
from triderm_dist.search.pbt import check_space
from triderm_dist.search.space import (
    Domain,
    fit_space,
    own_settings,
    read_space,
    with_settings,
    without_effect,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.loss.gama: {uniform: [0, 3]}", r"unknown setting 'train.loss.gama'; did you mean 'train.loss.gamma'\?"),
        ("train.optim.lr: {uniform: [-1, 1]}", "train.optim.lr: input should be greater than 0"),
        ("train.loss.label_smoothing: {uniform: [0, 1]}", "train.loss.label_smoothing: input should be less than 1"),
        ("train.epochs: {randint: [2, 9]}", "train.epochs is the budget of a trial"),
        ("train.loss: {choice: [1]}", "train.loss: a section of settings; write train.loss.NAME=VALUE"),
        ("width: {choice: [64, 65]}", "width 65 is not a multiple of heads"),
        ("tower.freeze_clinical: {uniform: [0, 3]}", "tower.freeze_clinical: input should be a valid integer"),
        ("train.loss.gamma: {uniform: [3, 0]}", "two numbers, the lower first"),
        ("train.loss.gamma: {normal: [0, 3]}", "write one of uniform, loguniform, randint, choice"),
        ("train.loss.gamma: 3", "write one of uniform"),
        ("train.optim.lr: {loguniform: [0, 1e-3]}", "loguniform takes numbers above 0"),
        ("use: {choice: [[clinical]]}", "choice takes scalars"),
        ("train.loss.gamma: {choice: [2.0, 2.0]}", r"effect here \(.*gamma is left out: its only value is .* own, 2.0"),
        ("train.log_every: {randint: [1, 5]}", "no setting of this space has effect"),
        ("train.validate_every: {choice: [1, 2]}", "no setting of this space has effect"),
        ("", "a space is a mapping of settings"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_invalid_space_gives_one_line(tmp_path, text, message):
    path = space_file(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        fit_space(read_space(path), Experiment(), "trimodal", str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("name", ["losses", "llrd", "all"])
@pytest.mark.parametrize("experiment", ["demo", "milk10k", "milk10k_cpu"])
def test_shipped_spaces_match_the_shipped_experiments(name, experiment):
    config = load(Experiment, ROOT / "launch" / "experiments" / f"{experiment}.yaml")
    for model in config.models:
        space, notes = fit_space(read_space(ROOT / "tune" / "spaces" / f"{name}.yaml"), config, model, name)
        frozen = config.models[model].tower.frozen
        left_out = [note for note in notes if "left out" in note]
        shuffled = config.models[model].train.sampling.kind == "shuffle"  # without a power of repetition
        assert len(left_out) == (3 if frozen and name != "losses" else 0) + (shuffled and name != "llrd")
        assert ("train.optim.layer_decay" in space) == (name != "losses" and not frozen)


@pytest.mark.parametrize("experiment", ["demo", "milk10k", "milk10k_cpu"])
def test_space_of_the_recipe_fits_the_shipped_experiments(experiment):
    config = load(Experiment, ROOT / "launch" / "experiments" / f"{experiment}.yaml")
    for model in config.models:
        space, _ = fit_space(read_space(ROOT / "tune" / "spaces" / "recipe.yaml"), config, model, "recipe")
        frozen = config.models[model].tower.frozen
        assert {"train.augment.mixup", "train.optim.head_lr_multiple"} <= set(space)
        assert ({"tower.drop_path", "train.optim.unfreeze_epochs"} <= set(space)) == (not frozen)


def test_space_all_is_the_union_of_the_other_two():
    losses, llrd, both = (read_space(ROOT / "tune" / "spaces" / f"{name}.yaml") for name in ("losses", "llrd", "all"))
    assert both == losses | llrd


@given(
    domain=st.one_of(
        st.tuples(st.floats(1e-6, 1), st.floats(1.5, 9)).map(lambda ends: Domain("uniform", ends)),
        st.tuples(st.floats(1e-6, 1), st.floats(1.5, 9)).map(lambda ends: Domain("loguniform", ends)),
        st.tuples(st.integers(0, 4), st.integers(5, 9)).map(lambda ends: Domain("randint", ends)),
        st.just(Domain("choice", ("shuffle", "balanced"))),
    ),
    seed=st.integers(0, 99),
)
def test_samples_lie_in_their_domain_as_in_optuna(domain, seed):
    value = domain.sample(random.Random(seed))
    distribution = domain.distribution()
    # exp(log(x)) has a rounding error at the bounds
    assert value in domain or value == pytest.approx(domain.values[0]) or value == pytest.approx(domain.values[1])
    assert distribution.to_external_repr(distribution.to_internal_repr(value)) == value
    ends = domain.values if domain.kind == "choice" else (distribution.low, distribution.high)
    assert tuple(ends) == domain.values


def test_space_is_widened_to_include_the_experiments_settings():
    experiment = load(Experiment, None, ["train.optim.lr=0.01", "models.a.train.loss.gamma=5"])
    space = {"train.optim.lr": Domain("loguniform", (1e-5, 1e-3)), "train.loss.gamma": Domain("choice", (0.0, 1.0))}
    fitted, notes = fit_space(space, experiment, "a", "space.yaml")
    assert fitted["train.optim.lr"].values == (1e-5, 0.01)
    assert fitted["train.loss.gamma"].values == (0.0, 1.0, 5.0)
    assert len(notes) == 2 and "0.01" in notes[0]
    experiment = load(Experiment, None, ["models.a.train.loss.gamma=0"])
    with pytest.raises(
        ConfigError, match=r"space.yaml: train.loss.gamma: the experiment's own value 0.0 cannot be part of"
    ):
        fit_space({"train.loss.gamma": Domain("loguniform", (0.5, 2.0))}, experiment, "a", "space.yaml")


def test_range_of_integers_takes_integers_only(tmp_path):
    """Else Optuna refuses the experiment's own value when all trials have ended."""
    key = "train.loss.gamma"
    for own, domain in ((2.5, Domain("randint", (1, 3))), (2.5, Domain("randint", (3, 5)))):
        with pytest.raises(ConfigError, match=rf"{key}: .* own value 2.5 cannot be part of a randint range; use unif"):
            fit_space({key: domain}, load(Experiment, None, [f"models.a.{key}={own}"]), "a", "space.yaml")
    fitted, _ = fit_space({key: Domain("randint", (3, 5))}, load(Experiment, None, [f"models.a.{key}=2"]), "a", "s")
    assert fitted[key].values == (2, 5) and all(isinstance(end, int) for end in fitted[key].values)
    no_size = load(Experiment, None, ["models.a.width=64"])
    assert no_size.models["a"].tower.image_size is None
    with pytest.raises(ConfigError, match=r"own value None cannot be part of a randint range; use choice"):
        fit_space({"tower.image_size": Domain("randint", (192, 256))}, no_size, "a", "space.yaml")


def test_plugin_setting_can_be_searched_if_the_experiment_sets_it():
    key = "train.augment.extra.random_erasing.share"
    space = {key: Domain("uniform", (0.05, 0.2))}
    fitted, _ = fit_space(space, load(Experiment, None, [f"models.a.{key}=0.3"]), "a", "space.yaml")
    assert fitted[key].values == (0.05, 0.3)
    with pytest.raises(ConfigError, match=f"{key}: the experiment sets no value for it"):
        fit_space(space, load(Experiment, None, ["models.a.width=64"]), "a", "space.yaml")


def test_settings_of_one_model_override_shared_ones():
    experiment = load(Experiment, None, ["train.loss.gamma=1", "models.a.width=64", "models.b.width=64"])
    changed = with_settings(experiment, "b", {"train.loss.gamma": 0.5, "tower.freeze_clinical": 2})
    assert own_settings(changed.models["b"], ["train.loss.gamma", "tower.freeze_clinical"]) == {
        "train.loss.gamma": 0.5,
        "tower.freeze_clinical": 2,
    }
    assert changed.models["a"] == experiment.models["a"]
    assert with_settings(changed, "b", own_settings(experiment.models["b"], ["train.loss.gamma"])).models[
        "b"
    ].train == (experiment.models["b"].train)


def test_keys_without_effect_are_refused_unless_another_key_varies():
    frozen = load(Experiment, None, ["models.a.tower.frozen=true"]).models["a"]
    idle = without_effect(frozen, ["train.optim.layer_decay", "train.optim.lr"])
    assert list(idle) == ["train.optim.layer_decay"] and "tower.frozen" in idle["train.optim.layer_decay"]
    assert not without_effect(frozen, ["train.optim.layer_decay", "tower.frozen"])
    augment = [f"train.augment.{key}" for key in ("rotation", "extra.random_erasing.share", "concept_dropout")]
    assert list(without_effect(frozen, augment)) == augment[:2]
    plain = load(Experiment, None, ["models.a.train.loss.focal_weight=0"]).models["a"]
    assert set(without_effect(plain, ["train.loss.gamma", "train.optim.layer_decay"])) == {"train.loss.gamma"}


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["train.epochs=3"], ["train.augment.mixup", "train.augment.cutmix"]),
        ([], ["train.augment.unmixed_epochs"]),
        ([], ["tower.token_dtype", "train.augment.token_variants"]),
        (["models.a.kind=dual_cnn"], ["heads", "depth", "fusion", "mlp_ratio"]),
        (["models.a.use=dermoscopic"], ["tower.freeze_clinical", "train.augment.clinical_dropout"]),
        (["models.a.use=clinical"], ["tower.freeze_dermoscopic", "train.augment.concept_dropout"]),
        (["train.loss.soft_f1_weight=0"], ["train.loss.soft_f1_sums"]),
        ([], ["seeds", "train.validate_every"]),
    ],
)
def test_keys_whose_condition_does_not_hold_have_no_effect(words, keys):
    model = load(Experiment, None, ["models.a.width=64", *words]).models["a"]
    assert list(without_effect(model, [*keys, "train.optim.lr"])) == keys
    wide = ["models.a={width: 64, tower: {frozen: true}}", "train={epochs: 9, augment: {mixup: 0.4}}"]
    possible = load(Experiment, None, wide).models["a"]
    frozen, trial = ("tower.freeze_clinical", "tower.freeze_dermoscopic"), ("seeds", "train.validate_every")
    assert set(without_effect(possible, keys)) == {key for key in keys if key in (*frozen, *trial)}


@pytest.mark.parametrize("domain", [Domain("uniform", (0.0, 1.0)), Domain("choice", (0.5, 0))])
def test_pbt_keeps_the_head_of_finer_labels(domain):
    model = load(Experiment, None, ["models.a.train.loss.fine_weight=0.5"]).models["a"]
    check_space({"train.loss.fine_weight": Domain("uniform", (0.1, 1.0))}, model, "space.yaml")
    with pytest.raises(ConfigError, match=r"fine_weight cannot change .* no head for finer labels"):
        check_space({"train.loss.fine_weight": domain}, model, "space.yaml")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.optim.name", "the state of the optimizer"),
        ("train.optim.settings.amsgrad", "the state of the optimizer"),
        ("train.sampling.power", "the number of steps per epoch"),
        ("train.optim.warmup_epochs", "warm-up is over"),
        ("train.augment.rotation", "each change would compute what is cached"),
        ("train.augment.token_variants", "each change would compute what is cached"),
        ("train.augment.extra.random_erasing.share", "each change would compute what is cached"),
        ("width", "weights and progress of a training depend on it"),
        ("train.ema_decay", "weights and progress of a training depend on it"),
    ],
)
def test_pbt_refuses_settings_fixed_during_a_training(key, message):
    model = load(Experiment, None, ["models.a.tower.frozen=true"]).models["a"]
    space = read_space(ROOT / "tune" / "spaces" / "pbt.yaml")
    check_space(space, model, "pbt.yaml")
    with pytest.raises(ConfigError, match=rf"space.yaml: {key} cannot change during a training \(.*{message}"):
        check_space({**space, key: Domain("uniform", (0.0, 1.0))}, model, "space.yaml")
