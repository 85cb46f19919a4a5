"""Ablation of the tri-modal network and its training: all folds again without each part, paired differences.

python -m benchmarks.ablation --config RUN/config.yaml [parts=[view_alignment, soft_f1]]

Trains the first tri-modal network of the settings unchanged, and once without each part, on the same folds, seed and
frozen tokens, into RUN/ablation; finished folds are skipped. The score is the out-of-fold macro F1 by the official
rule with thresholds fitted on the other folds; the difference is full minus without, paired over the lesions. One seed:
differences within the interval are noise. The last line is one JSON object.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from pydantic import Field

from benchmarks.nested import nested_decisions
from triderm_dist import config as settings
from triderm_dist import intervals, metrics
from triderm_dist.cli import run
from triderm_dist.config import Experiment
from triderm_dist.ensemble.calibration import probabilities_of
from triderm_dist.predictions import OofTable, gather, labeled
from triderm_dist.schema import ConfigError

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


def main(config: AblationRun) -> None:
    if unknown := set(config.parts) - set(WITHOUT):
        raise ConfigError(f"parts: {min(unknown)!r} is not a part; known: {', '.join(WITHOUT)}")
    name = next((name for name, model in config.models.items() if model.kind == "trimodal"), None)
    if name is None:
        raise ConfigError("models: none has kind=trimodal; add one to ablate")
    tables = {FULL: train_without(config, name, FULL, {})}
    for part in config.parts:
        tables[part] = train_without(config, name, part, WITHOUT[part])
    print_scores(config, name, tables)


def train_without(config: AblationRun, name: str, part: str, change: dict[str, Any]) -> OofTable:
    """Train the folds of the network without a part that are not trained yet; return its out-of-fold table."""
    from triderm_dist.data.shards.open import open_index
    from triderm_dist.engine.crossval import run_folds
    from triderm_dist.engine.fold import assigned_folds

    raw = config.model_dump(mode="json", exclude={"parts"})
    raw |= {
        "output": str(config.folder / "ablation" / part),
        "models": {name: settings.merge(raw["models"][name], change)},
    }
    raw |= {"tokens": str(config.token_folder)}
    experiment = settings.build(Experiment, raw)
    index = open_index(config.train_shards, config.data.remote)
    run_folds(experiment, index, [name], range(experiment.data.folds))
    table = gather(
        experiment.folder, (name,), index.lesion_ids.tolist(), index.labels, assigned_folds(index, experiment.data)
    )
    return table.take(labeled(table))


def print_scores(config: AblationRun, name: str, tables: dict[str, OofTable]) -> None:
    """Print the nested score of each variant, and as the last line the JSON object."""
    labels, resamples = tables[FULL].labels, config.ensemble.bootstrap
    scores: dict[str, Any] = {}
    decisions: dict[str, np.ndarray] = {}
    print(f"{len(labels)} lesions; nested macro F1 and gain of the part (full minus without), 95% intervals")
    for part, table in tables.items():
        probabilities = probabilities_of(table.logits[name], table.heads[name])
        decisions[part] = nested_decisions(probabilities, table, config)
        score = intervals.macro_f1(decisions[part], labels, tables[FULL].groups)
        adds = intervals.paired_difference(
            decisions[FULL], decisions[part], labels, tables[FULL].groups, resamples, config.seed
        )
        argmax = metrics.argmax_macro_f1(probabilities, labels)
        label = part if part == FULL else f"without {part.replace('_', ' ')}"
        print(f"{label:<26} {score!s:<22} argmax {argmax:.3f}   {'' if part == FULL else adds}")
        scores[part] = {"nested": round(score.value, 4), "adds": round(adds.value, 4), "low": round(adds.low, 4)}
    print(json.dumps(scores))


if __name__ == "__main__":
    run(AblationRun, main, __doc__)
