"""The ingredients of the fine-tuning recipe, one at a time: all folds again with each, paired differences.

python -m benchmarks.ingredients --config FILE output=FOLDER [model=NAME] [parts=[mixup, ema]] [seeds=3]

Trains one model of the settings unchanged and with each ingredient, with each of several seeds on the same folds, into
FOLDER; finished folds are skipped. Scores are out of fold: macro F1 by the official rule with thresholds fitted on the
other folds, of all diagnoses and without the rarest one, by argmax, mean AUC and the negative log-likelihood. The
difference is with minus without, for the same seed; its interval is over lesions and seeds
(`intervals.mean_over_seeds`). The last line is one JSON object.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from pydantic import Field

from benchmarks.nested import SeedScores, header
from triderm_dist.cli import run
from triderm_dist.config import Experiment, build, seed_names
from triderm_dist.ensemble.calibration import probabilities_of
from triderm_dist.predictions import DataSplit, OofTable, gather, labeled
from triderm_dist.schema import ConfigError
from triderm_dist.settings import merge

WITH: dict[str, dict[str, Any]] = {
    "label_smoothing": {"train": {"loss": {"label_smoothing": 0.05}}},
    "mixup": {"train": {"augment": {"mixup": 0.4}}},
    "cutmix": {"train": {"augment": {"cutmix": 1.0}}},
    "ema": {"train": {"ema_decay": 0.999}},
    "swa": {"train": {"swa_epochs": 4}},
    "mixup_ema_smoothing": {
        "train": {"ema_decay": 0.999, "loss": {"label_smoothing": 0.05}, "augment": {"mixup": 0.4}}
    },
    "whole_frame": {"tower": {"frame": "whole"}},
    "squashed_frame": {"tower": {"frame": "squash"}},
    "head_lr": {"train": {"optim": {"head_lr_multiple": 5.0}}},
    "drop_path": {"tower": {"drop_path": 0.2}},
    "unfreezing": {"train": {"optim": {"unfreeze_epochs": 0.5}}},
    "aspect": {"train": {"augment": {"aspect": 0.2}}},
    "hue": {"train": {"augment": {"extra": {"hue": {"clinical": 15, "dermoscopic": 10}}}}},
    "cutout": {"train": {"augment": {"extra": {"cutout": {"clinical": 0.4, "dermoscopic": 0.4}}}}},
}
PLAIN = "plain"


class IngredientsRun(Experiment):
    model: str | None = Field(None, description="the model to train; null: the first one")
    parts: tuple[str, ...] = Field(
        ("label_smoothing", "mixup", "ema", "swa"), description=f"ingredients, one at a time: {', '.join(WITH)}"
    )
    seeds: int = Field(3, ge=1, description="trainings of each variant, with the seeds `seed`, `seed` + 1, ...")


def main(config: IngredientsRun) -> None:
    if unknown := set(config.parts) - set(WITH):
        raise ConfigError(f"parts: {min(unknown)!r} is not an ingredient; known: {', '.join(WITH)}")
    name = config.model or next(iter(config.models))
    if name not in config.models:
        raise ConfigError(f"model: {name!r} is not a model of the settings; known: {', '.join(config.models)}")
    print_scores(config, train(config, name))


def train(config: IngredientsRun, name: str) -> OofTable:
    """Train all folds of all variants that are not trained yet; return the out-of-fold table of all."""
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.crossval import run_folds
    from triderm_dist.engine.fold import assigned_folds

    raw = config.model_dump(mode="json", exclude={"model", "parts", "seeds"})
    changes: dict[str, dict[str, Any]] = {PLAIN: {}, **{part: WITH[part] for part in config.parts}}
    model = {**raw["models"][name], "seeds": config.seeds}
    raw["models"] = {part: merge(model, change) for part, change in changes.items()}
    experiment = build(Experiment, raw)
    index = open_index(experiment.train_shards, experiment.data.remote)
    names = list(experiment.models)
    run_folds(experiment, index, names, range(experiment.data.folds))
    data = DataSplit(index.lesion_ids, index.labels, assigned_folds(index, experiment.data))
    table = gather(experiment.folder, names, data)
    return table.take(labeled(table))


def print_scores(config: IngredientsRun, table: OofTable) -> None:
    """Print a row for each variant, and as the last line the JSON object."""
    plain: SeedScores | None = None
    result: dict[str, Any] = {}
    print(
        f"{len(table.labels)} lesions, {config.seeds} seeds; means over seeds, with the standard deviation of nested "
        "macro F1"
    )
    print(f"{header(table)}   with minus without, 95%")
    for part in (PLAIN, *config.parts):
        names = seed_names(part, config.seeds)
        scores = SeedScores.of([probabilities_of(table.logits[n], table.heads[n]) for n in names], table, config)
        plain = plain or scores
        gain = scores.minus(plain, table, config)
        print(f"{scores.row(part)}   {'' if part == PLAIN else gain}")
        result[part] = {"nested": round(float(np.mean(scores.nested)), 4), "gain": round(gain.value, 4)}
    print(json.dumps(result))


if __name__ == "__main__":
    run(IngredientsRun, main, __doc__)
