"""The XGBoost stage: one booster against the build guide's eleven, a million rows, and the time of the full stage.

python -m benchmarks.stack [key=value ...]

Rows are simulated as out-of-fold outputs of several networks: weakly informative columns, uneven
diagnoses, related noise. The guide fits a MultiOutputClassifier of 11 binary boosters of 300 trees of depth 6; ours
is what a run fits, early stopping included. They alternate. A million rows are streamed from a parquet file in a
new process, whose peak memory is the fit's. `stage` times `triderm stack` and `triderm report` on
5,000 lesions of 3 models: 5 folds nested, 1,000 resamples, the page. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from benchmarks.ensemble import SHARE
from triderm_dist import intervals, metrics
from triderm_dist.cli import run
from triderm_dist.config import EnsembleConfig, Experiment, StackConfig, save
from triderm_dist.data.threads import openmp_threads
from triderm_dist.ensemble.calibration import log_probabilities
from triderm_dist.ensemble.columns import ColumnFile, Columns
from triderm_dist.ensemble.fitted_stacker import FittedStacker, fit_stacker
from triderm_dist.ensemble.stacker import TrainingRows
from triderm_dist.ensemble.xgboost_stacker import device_of, threads_for
from triderm_dist.predictions import OofTable, write_oof
from triderm_dist.schema import DIAGNOSES
from triderm_dist.settings import Section
from triderm_dist.tasks import milk10k_task

C = len(DIAGNOSES)
CONCEPTS = tuple(f"{view}/{number}" for view in ("clinical", "dermoscopic") for number in range(7))


class Settings(Section):
    rows: int = Field(5000, ge=500, description="rows to fit; as many are judged")
    columns: tuple[int, ...] = Field((60, 1600), description="widths that are compared")
    repeats: int = Field(3, ge=1, description="fits of each, for the median")
    wide_repeats: int = Field(1, ge=1, description="fits of each from 1,000 columns on")
    million: int = Field(1_000_000, ge=1000, description="rows of the streamed fit, 60 columns")
    million_rounds: int = Field(20, ge=1, description="boosting rounds of the streamed fit")
    part: str = Field("compare,threads,million,stage", description="parts to run, comma-separated")
    device: str = Field("auto", description="device of ours: auto, cpu or cuda")
    worker: bool = Field(False, description="internal: fit the streamed rows and print the peak memory")


def main(settings: Settings) -> None:
    if settings.worker:
        return million(settings)
    result: dict[str, float] = {}
    parts = settings.part.split(",")
    if "compare" in parts:
        result |= compare(settings)
    if "threads" in parts:
        threads(settings)
    if "million" in parts:
        command = [sys.executable, "-m", "benchmarks.stack", "worker=true", f"million={settings.million}",
                   f"million_rounds={settings.million_rounds}", f"device={settings.device}"]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(done.stdout.rstrip().rpartition("\n")[0])
        result["million_peak_mb"] = json.loads(done.stdout.splitlines()[-1])["peak_mb"]
    if "stage" in parts:
        result["stage_seconds"] = stage(settings)
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def rows_of(rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Simulate (rows, width) float32 columns like a stacker's, and the labels.

    First three networks' log-probabilities (33 columns, related errors), then features: a tenth of them are
    weakly informative (in sum equally at any width), the others are noise. Some are missing.
    """
    generator = np.random.default_rng(seed)
    labels = generator.choice(C, rows, p=SHARE)
    truth, common = np.eye(C)[labels], generator.normal(size=(rows, C))
    blocks = [
        log_probabilities(skill * truth + 0.7 * common + 0.7 * generator.normal(size=(rows, C)) + np.log(SHARE),
                          "softmax")
        for skill in (1.2, 1.5, 1.8)
    ]  # fmt: skip
    rest = width - 3 * C
    loadings = np.random.default_rng(99).normal(size=(C, rest)) * (np.arange(rest) % 10 == 0)  # the same for every seed
    features = 0.5 * np.sqrt(27 / rest) * loadings[labels] + generator.normal(size=(rows, rest))
    features[generator.random(features.shape) < 0.01] = np.nan
    return np.concatenate([*blocks, features], axis=1).astype(np.float32), labels


