"""Held-out macro F1 of the tri-modal network with all modalities, and without each.

python -m benchmarks.modalities --config demo [seeds=3] [key.subkey=value ...]

Needs data.test_truth; demo.yaml's comes with make demo. The networks go into the folder `modalities` next to `output`.
Each is trained with several seeds on the same folds; the score is the held-out macro F1 by the official rule,
thresholds fitted out of fold. The difference is all modalities minus the others, with the same seed; its interval is
over lesions and seeds (`intervals.mean_over_seeds`). The last line is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
from pydantic import Field

from triderm_dist import intervals, metrics
from triderm_dist.cli import run
from triderm_dist.config import Experiment, build, save
from triderm_dist.config.model import Modality
from triderm_dist.schema import ConfigError, Task

MODALITIES = get_args(Modality)
ALL = "all"


class ModalitiesRun(Experiment):
    seeds: int = Field(3, ge=1, description="trainings of each network, with the seeds `seed`, `seed` + 1, ...")
    without: list[Modality] = Field(list(MODALITIES), description="modalities to leave out, one after the other")


def main(config: ModalitiesRun) -> None:
    if not config.data.test_truth:
        raise ConfigError("data.test_truth: needed to score; run make demo, then use --config demo")
    folders: dict[str, list[Path]] = {}
    for left_out in (None, *config.without):
        label = f"without {left_out}" if left_out else ALL
        kept = tuple(modality for modality in MODALITIES if modality != left_out)
        folders[label] = [trained(config, label, kept, number) for number in range(config.seeds)]
    print_scores(config, folders)


def trained(config: ModalitiesRun, label: str, kept: tuple[str, ...], number: int) -> Path:
    """Train, stack and predict a network that uses the modalities `kept`; return its run. number: of the seed."""
    name = next(iter(config.models))
    output = config.folder.with_name("modalities") / label.replace(" ", "-")
    seeds = {}
    if number:
        seeds = {"seed": config.seed + number, "token_seed": config.seed_of_tokens}
        output = output.with_name(f"{output.name}-seed-{config.seed + number}")
    experiment = config.model_copy(
        update={
            "output": str(output),
            "data": config.data.model_copy(
                update={"shards": config.train_shards, "test_shards": config.test_shards, "test": None}
            ),
            "models": {name: config.models[name].model_copy(update={"use": kept})},
            "stack": config.stack.model_copy(update={"enabled": False}),
            **seeds,
        }
    )
    settings = output / "benchmark.yaml"
    save(build(Experiment, experiment.model_dump(mode="json", exclude={"seeds", "without"})), settings)
    command = [sys.executable, "-m", "triderm_dist.commands.pipeline", "--config", str(settings)]
    if status := subprocess.run(command).returncode:
        sys.exit(status)
    return output


def print_scores(config: ModalitiesRun, folders: dict[str, list[Path]]) -> None:
    """Print the scores of each network, and as the last line the JSON object."""
    from triderm_dist.data.readers.source import reader_of
    from triderm_dist.ensemble.artifact import read_task
    from triderm_dist.ensemble.run_files import ENSEMBLE_FILE

    task = read_task(folders[ALL][0] / ENSEMBLE_FILE)
    truth = reader_of(task).labels(Path(str(config.data.test_truth)), task)
    decisions: dict[str, list[np.ndarray]] = {}
    result: dict[str, dict[str, float]] = {}
    print(f"\n{'modalities':<22} macro F1 over seeds   all minus these, 95% interval over lesions and seeds")
    for label, runs in folders.items():
        found = [read_run(folder, task) for folder in runs]
        labels = np.array([truth[lesion] for lesion in found[0][0]])
        decisions[label] = [each for _, each in found]
        scores = [metrics.macro_f1(table, labels) for table in decisions[label]]
        difference = intervals.mean_over_seeds(
            [
                intervals.macro_f1_difference(full, without, labels, None, config.ensemble.bootstrap, config.seed)
                for full, without in zip(decisions[ALL], decisions[label], strict=True)
            ]
        )
        deviation = np.std(scores, ddof=1) if len(scores) > 1 else np.nan
        mean = float(np.mean(scores))
        print(f"{label:<22} {mean:.3f} ± {deviation:.3f}         {'' if label == ALL else difference}")
        result[label] = {"macro_f1": round(mean, 4)}
        if len(scores) > 1:
            result[label] |= {"minus": round(difference.value, 4), "low": round(difference.low, 4)}
    print(json.dumps(result))


def read_run(folder: Path, task: Task) -> tuple[list[str], np.ndarray]:
    """Return (lesion ids, (N, C) decisions) of the test set of a run."""
    from triderm_dist.submission import DECISIONS_FILE, SUBMISSION_FILE, read_decisions, read_submission

    if not task.submission:
        return read_decisions(folder / DECISIONS_FILE, task.diagnosis_names)
    ids, probabilities = read_submission(folder / SUBMISSION_FILE, task.diagnosis_names)
    return ids, probabilities > metrics.OFFICIAL_THRESHOLD


if __name__ == "__main__":
    run(ModalitiesRun, main, __doc__)
