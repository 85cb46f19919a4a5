"""Nested scores of a finished run: macro F1 of every network and the ensemble, and areas under ROC curves.

python -m benchmarks.data_set --config RUN/config.yaml

Everything is scored on out-of-fold lesions, with nothing fitted on a lesion's own fold; intervals are bootstraps over
lesions. The area of a diagnosis is that of its probability against all other lesions; their mean is over the diagnoses.
The last line is one JSON object.
"""

from __future__ import annotations

import json

import numpy as np

from triderm_dist.cli import run
from triderm_dist.config import Experiment
from triderm_dist.ensemble.artifact import read_json, read_task
from triderm_dist.ensemble.run_files import ENSEMBLE_FILE, NESTED_FILE, read_nested
from triderm_dist.ensemble.score_table import Row
from triderm_dist.metrics import Metric, area_under_roc, bootstrap_metrics, malignancy_metrics


def mean_area(probabilities: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> float:
    """Return the mean over diagnoses of the area under the ROC curve of each against all others."""
    return float(np.mean([area_under_roc(probabilities[:, label], labels == label) for label in np.unique(labels)]))


def main(config: Experiment) -> None:
    task = read_task(config.folder / ENSEMBLE_FILE)
    nested = read_nested(config.folder / NESTED_FILE)
    scores = read_json(config.folder / ENSEMBLE_FILE)["scores"]
    rows = [Row.from_json(name, each) for name, each in scores.items()]
    print(f"{task.title or task.name}: {len(nested.labels)} lesions, {len(np.unique(nested.folds))} folds")
    print(f"{'':<16} nested macro F1  95% interval")
    for row in rows:
        print(f"{row.name:<16} {row.nested.value:>15.3f}  {row.nested.low:.3f} to {row.nested.high:.3f}")
    metrics = {"mean_auc": Metric("mean AUC over diagnoses", mean_area)}
    kinds = [each.malignant for each in task.diagnoses]
    if None not in kinds and len(set(kinds)) == 2:
        metrics |= malignancy_metrics(np.array(kinds, float))
    found = bootstrap_metrics(nested.probabilities, nested.labels, nested.decisions, 1000, config.seed, metrics)
    for name, each in found.items():
        print(f"{name:<16} {each.value:.3f}  {each.low:.3f} to {each.high:.3f}  {metrics[name].title}")
    for label, diagnosis in enumerate(task.diagnosis_names):
        area = area_under_roc(nested.probabilities[:, label], nested.labels == label)
        print(f"AUC {diagnosis:<12} {area:.3f}  {np.sum(nested.labels == label)} lesions")
    record = {row.name: round(row.nested.value, 4) for row in rows}
    print(json.dumps(record | {name: round(each.value, 4) for name, each in found.items()}))


if __name__ == "__main__":
    run(Experiment, main, __doc__)