def ours(columns: np.ndarray, labels: np.ndarray, settings: Settings) -> FittedStacker:
    config = StackConfig(device=settings.device)
    return fit_stacker(training_rows(columns, labels), config, cores=openmp_threads())


def training_rows(columns: Columns, labels: np.ndarray) -> TrainingRows:
    rows, names = np.arange(len(labels)), tuple(f"c{i}" for i in range(columns.shape[1]))
    return TrainingRows(columns, rows, labels, rows.astype(str), names, DIAGNOSES)


def guides(columns: np.ndarray, labels: np.ndarray) -> object:
    """Fit as in the build guide, without `use_label_encoder`, which XGBoost removed, and on the CPU."""
    import xgboost
    from sklearn.multioutput import MultiOutputClassifier

    base = xgboost.XGBClassifier(
        max_depth=6, learning_rate=0.05, n_estimators=300, min_child_weight=3, subsample=0.8, colsample_bytree=0.8,
        objective="binary:logistic", eval_metric="logloss", tree_method="hist", device="cpu", n_jobs=1,
    )  # fmt: skip
    return MultiOutputClassifier(base, n_jobs=openmp_threads()).fit(columns, np.eye(C, dtype=int)[labels])


def compare(settings: Settings) -> dict[str, float]:
    speedups, differences = [], []
    print(f"{settings.rows:,} rows to fit and to judge, {openmp_threads()} cores, ours on "
          f"{device_of(StackConfig(device=settings.device), settings.rows * max(settings.columns))}\n")  # fmt: skip
    print(f"{'columns':>8} {'eleven boosters':>17} {'one booster':>13} {'faster':>8}   "
          "macro F1 argmax, eleven -> one (less, 95%)   at 0.5")  # fmt: skip
    for width in settings.columns:
        columns, labels = rows_of(settings.rows, width, seed=1)
        judged, truth = rows_of(settings.rows, width, seed=2)
        took: dict[str, list[float]] = {"guide": [], "ours": []}
        for _ in range(settings.repeats if width < 1000 else settings.wide_repeats):
            started = time.perf_counter()
            eleven = guides(columns, labels)
            took["guide"].append(time.perf_counter() - started)
            started = time.perf_counter()
            one = ours(columns, labels, settings)
            took["ours"].append(time.perf_counter() - started)
        theirs = np.stack([each[:, 1] for each in eleven.predict_proba(judged)], axis=1)  # type: ignore[attr-defined]
        mine = one.predict(judged)
        difference = intervals.macro_f1_difference(
            metrics.argmax_decisions(mine), metrics.argmax_decisions(theirs), truth, resamples=1000
        )
        guide, single = statistics.median(took["guide"]), statistics.median(took["ours"])
        speedups.append(guide / single)
        differences.append(difference.value)
        print(f"{width:>8} {guide:>15.1f} s {single:>11.1f} s {guide / single:>8.1f}   "
              f"{metrics.argmax_macro_f1(theirs, truth):.3f} -> {metrics.argmax_macro_f1(mine, truth):.3f} "
              f"({difference.value:+.3f}, {difference.low:+.3f} to {difference.high:+.3f})   "
              f"{metrics.official_macro_f1(theirs, truth):.3f} -> {metrics.official_macro_f1(mine, truth):.3f}",
              flush=True)  # fmt: skip
    return {"speedup": min(speedups), "f1_difference": min(differences)}


def threads(settings: Settings) -> None:
    """Measure the gain of a second thread by size, which shows why small fits take one."""
    import xgboost

    print(f"\nseconds of 10 rounds; threads waiting {os.environ.get('OMP_WAIT_POLICY', 'ACTIVE')}")
    counts = sorted({1, 2, openmp_threads()})
    for rows, width in ((5000, 84), (5000, 1600), (100_000, 60), (300_000, 60)):
        columns, labels = rows_of(rows, width, seed=3)
        took: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(2):
            for count in counts:
                parameters = {"objective": "multi:softprob", "num_class": C, "max_depth": 3, "max_bin": 64,
                              "nthread": count}  # fmt: skip
                started = time.perf_counter()
                data = xgboost.QuantileDMatrix(columns, label=labels, max_bin=64, nthread=count)
                xgboost.train(parameters, data, 10)
                took[count].append(time.perf_counter() - started)
        cells = "   ".join(f"{count} threads {min(seconds):6.2f}" for count, seconds in took.items())
        print(f"{rows:>9,} x {width:<5} {cells}   a fit uses {threads_for(rows, width, openmp_threads())}", flush=True)


