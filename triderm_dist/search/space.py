"""Spaces: which settings of a model vary, and where their values may lie."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from triderm_dist.config import COSMETIC, AugmentConfig, Experiment, ModelConfig, build
from triderm_dist.schema import ConfigError
from triderm_dist.settings import merge, nest, read_mapping, untyped


@dataclass(frozen=True)
class Domain:
    """Where a setting may lie: the ends, both included, of uniform, loguniform and randint; the values of choice."""

    kind: Literal["uniform", "loguniform", "randint", "choice"]
    values: tuple[Any, ...]

    def sample(self, generator: random.Random) -> Any:
        if self.kind == "choice":
            return generator.choice(self.values)
        low, high = self.values
        if self.kind == "randint":
            return generator.randint(low, high)
        if self.kind == "loguniform":
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        return generator.uniform(low, high)

    def __contains__(self, value: Any) -> bool:
        return value in self.values if self.kind == "choice" else self.values[0] <= value <= self.values[1]

    def widened(self, value: Any) -> Domain:
        """The smallest domain of this kind that holds `value` too. Raises ConfigError where there is none."""
        if self.kind == "choice":
            return replace(self, values=(*self.values, value))
        if not _is_number(value) or (self.kind == "loguniform" and value <= 0):
            raise ConfigError(f"the experiment's own value {value!r} fits no {self.kind} range; use uniform or choice")
        return replace(self, values=(min(value, self.values[0]), max(value, self.values[1])))

    def all_values(self) -> Iterable[Any]:
        """Of a choice, or of whole numbers."""
        return self.values if self.kind == "choice" else range(self.values[0], self.values[1] + 1)

    def clipped(self, value: Any) -> Any:
        """The nearest value of this domain."""
        return value if self.kind == "choice" else min(max(value, self.values[0]), self.values[1])

    def distribution(self) -> Any:
        """The same for Optuna."""
        from optuna import distributions

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.values)
        if self.kind == "randint":
            return distributions.IntDistribution(*self.values)
        low, high = self.values
        return distributions.FloatDistribution(low, high, log=self.kind == "loguniform")


Space = dict[str, Domain]
"""Dotted settings of a model, like `train.loss.gamma` or `tower.freeze_clinical`, each with its domain."""


def read_space(path: Path) -> Space:
    """The space of a YAML file: `SETTING: {uniform | loguniform | randint: [low, high]}` or `{choice: [...]}`.

    Raises ConfigError naming file and key.
    """
    raw = untyped(read_mapping(path, "search.space takes a YAML file, or a name that `triderm config list` shows"))
    if not raw:
        raise ConfigError(f"{path}: a space is a mapping of settings, like train.loss.gamma: {{uniform: [0, 3]}}")
    return {key: _domain(f"{path}: {key}", value) for key, value in raw.items()}


def _domain(where: str, raw: Any) -> Domain:
    kinds = ("uniform", "loguniform", "randint", "choice")
    kind, values = next(iter(raw.items())) if isinstance(raw, dict) and len(raw) == 1 else (None, None)
    if kind not in kinds or not isinstance(values, list) or not values:
        raise ConfigError(f"{where}: write one of {', '.join(kinds)} with a list, like {{uniform: [0, 1]}}")
    if kind == "choice":
        if any(isinstance(value, dict | list) for value in values):
            raise ConfigError(f"{where}: choice takes plain values, no lists or mappings")
        return Domain("choice", tuple(dict.fromkeys(values)))
    if len(values) != 2 or not all(_is_number(value) for value in values) or not values[0] < values[1]:
        raise ConfigError(f"{where}: {kind} takes two numbers, the lower first")
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise ConfigError(f"{where}: randint takes whole numbers")
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigError(f"{where}: loguniform takes numbers above 0")
    return Domain(kind, tuple(values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def with_settings(experiment: Experiment, model: str, settings: Mapping[str, Any]) -> Experiment:
    """The experiment with dotted `settings` laid over one of its models. Raises ConfigError as `config.load` does."""
    tree = experiment.model_dump(mode="json")
    for key, value in settings.items():
        tree = merge(tree, nest(["models", model, *key.split(".")], value))
    return build(Experiment, tree)


def own_settings(model: ModelConfig, keys: Iterable[str]) -> dict[str, Any]:
    """The values that dotted settings of a model have now."""
    tree, values = model.model_dump(mode="json"), {}
    for key in keys:
        value: Any = tree
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ConfigError(f"{key}: the experiment sets no value for it; give it one there")
            value = value[part]
        values[key] = value
    return values


def fit_space(space: Space, experiment: Experiment, model: str, where: str) -> tuple[Space, list[str]]:
    """The part of a space that has effect in an experiment, widened to its own settings; and what was changed, for
    people.

    Raises ConfigError for an unknown setting (with the nearest right one), for a range that reaches values that a
    setting can't take, and where nothing is left to vary.
    """
    generator = random.Random(0)
    for key, domain in space.items():
        if key == "train.epochs":
            raise ConfigError(f"{where}: train.epochs is the budget of a trial, it can't vary")
        for value in domain.values:
            _try(experiment, model, {key: value}, where)
    _try(experiment, model, {key: domain.sample(generator) for key, domain in space.items()}, where)

    config, notes = experiment.models[model], []
    idle = without_effect(config, space)
    notes += [f"{key} is left out: {why}" for key, why in idle.items()]
    fitted = {key: domain for key, domain in space.items() if key not in idle}
    if not fitted:
        raise ConfigError(f"{where}: no setting of this space has effect here ({'; '.join(notes)})")
    for key, own in own_settings(config, fitted).items():
        if own not in fitted[key]:
            try:
                fitted[key] = fitted[key].widened(own)
            except ConfigError as error:
                raise ConfigError(f"{where}: {key}: {error}") from None
            notes.append(f"{key} is widened to the experiment's own value {own}")
    if config.tower.frozen and any(key.startswith(("tower.", "train.augment.")) for key in fitted):
        notes.append("tower and augment settings change the frozen tower's tokens: trials compute them anew")
    return fitted, notes


def _try(experiment: Experiment, model: str, settings: Mapping[str, Any], where: str) -> None:
    try:
        with_settings(experiment, model, settings)
    except ConfigError as error:
        text = str(error).replace(f"models.{model}.", "").replace("models.NAME.", "")
        raise ConfigError(f"{where}: {text}") from None


def without_effect(model: ModelConfig, keys: Iterable[str]) -> dict[str, str]:
    """Those of the dotted settings that change nothing in this model, each with the reason."""
    train, keys = model.train, list(keys)
    rules: list[tuple[bool, tuple[str, ...], tuple[str, ...], str]] = [
        # whether, the settings it hangs on, the settings without effect, why
        (
            model.tower.frozen,
            ("tower.frozen",),
            (
                "tower.freeze_clinical",
                "tower.freeze_dermoscopic",
                "train.optim.layer_decay",
                "train.activation_checkpointing",
            ),
            "tower.frozen leaves no block of a tower to train",
        ),
        (
            model.tower.frozen and train.augment.token_variants == 0,
            ("tower.frozen", "train.augment.token_variants"),
            tuple(f"train.augment.{name}" for name in AugmentConfig.pixel_keys()),
            "a frozen tower with token_variants 0 sees the plain photos only",
        ),
        (
            train.sampling.kind != "balanced",
            ("train.sampling.kind",),
            ("train.sampling.threshold", "train.sampling.power"),
            "train.sampling.kind is not balanced",
        ),
        *(
            (
                getattr(train.loss, weight) == 0,
                (f"train.loss.{weight}",),
                tuple(f"train.loss.{name}" for name in names),
                f"train.loss.{weight} is 0",
            )
            for weight, names in train.loss.USED_WITH.items()
        ),
        (
            True,
            (),
            tuple(f"train.{name}" for name in COSMETIC),
            "it changes no result",
        ),
    ]  # fmt: skip
    return {
        key: why
        for holds, hangs_on, idle, why in rules
        if holds and not set(hangs_on) & set(keys)
        for key in keys
        if _is_within(key, idle)
    }


def _is_within(key: str, settings: Iterable[str]) -> bool:
    """Whether a dotted key is one of the settings, or lies below one."""
    return any(f"{key}.".startswith(f"{name}.") for name in settings)


def refuse_fixed(space: Space, model: ModelConfig, where: str) -> None:
    """Raise ConfigError for a setting that can't change in the course of a training, as population-based training has
    it, with the reason.
    """
    cached = tuple(f"train.augment.{name}" for name in [*AugmentConfig.pixel_keys(), "token_variants"])
    for key in space:
        if key.startswith("train.sampling."):
            why = "it decides how many steps an epoch has"
        elif key == "train.optim.warmup_epochs":
            why = "the warm-up is over when trials first change"
        elif _is_within(key, cached) and model.tower.frozen:
            why = "a frozen tower's tokens would be computed anew at each change"
        elif key == "dropout" or key.startswith(("train.loss.", "train.optim.", "train.augment.")):
            continue
        else:
            why = "the weights and the course of a training hang on it"
        raise ConfigError(
            f"{where}: {key} can't change in mid-training ({why}); leave it out of a space for pbt, or use "
            "scheduler=asha"
        )
