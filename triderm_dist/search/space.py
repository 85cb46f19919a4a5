"""Search spaces: which settings of a model vary, and over which values."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from triderm_dist.config import COSMETIC, AugmentConfig, Experiment, ModelConfig, TrainConfig, build
from triderm_dist.schema import ConfigError
from triderm_dist.settings import merge, nest, read_mapping, untyped


@dataclass(frozen=True)
class Domain:
    """The values of a setting: both ends, included, of uniform, loguniform and randint; all values of choice."""

    kind: Literal["uniform", "loguniform", "randint", "choice"]
    values: tuple[Any, ...]

    def sample(self, generator: random.Random) -> Any:
        """Draw a value."""
        if self.kind == "choice":
            return generator.choice(self.values)
        low, high = self.values
        if self.kind == "randint":
            return generator.randint(low, high)
        if self.kind == "loguniform":
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        return generator.uniform(low, high)

    def __contains__(self, value: Any) -> bool:
        if self.kind == "choice":
            return value in self.values
        return self._may_hold(value) and bool(self.values[0] <= value <= self.values[1])

    def _may_hold(self, value: Any) -> bool:
        """Return whether a range of this kind, with other ends, holds a value."""
        if not _is_number(value) or (self.kind == "loguniform" and value <= 0):
            return False
        return self.kind != "randint" or value == int(value)

    def widened(self, value: Any) -> Domain:
        """Return the smallest domain of this kind that also holds `value`. Raises ConfigError if there is none."""
        if self.kind == "choice":
            return replace(self, values=(*self.values, value))
        if not self._may_hold(value):
            other = "uniform or choice" if _is_number(value) else "choice"
            raise ConfigError(
                f"the experiment's own value {value!r} cannot be part of a {self.kind} range; use {other}"
            )
        if self.kind == "randint":
            value = int(value)
        return replace(self, values=(min(value, self.values[0]), max(value, self.values[1])))

    def all_values(self) -> Iterable[Any]:
        """Return all values of a choice or of an integer range."""
        return self.values if self.kind == "choice" else range(self.values[0], self.values[1] + 1)

    def clipped(self, value: Any) -> Any:
        """Return the nearest value of this domain."""
        return value if self.kind == "choice" else min(max(value, self.values[0]), self.values[1])

    def distribution(self) -> Any:
        """Return this domain as a distribution of Optuna."""
        from optuna import distributions

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.values)
        if self.kind == "randint":
            return distributions.IntDistribution(*self.values)
        low, high = self.values
        return distributions.FloatDistribution(low, high, log=self.kind == "loguniform")

    def for_ray(self) -> Any:
        """Return this domain as a domain of Ray Tune."""
        from ray import tune

        if self.kind == "choice":
            return tune.choice(list(self.values))
        low, high = self.values
        if self.kind == "randint":
            return tune.randint(low, high + 1)
        return tune.loguniform(low, high) if self.kind == "loguniform" else tune.uniform(low, high)


Space = dict[str, Domain]
"""Dotted settings of a model, such as `train.loss.gamma` or `tower.freeze_clinical`, each with its domain."""


def rounded(value: Any) -> Any:
    """Round a drawn float to six digits, for settings that people read and write."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_space(path: Path) -> Space:
    """Read a YAML file of lines `SETTING: {uniform | loguniform | randint: [low, high]}` or `{choice: [...]}`.

    Raises ConfigError naming file and key.
    """
    raw = untyped(read_mapping(path, "search.space takes a YAML file, or a name that `triderm config list` shows"))
    if not raw:
        raise ConfigError(f"{path}: a space is a mapping of settings, such as train.loss.gamma: {{uniform: [0, 3]}}")
    return {key: _domain(f"{path}: {key}", value) for key, value in raw.items()}