def million(settings: Settings) -> None:
    """Write the rows in batches, stream them through a fit, and print time and peak memory of this process."""
    rows, labels = settings.million, []

    def batches() -> Iterator[np.ndarray]:
        for number, start in enumerate(range(0, rows, 50_000)):
            columns, batch_labels = rows_of(min(50_000, rows - start), 60, seed=1000 + number)
            labels.append(batch_labels)
            yield columns

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        file = ColumnFile.write(Path(folder) / "columns.parquet", batches())
        wrote = time.perf_counter() - started
        truth = np.concatenate(labels)
        started = time.perf_counter()
        config = StackConfig(device=settings.device, max_rounds=settings.million_rounds, max_rows=None)
        stacker = fit_stacker(training_rows(file, truth), config, cores=openmp_threads())
        fitted = time.perf_counter() - started
    judged, labels_judged = rows_of(20_000, 60, seed=2)
    score = metrics.argmax_macro_f1(stacker.predict(judged), labels_judged)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n{rows:,} x 60 from a parquet file ({stacker.model.summary()}): written in {wrote:.0f} s, "
          f"fitted with early stopping in {fitted:.0f} s, peak {peak:,.0f} MiB, macro F1 {score:.3f}")  # fmt: skip
    print(json.dumps({"peak_mb": peak}))


def stage(settings: Settings) -> float:
    """Measure the seconds of the programs stack and report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_oof(folder / "oof.parquet", out_of_fold(settings.rows))
        experiment = Experiment(
            output=name, stack=StackConfig(device=settings.device), ensemble=EnsembleConfig(bootstrap=1000)
        )  # fmt: skip
        save(experiment, folder / "config.yaml")
        seconds = {}
        for program in ("stack", "report"):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", f"triderm_dist.commands.{program}", "--config", str(folder / "config.yaml")],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            seconds[program] = time.perf_counter() - started
        size = (folder / "report.html").stat().st_size
    total = sum(seconds.values())
    print(f"\nthe stage, {settings.rows:,} lesions, 3 models, 5 folds nested, 1,000 resamples: {total:.0f} s "
          f"(stack and ensemble {seconds['stack']:.0f}, report {seconds['report']:.0f}; "
          f"page of {size >> 10} KiB)")  # fmt: skip
    return total


def out_of_fold(lesions: int, models: tuple[str, ...] = ("first", "second", "third"), features: int = 64) -> OofTable:
    """Simulate an out-of-fold table of networks of different skill."""
    generator = np.random.default_rng(0)
    labels = generator.choice(C, lesions, p=SHARE)

    def logits(skill: float) -> np.ndarray:
        noise = 0.7 * common + 0.7 * generator.normal(size=common.shape)
        return (skill * np.eye(C)[labels] + noise + np.log(SHARE)).astype(np.float32)

    common = generator.normal(size=(lesions, C))
    metadata = np.stack(
        [generator.integers(1, 18, lesions) * 5.0, generator.integers(0, 2, lesions),
         generator.choice(6, lesions, p=[0.01, 0.02, 0.1, 0.6, 0.2, 0.07]), generator.integers(0, 7, lesions)], axis=1,
    ).astype(np.float32)  # fmt: skip
    folds = np.arange(lesions) % 5
    ids = np.array([f"lesion-{row:05d}" for row in range(lesions)], object)
    return OofTable(
        lesion_ids=ids, groups=ids, labels=labels, folds=folds,
        concepts=generator.random((lesions, len(CONCEPTS))).astype(np.float32), metadata=metadata,
        models=models, heads=dict.fromkeys(models, "softmax"),
        logits={name: logits(1.4 + 0.2 * i) for i, name in enumerate(models)},
        aux_clinical={name: logits(0.9) for name in models}, aux_dermoscopic={name: logits(1.2) for name in models},
        features={name: generator.normal(size=(lesions, features)).astype(np.float32) for name in models},
        hashes={name: np.array([f"{name}-{fold}" for fold in folds], object) for name in models},
        task=milk10k_task(), concept_names=CONCEPTS,
    )  # fmt: skip


if __name__ == "__main__":
    run(Settings, main, __doc__)
