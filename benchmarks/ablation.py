"""Ablation of the tri-modal network and its training: all folds again without each part, paired differences.

python -m benchmarks.ablation run=RUN [parts=[view_alignment, soft_f1]] [seeds=3]

Trains the first tri-modal network of the settings unchanged, and once without each part, with each of several seeds on
the same folds and frozen tokens, into RUN/ablation; finished folds are skipped. The score is the out-of-fold macro F1
by the official rule with thresholds fitted on the other folds. The difference is full minus without, with the same
seed; its interval is over lesions and seeds (`intervals.mean_over_seeds`). The last line is one JSON object.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from pydantic import Field

from benchmarks.nested import SeedScores, header
from triderm_dist.cli import run
from triderm_dist.config import Experiment, build
from triderm_dist.ensemble.calibration import probabilities_of
from triderm_dist.predictions import DataSplit, OofTable, gather, labeled
from triderm_dist.schema import ConfigError
from triderm_dist.settings import merge

WITHOUT: dict[str, dict[str, Any]] = {
    "view_alignment": {"fusion": ["semantic_gating"]},
    "semantic_gating": {"fusion": ["view_alignment"]},
    "metadata": {"use": ["clinical", "dermoscopic", "concepts"]},
    "auxiliary_losses": {"train": {"loss": {"aux_weight": 0.0}}},
    "soft_f1": {"train": {"loss": {"soft_f1_weight": 0.0, "focal_weight": 1.0}}},
    "balanced_plan": {"train": {"sampling": {"kind": "shuffle"}}},
    "view_dropout": {"train": {"augment": {"clinical_dropout": 0.0, "dermoscopic_dropout": 0.0}}},
    "concept_dropout": {"train": {"augment": {"concept_dropout": 0.0}}},
}
FULL = "full"


class AblationRun(Experiment):
    parts: tuple[str, ...] = Field(
        tuple(WITHOUT), description=f"parts to leave out, one at a time: {', '.join(WITHOUT)}"
    )
    seeds: int = Field(3, ge=1, description="trainings of each variant, with the seeds `seed`, `seed` + 1, ...")


def main(config: AblationRun) -> None:
    if unknown := set(config.parts) - set(WITHOUT):
        raise ConfigError(f"parts: {min(unknown)!r} is not a part; known: {', '.join(WITHOUT)}")
    name = next((name for name, model in config.models.items() if model.kind == "trimodal"), None)
    if name is None:
        raise ConfigError("models: none has kind=trimodal; add one to ablate")
    changes = {FULL: {}, **{part: WITHOUT[part] for part in config.parts}}
    print_scores(
        config,
        name,
        {
            part: [train_without(config, name, part, change, number) for number in range(config.seeds)]
            for part, change in changes.items()
        },
    )


def train_without(config: AblationRun, name: str, part: str, change: dict[str, Any], number: int) -> OofTable:
    """Train the folds of the network without a part that are not trained yet; return its out-of-fold table.

    number: of the seed, from 0.
    """
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.crossval import run_folds
    from triderm_dist.engine.fold import assigned_folds

    raw = config.model_dump(mode="json", exclude={"parts", "seeds"})
    raw |= {
        "output": str(config.folder / "ablation" / part),
        "models": {name: merge(raw["models"][name], change)},
    }
    raw |= {"tokens": str(config.token_folder)}
    if number:
        raw |= {
            "output": f"{raw['output']}-seed-{config.seed + number}",
            "seed": config.seed + number,
            "token_seed": config.seed_of_tokens,
        }
    experiment = build(Experiment, raw)
    index = open_index(config.train_shards, config.data.remote)
    run_folds(experiment, index, [name], range(experiment.data.folds))
    data = DataSplit(index.lesion_ids, index.labels, assigned_folds(index, experiment.data))
    table = gather(experiment.folder, (name,), data)
    return table.take(labeled(table))


def print_scores(config: AblationRun, name: str, tables: dict[str, list[OofTable]]) -> None:
    """Print the nested score of each variant, and as the last line the JSON object. tables: of each seed."""
    first = tables[FULL][0]
    full: SeedScores | None = None
    result: dict[str, Any] = {}
    print(
        f"{len(first.labels)} lesions, {config.seeds} seeds; means over seeds, with the standard deviation of nested "
        "macro F1; gain of the part (full minus without) with its 95% interval over lesions and seeds"
    )
    print(header(first))
    for part, each in tables.items():
        scores = SeedScores.of([probabilities_of(one.logits[name], one.heads[name]) for one in each], first, config)
        full = full or scores
        adds = full.minus(scores, first, config)
        label = part if part == FULL else f"without {part.replace('_', ' ')}"
        print(f"{scores.row(label)}   {'' if part == FULL else adds}")
        result[part] = {"nested": round(float(np.mean(scores.nested)), 4), "adds": round(adds.value, 4)}
        if config.seeds > 1:
            result[part]["low"] = round(adds.low, 4)
    print(json.dumps(result))


if __name__ == "__main__":
    run(AblationRun, main, __doc__)
