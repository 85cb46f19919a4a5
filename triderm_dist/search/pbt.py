"""Population-based training (Jaderberg et al., 2017), for `scheduler=pbt`.

ASHA and random search find one value per setting. A population also changes settings during a training: at intervals a
lagging trial copies the checkpoint of a leading one and perturbs its settings. So it finds schedules, such as a focal
exponent that grows, for the price of one training per trial; its result is a starting point, since best.yaml trains
with the last settings from the start.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from triderm_dist.config import AugmentConfig, ModelConfig
from triderm_dist.schema import ConfigError
from triderm_dist.search.results import format_settings
from triderm_dist.search.settings import BASELINE, SearchConfig, SearchRun
from triderm_dist.search.space import Space, is_within, rounded


def check_search(run: SearchRun) -> None:
    """Raise ConfigError for settings of a search that population-based training does not support."""
    settings = run.search
    if len(settings.folds) > 1:
        raise ConfigError("search.folds: pbt changes settings within the training of one fold; name one, such as [0]")
    if settings.workers > 1:
        raise ConfigError("search.workers: pbt trains a trial in one process; set it to 1, or use scheduler=asha")
    if settings.concurrent:
        raise ConfigError("search.concurrent: pbt alternates between all trials; leave it null, and set search.cpus")
    if settings.exploit_epochs >= run.epochs:
        raise ConfigError(
            f"search.exploit_epochs={settings.exploit_epochs}: a trial has {run.epochs} epochs, so none would copy "
            "another; set it to fewer"
        )
    if settings.trials < 3:
        raise ConfigError("search.trials: pbt needs the baseline and at least two trials that copy one another")


def check_space(space: Space, model: ModelConfig, where: str) -> None:
    """Raise ConfigError, with the reason, for a setting that cannot change during a training."""
    cached = tuple(f"train.augment.{name}" for name in [*AugmentConfig.pixel_keys(), "token_variants"])
    for key, domain in space.items():
        if key.startswith("train.sampling."):
            reason = "it decides the number of steps per epoch"
        elif key == "train.optim.warmup_epochs":
            reason = "the warm-up is over when settings first change"
        elif is_within(key, cached) and model.tower.cached:
            reason = "each change would compute what is cached of the tower again"
        elif key == "train.loss.fine_weight" and 0 in domain:
            reason = "with a weight of 0 the network has no head for finer labels"
        elif is_within(key, ("train.optim.name", "train.optim.settings")):
            reason = "the state of the optimizer depends on it"
        elif key == "dropout" or key.startswith(("train.loss.", "train.optim.", "train.augment.")):
            continue
        else:
            reason = "weights and progress of a training depend on it"
        raise ConfigError(
            f"{where}: {key} cannot change during a training ({reason}); remove it from a space for pbt, or use "
            "scheduler=asha"
        )


def scheduler(settings: SearchConfig, space: Space, epochs: int, number_of: Callable[[Any], int]) -> Any:
    """Return Ray's scheduler; the baseline copies no other trial.

    epochs: of a trial.  number_of: returns the number of a trial of Ray.
    """
    from ray.tune.schedulers import PopulationBasedTraining

    class Population(PopulationBasedTraining):
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if result["epoch"] >= epochs:  # nothing is left to train
                return self.CONTINUE
            return super().on_trial_result(tune_controller, trial, result)

        def _quantiles(self) -> tuple[list[Any], list[Any]]:
            lower, upper = super()._quantiles()
            return [trial for trial in lower if number_of(trial) != BASELINE], upper

        def _checkpoint_or_exploit(self, trial: Any, *others: Any) -> None:
            # Ray draws from both global generators, of which other code draws as well.
            seed = [settings.seed, number_of(trial), self._trial_state[trial].last_train_time]
            random.seed(str(seed))
            np.random.seed(seed)
            super()._checkpoint_or_exploit(trial, *others)

        def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            for _ in range(100):  # at an end of its range, a setting may be clipped to the value that it had
                config, operations = super()._get_new_config(trial, trial_to_clone)
                if config != trial_to_clone.config:
                    break
            return config, operations

        def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
            # Ray remembers a stop for a trial whose own checkpoint is still being saved, and would stop it as soon as
            # it has resumed. That checkpoint is not needed.
            trial.temporary_state.saving_to = None
            super()._exploit(tune_controller, trial, trial_to_clone)
            copied = f"trial {number_of(trial)} copies trial {number_of(trial_to_clone)}"
            print(copied, format_settings(trial.config), sep="  ", flush=True)

    return Population(
        time_attr="epoch",
        perturbation_interval=settings.exploit_epochs,
        synch=True,  # wait for all trials, so that the result does not depend on the speed of processes
        hyperparam_mutations={
            key: list(domain.values) if domain.kind == "choice" else domain.for_ray() for key, domain in space.items()
        },
        # Ray's factors of 0.8 and 1.2 may leave the space.
        custom_explore_fn=lambda config: {key: rounded(space[key].clipped(value)) for key, value in config.items()},
        log_config=False,
    )