def _domain(where: str, raw: Any) -> Domain:
    kinds = ("uniform", "loguniform", "randint", "choice")
    kind, values = next(iter(raw.items())) if isinstance(raw, dict) and len(raw) == 1 else (None, None)
    if kind not in kinds or not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: write one of {', '.join(kinds)} with a list, such as {{uniform: [0, 1]}}")
    if kind == "choice":
        if any(isinstance(value, dict | list) for value in values):
            raise ConfigError(f"{where}: choice takes scalars, not lists or mappings")
        return Domain("choice", tuple(dict.fromkeys(values)))
    if len(values) != 2 or not all(_is_number(value) for value in values) or not values[0] < values[1]:
        raise ConfigError(f"{where}: {kind} takes two numbers, the lower first")
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise ConfigError(f"{where}: randint takes integers")
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigError(f"{where}: loguniform takes numbers above 0")
    return Domain(kind, tuple(values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def with_settings(experiment: Experiment, model: str, settings: Mapping[str, Any]) -> Experiment:
    """Return the experiment with dotted `settings` of one model changed. Raises ConfigError as `config.load` does."""
    tree = experiment.model_dump(mode="json")
    for key, value in settings.items():
        tree = merge(tree, nest(["models", model, *key.split(".")], value))
    return build(Experiment, tree)


def own_settings(model: ModelConfig, keys: Iterable[str]) -> dict[str, Any]:
    """Return the present values of dotted settings of a model."""
    tree, values = model.model_dump(mode="json"), {}
    for key in keys:
        value: Any = tree
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ConfigError(f"{key}: the experiment sets no value for it; set one in the experiment")
            value = value[part]
        values[key] = value
    return values


def fit_space(space: Space, experiment: Experiment, model: str, where: str) -> tuple[Space, list[str]]:
    """Return the part of a space that has an effect in an experiment, widened to the experiment's own values, and notes
    on what was changed.

    Raises ConfigError for an unknown setting (with the nearest known one), for a range with values that a setting does
    not accept, and if nothing is left to vary.
    """
    generator = random.Random(0)
    for key, domain in space.items():
        if key == "train.epochs":
            raise ConfigError(f"{where}: train.epochs is the budget of a trial and cannot vary")
        for value in domain.values:
            _try(experiment, model, {key: value}, where)
    _try(experiment, model, {key: domain.sample(generator) for key, domain in space.items()}, where)

    config, notes = experiment.models[model], []
    unused = without_effect(config, space)
    notes += [f"{key} is left out: {reason}" for key, reason in unused.items()]
    fitted = {key: domain for key, domain in space.items() if key not in unused}
    for key, own in own_settings(config, fitted).items():
        if own not in fitted[key]:
            try:
                fitted[key] = fitted[key].widened(own)
            except ConfigError as error:
                raise ConfigError(f"{where}: {key}: {error}") from None
            notes.append(f"{key} is widened to the experiment's own value {own}")
        elif fitted[key].values == (own,):
            del fitted[key]
            notes.append(f"{key} is left out: its only value is the experiment's own, {own}")
    if not fitted:
        raise ConfigError(f"{where}: no setting of this space has effect here ({'; '.join(notes)})")
    if config.tower.cached and any(key.startswith(("tower.", "train.augment.")) for key in fitted):
        notes.append("tower and augment settings change what is cached of the tower: each trial computes it again")
    return fitted, notes


def _try(experiment: Experiment, model: str, settings: Mapping[str, Any], where: str) -> None:
    try:
        with_settings(experiment, model, settings)
    except ConfigError as error:
        text = str(error).replace(f"models.{model}.", "").replace("models.NAME.", "")
        raise ConfigError(f"{where}: {text}") from None


def without_effect(model: ModelConfig, keys: Iterable[str]) -> dict[str, str]:
    """Return the dotted settings that have no effect in this model, each with the reason."""
    keys = list(keys)
    return {
        key: rule.reason
        for rule in _rules(model)
        if rule.applies and not set(rule.depends_on) & set(keys)
        for key in keys
        if is_within(key, rule.unused)
    }


class _Rule(NamedTuple):
    """Settings that a model does not use. depends_on: those that decide whether the rule applies."""

    applies: bool
    depends_on: tuple[str, ...]
    unused: tuple[str, ...]
    reason: str


def _rules(model: ModelConfig) -> list[_Rule]:
    changes_no_result = ("seeds", *(f"train.{name}" for name in (*COSMETIC, "validate_every")))
    return [
        *_tower_rules(model),
        *_network_rules(model),
        *_train_rules(model.train),
        _Rule(True, (), changes_no_result, "it changes no result of a trial"),
    ]


def _tower_rules(model: ModelConfig) -> list[_Rule]:
    tower, augment = model.tower, model.train.augment
    return [
        _Rule(
            tower.frozen,
            ("tower.frozen",),
            (
                "tower.freeze_clinical",
                "tower.freeze_dermoscopic",
                "tower.cache_frozen_blocks",
                "tower.drop_path",
                "train.optim.layer_decay",
                "train.optim.unfreeze_epochs",
                "train.activation_checkpointing",
            ),
            "with tower.frozen no block of a tower is trained",
        ),
        _Rule(
            tower.cached and augment.token_variants == 0,
            ("tower.frozen", "tower.cache_frozen_blocks", "train.augment.token_variants"),
            tuple(f"train.augment.{name}" for name in AugmentConfig.pixel_keys()),
            "a frozen tower or cache_frozen_blocks with token_variants 0 uses unaugmented photos only",
        ),
        _Rule(
            not tower.cached,
            ("tower.frozen", "tower.cache_frozen_blocks"),
            ("tower.token_dtype", "train.augment.token_variants"),
            "nothing of the tower is cached",
        ),
    ]


def _network_rules(model: ModelConfig) -> list[_Rule]:
    return [
        _Rule(
            model.kind in ("dual_cnn", "mlp"),
            ("kind",),
            ("heads", "depth", "fusion", "mlp_ratio"),
            f"a network of kind {model.kind} has no such part",
        ),
        _Rule(
            "clinical" not in model.use,
            ("use",),
            ("tower.freeze_clinical", "train.augment.clinical_dropout", "train.augment.clinical_strength"),
            "the network does not use the clinical view",
        ),
        _Rule(
            "dermoscopic" not in model.use,
            ("use",),
            ("tower.freeze_dermoscopic", "train.augment.dermoscopic_dropout"),
            "the network does not use the dermoscopic view",
        ),
        _Rule(
            "concepts" not in model.use,
            ("use",),
            ("train.augment.concept_dropout",),
            "the network does not use concepts",
        ),
    ]


def _train_rules(train: TrainConfig) -> list[_Rule]:
    return [
        _Rule(
            not train.augment.mixes,
            ("train.augment.mixup", "train.augment.cutmix"),
            ("train.augment.unmixed_epochs",),
            "train.augment.mixup and cutmix are 0",
        ),
        _Rule(
            train.augment.unmixed_epochs >= train.epochs,
            ("train.augment.unmixed_epochs",),
            ("train.augment.mixup", "train.augment.cutmix"),
            f"train.augment.unmixed_epochs leaves none of {train.epochs} epochs with mixed lesions",
        ),
        _Rule(
            not train.loss.soft_f1_weight and not train.loss.terms,
            ("train.loss.soft_f1_weight", "train.loss.terms"),
            ("train.loss.soft_f1_sums",),
            "train.loss.soft_f1_weight is 0",
        ),
        _Rule(
            train.sampling.kind != "balanced",
            ("train.sampling.kind",),
            ("train.sampling.threshold", "train.sampling.power"),
            "train.sampling.kind is not balanced",
        ),
        *(
            _Rule(
                getattr(train.loss, weight) == 0,
                (f"train.loss.{weight}",),
                tuple(f"train.loss.{name}" for name in names),
                f"train.loss.{weight} is 0",
            )
            for weight, names in train.loss.USED_WITH.items()
        ),
    ]


def is_within(key: str, settings: Iterable[str]) -> bool:
    """Return whether a dotted key is one of the settings, or a setting within one of these sections."""
    return any(f"{key}.".startswith(f"{name}.") for name in settings)
