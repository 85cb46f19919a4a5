"""Scores and durations of finished folds: the table at the end of a cross-validation, and the remaining time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from triderm_dist.config import Experiment
from triderm_dist.losses import probabilities
from triderm_dist.metrics import argmax_macro_f1, mean_area_under_roc
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.predictions import read_predictions
from triderm_dist.runtime.terminal import clock, table

LOGGED = ("macro_f1", "auc")
"""Scores that are sent to trackers."""
HEADER = ("model", "fold", "macro F1", "AUC", "best epoch", "time")


@dataclass(frozen=True)
class FoldResult:
    """Held-out scores of one fold of a model.

    fold: its number, or "all" for the lesions of all folds together.  macro_f1: of the argmax.
    auc: mean over the diagnoses, one versus rest.  best_epoch: "K of E", by validation macro F1; "" if unknown.
    seconds: of training; None if not recorded.
    """

    model: str
    fold: str
    macro_f1: float
    auc: float
    best_epoch: str
    seconds: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        seconds = "" if self.seconds is None else clock(self.seconds)
        return self.model, self.fold, f"{self.macro_f1:.3f}", f"{self.auc:.3f}", self.best_epoch, seconds


def fold_results(experiment: Experiment, models: Sequence[str], folds: Iterable[int]) -> list[FoldResult]:
    """Read the results of finished folds; after several folds of a model, the result of all of them together."""
    results, folds = [], list(folds)
    for model in models:
        parts, own = [], []
        for fold in folds:
            folder = experiment.fold_folder(model, fold)
            held_out = read_predictions(folder / "predictions.parquet")
            logits = torch.from_numpy(held_out.logits.copy())
            p = probabilities(logits, str(held_out.head)).numpy()  # type: ignore[arg-type]
            parts.append((p, held_out.labels))
            best, seconds = _best_epoch(folder), trained_seconds(folder)
            own.append(FoldResult(model, str(fold), *_scores(p, held_out.labels), best, seconds))
        results += own
        if len(folds) > 1:
            p, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            times = [each.seconds for each in own if each.seconds is not None]
            total = sum(times) if len(times) == len(own) else None
            results.append(FoldResult(model, "all", *_scores(p, labels), "", total))
    return results


def fold_table(results: Sequence[FoldResult]) -> str:
    """Return the results as a table of text."""
    return table(HEADER, [each.cells for each in results])


def trained_seconds(folder: Path) -> float | None:
    """Return the seconds that the training in a fold's folder took, resumes included; None if not recorded."""
    records = read_metrics(folder / "metrics.jsonl")
    seconds = records[-1].get("seconds") if records else None
    return None if seconds is None else float(seconds)


def later_seconds(experiment: Experiment, order: Sequence[str], number: int) -> Callable[[float], float]:
    """Return a function that estimates the seconds of the trainings after order[number], given those of this training.

    A training is estimated by the mean of its model's finished folds; without any, by its epochs and the current
    training's seconds per epoch. order: the model of each training.
    """
    models = experiment.models
    known = {model: _mean_seconds(experiment, model) for model in set(order)}
    current, later = order[number], order[number + 1 :]

    def estimate(seconds: float) -> float:
        per_epoch = seconds / models[current].train.epochs
        return sum(known[model] or per_epoch * models[model].train.epochs for model in later)

    return estimate


def _mean_seconds(experiment: Experiment, model: str) -> float | None:
    folders = [experiment.fold_folder(model, fold) for fold in range(experiment.data.folds)]
    found = [trained_seconds(folder) for folder in folders if (folder / "fold.json").exists()]
    times = [seconds for seconds in found if seconds is not None]
    return sum(times) / len(times) if times else None


def _scores(p: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    return argmax_macro_f1(p, labels), mean_area_under_roc(p, labels, np.empty(0))


def _best_epoch(folder: Path) -> str:
    epochs = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "validation"]
    if not epochs:
        return ""
    best = max(epochs, key=lambda line: line["macro_f1"])  # the first of ties
    return f"{best['epoch']:.0f} of {epochs[-1]['epoch']:.0f}"
