"""Score the models of a run over their seeds, or compare them with those of another run on the same lesions and folds.

python -m benchmarks.seeds run=RUN [other=RUN] [combine=[mlp+mlp_both]]

Prints for each model of RUN the means over its seeds, and the scores of the mean of its seeds' probabilities; with
`other` also how much its model of that name gains over RUN's, with an interval over lesions and seeds. `combine` adds
plain means of several models. Thresholds are fitted on the other folds. The last line is one JSON object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from benchmarks.nested import SeedScores, header
from triderm_dist.cli import run
from triderm_dist.config import Experiment, load_run, seed_names
from triderm_dist.ensemble.calibration import probabilities_of
from triderm_dist.ensemble.run_files import OOF_FILE
from triderm_dist.predictions import OofTable, labeled, read_oof
from triderm_dist.schema import ConfigError
from triderm_dist.settings import PathText, Section


class SeedsRun(Section):
    run: PathText = Field(description="folder of a run with out-of-fold predictions")
    other: PathText | None = Field(None, description="folder of a run to compare with it")
    combine: tuple[str, ...] = Field((), description="means of several models, as mlp+dual_cnn")


def main(config: SeedsRun) -> None:
    first = read(config.run)
    runs = [first, *([read(config.other)] if config.other else [])]
    config_of_run, table, models = first
    for _, others, _ in runs:
        if not (np.array_equal(others.lesion_ids, table.lesion_ids) and np.array_equal(others.folds, table.folds)):
            raise ConfigError(f"other={config.other}: has other lesions or folds than {config.run}")
    for name in (name for text in config.combine for name in text.split("+")):
        if any(name not in found for *_, found in runs):
            raise ConfigError(f"combine: {name!r} is not a model of every run; known: {', '.join(models)}")
    print(f"{len(table.labels)} lesions; means over seeds, with the standard deviation of nested macro F1")
    print(header(table))
    result: dict[str, Any] = {}
    for name in models:
        found = [each[name] for _, _, each in runs if name in each]
        seeds = min(len(each) for each in found)
        scores = [SeedScores.of(each[:seeds], table, config_of_run) for each in found]
        print("\n".join(one.row(label(name, number)) for number, one in enumerate(scores)))
        result[name] = {"nested": round(float(np.mean(scores[0].nested)), 4)}
        if len(scores) == 2:
            gain = scores[1].minus(scores[0], table, config_of_run)
            print(f"{'':<6}other minus this: {gain}")
            result[name] |= {"other": round(float(np.mean(scores[1].nested)), 4), "gain": round(gain.value, 4)}
    for text in dict.fromkeys([*(name for name in models if len(models[name]) > 1), *config.combine]):
        for number, (_, _, each) in enumerate(runs):
            if all(name in each for name in text.split("+")):
                mean = np.mean([np.mean(each[name], axis=0) for name in text.split("+")], axis=0)
                print(SeedScores.of([mean], table, config_of_run).row(label(f"mean of {text}", number)))
    print(json.dumps(result))


def label(name: str, number: int) -> str:
    return f"{name}, other" if number else name


def read(folder: str) -> tuple[Experiment, OofTable, dict[str, list[np.ndarray]]]:
    """Return the settings of a run, its labeled lesions, and each model's probabilities (N, C) by seed."""
    experiment = load_run(Experiment, folder)
    table = read_oof(Path(folder) / OOF_FILE)
    table = table.take(labeled(table))
    models = {}
    for name, model in experiment.models.items():
        if seeds := [each for each in seed_names(name, model.seeds) if model.seeds and each in table.models]:
            models[name] = [probabilities_of(table.logits[each], table.heads[each]) for each in seeds]
    return experiment, table, models


if __name__ == "__main__":
    run(SeedsRun, main, __doc__)
