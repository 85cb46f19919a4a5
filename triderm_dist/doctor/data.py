"""Training and test data of an experiment, and the speed of reading them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from triderm_dist.config import DataConfig, Experiment
from triderm_dist.data.threads import Decoders, available_cores
from triderm_dist.doctor.findings import Finding, try_import
from triderm_dist.doctor.machine import Gpu
from triderm_dist.schema import DataError, InputError, Signature

if TYPE_CHECKING:
    from triderm_dist.data.shards.index import ShardIndex

READING_SECONDS = 2.0
"""Seconds of reading shards to measure the speed."""


def data_findings(experiment: Experiment, packed: ShardIndex | str, gpus: Sequence[Gpu], ranks: int) -> list[Finding]:
    """Check the training set, the speed of reading it against what a rank needs, and the test set.

    packed: the training set, as `open_shards` returns it.
    """
    found = [_training_data(experiment, packed)]
    if not isinstance(packed, str) and len(packed):
        found.append(_reading(experiment, packed, gpus, ranks))
        found += [_extra_set(where, experiment.data, packed) for where in experiment.data.extra_sets]
    return [*found, _test_data(experiment)]


def _training_data(experiment: Experiment, packed: ShardIndex | str) -> Finding:
    data, title = experiment.data, "training"
    if isinstance(packed, str) and (data.shards or Path(experiment.train_shards).exists()):
        return Finding(title, packed, "error", "pack the folder again, or set another data.shards")
    if not isinstance(packed, str):
        rarest = min(packed.counts().values())
        text = f"{len(packed)} lesions packed in {experiment.train_shards}; the rarest diagnosis has {rarest}"
        if packed.unlabeled == len(packed):
            return Finding(title, f"{text}, none has a label", "error", "pack the folder with its ground truth")
        if rarest < data.folds:
            return Finding(title, text, "warning", f"fewer than data.folds {data.folds}: some folds will lack it")
        return Finding(title, text)
    if data.source is None:
        advice = "data.source=FOLDER, data.shards=PACKED_FOLDER, or make a synthetic one: triderm synthetic"
        return Finding(title, "neither data.source nor data.shards is set", "error", advice)
    return _folder(title, data.source, data.task, data, labels=True)


def _extra_set(where: str, data: DataConfig, packed: ShardIndex) -> Finding:
    config, union = data.extra_sets[where], try_import("triderm_dist.data.union")
    index = open_shards(config.shards, data)
    if isinstance(index, str):
        return Finding(where, index, "error", f"correct {where}.shards, or pack the set")
    if union is None:
        return Finding(where, f"{len(index):,} lesions packed in {config.shards}; not matched without PyTorch")
    try:
        extra = union.match_extra_set(config, index, packed, where)
    except InputError as error:
        return Finding(where, str(error), "error", "docs/several-sets.md explains the settings")
    notes = "".join(f"; {note}" for note in extra.notes)
    return Finding(where, f"{len(extra.rows):,} of {len(index):,} lesions of {extra.name} join the training{notes}")


def _test_data(experiment: Experiment) -> Finding:
    data, title = experiment.data, "test"
    if data.test_truth and not Path(data.test_truth).is_file():
        return Finding(title, f"{data.test_truth}: no such file", "error", "correct data.test_truth or remove it")
    packed = open_shards(experiment.test_shards, data)
    if not isinstance(packed, str):
        return Finding(title, f"{len(packed)} lesions packed in {experiment.test_shards}")
    if data.test_shards:
        return Finding(title, packed, "error", "pack the test folder again, or set another data.test_shards")
    if data.test is None:
        return Finding(title, "data.test is not set: out-of-fold predictions and report only")
    return _folder(title, data.test, _task(data), data, labels=False)


def _task(data: DataConfig) -> str | None:
    """Return the task of the training set, under which the test set is packed too."""
    from triderm_dist.data.readers.source import task_setting

    try:
        return task_setting(data.source, data.task) if data.source else data.task
    except InputError:  # a finding of the training set
        return data.task


def open_shards(where: str, data: DataConfig) -> ShardIndex | str:
    """Return the index of packed shards, or why it cannot be read."""
    opener = try_import("triderm_dist.data.shards.open")
    if opener is None:
        return f"{where}: cannot be read without pyarrow and pillow"
    try:
        return opener.open_index(where, data.remote)
    except InputError as error:
        return str(error)
    except OSError as error:  # missing permissions, a lost mount
        return f"{where}: {error.strerror}"


def _folder(title: str, folder: str, task_name: str | None, data: DataConfig, labels: bool) -> Finding:
    from triderm_dist.data.readers.source import find_task, read_source

    try:
        task = find_task(folder, task_name)
        dataset = read_source(folder, task, data.missing_view)
    except InputError as error:
        advice = f"correct data.{'source' if labels else 'test'}, the task, or the rows; triderm task check shows all"
        return Finding(title, str(error), "error", advice)
    text = f"{len(dataset.lesions)} lesions of {task.name} in {folder}, not packed yet; triderm pipeline packs it"
    if labels and not dataset.labeled:
        where = task.columns.diagnosis and f"columns.diagnosis of the task names {task.columns.diagnosis!r}"
        advice = where or "put the table with a column of zeros and ones per diagnosis there"
        return Finding(title, f"{folder}: no lesion has a diagnosis", "error", advice)
    counts = Counter(lesion.label for lesion in dataset.lesions)
    rarest = min(counts[label] for label in range(len(task.diagnoses)))
    if labels and rarest < data.folds:
        text += f"; the rarest diagnosis has {rarest}"
        return Finding(title, text, "warning", f"fewer than data.folds {data.folds}: some folds will lack it")
    return Finding(title, text)


# --- reading speed ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RequiredSpeed:
    """Lesions/s that one rank's GPU trains on, and how that was estimated."""

    model: str
    lesions_per_s: float
    source: str


def _reading(experiment: Experiment, index: ShardIndex, gpus: Sequence[Gpu], ranks: int) -> Finding:
    if index.remote:
        return Finding("reading", "not measured for shards at a URL; triderm bench does")
    try:
        speed = reading_speed(index, experiment.data.workers, READING_SECONDS)
    except (DataError, OSError) as error:
        return Finding("reading", str(error), "error", "copy the shards again, or pack the folder again")
    except ImportError as error:
        return Finding("reading", f"not measured without {error.name}")
    if all(model.tower.cached for model in experiment.models.values()):
        return Finding("reading", f"{speed:,.0f} lesions/s; each photo is read once, then the cache of the towers")
    speeds = [each for name in experiment.models if (each := _required_speed(experiment, index.signature, name, gpus))]
    largest = max(speeds, key=lambda each: each.lesions_per_s, default=None)
    return reading_finding(speed, experiment.data.workers, largest, max(1, min(ranks, len(gpus))), available_cores())


def reading_speed(index: ShardIndex, workers: int, seconds: float) -> float:
    """Measure the lesions/s that `workers` threads read and decode as training does, in random order.

    Raises DataError for a photo that does not decode.
    """
    import numpy as np
    import torch

    from triderm_dist.data.photo_source import PhotoSource
    from triderm_dist.data.view_source import JOB_LESIONS

    source = PhotoSource(index, 224, (0.0,) * 3, (1.0,) * 3)
    rows = np.random.default_rng(0).permutation(len(index))
    batch, done = workers * JOB_LESIONS, 0
    with Decoders(workers) as pool:
        started = time.perf_counter()
        # A small data set is read several times, then from the page cache.
        while (elapsed := time.perf_counter() - started) < seconds:
            part = rows[np.arange(done, done + batch) % len(rows)]
            fetched = source.fetch(pool, part, None, torch.device("cuda"))  # uint8, as for a GPU
            for job in fetched.jobs:
                job.result()
            source.release(fetched)
            done += batch
    source.close()
    return done / elapsed


def reading_finding(speed: float, workers: int, required: RequiredSpeed | None, ranks: int, cores: int) -> Finding:
    """Compare a reading speed (lesions/s of one rank's workers) with the needs of `ranks` GPUs on so many cores."""
    text = f"{speed:,.0f} lesions/s read and decoded by {workers} thread(s) (data.workers)"
    if required is None:
        return Finding("reading", text)
    per_core, own = speed / min(workers, cores), cores / ranks
    shared = per_core * min(workers, own)
    if shared < speed:
        text += f", about {shared:,.0f} for each of {ranks} ranks on {cores} cores"
    text += f"; {required.model} takes {required.lesions_per_s:,.0f} on each GPU ({required.source})"
    if shared >= required.lesions_per_s:
        return Finding("reading", text)
    wanted = math.ceil(required.lesions_per_s / per_core)
    if wanted <= own:
        return Finding("reading", f"{text}: the GPU will wait for data", "warning", f"data.workers={wanted}")
    advice = f"{wanted} cores per GPU and data.workers={wanted}, or photos packed with a smaller data.short_side"
    return Finding("reading", f"{text}: the GPU will wait for data", "warning", advice)


def _required_speed(
    experiment: Experiment, signature: Signature, name: str, gpus: Sequence[Gpu]
) -> RequiredSpeed | None:
    """Estimate the speed that a model requires; None if it reads a cache, and where no peak FLOP/s is known."""
    model = experiment.models[name]
    if model.tower.cached or try_import("torch") is None or try_import("timm") is None:
        return None
    from triderm_dist.monitoring.expectation import assumed_mfu
    from triderm_dist.monitoring.flops import named_peak, training_flops
    from triderm_dist.monitoring.memory_estimate import bare_network

    peak = model.train.peak_tflops and model.train.peak_tflops * 1e12
    peak = peak or (named_peak(gpus[0].name) if gpus else None)
    if peak is None:
        return None
    try:
        network, _ = bare_network(model, signature)
    except InputError:
        return None
    flops, mfu = training_flops(network), assumed_mfu(network)
    source = f"{flops / 1e9:,.1f} GFLOP per lesion, at an assumed MFU of {mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s"
    return RequiredSpeed(name, mfu * peak / flops, source)
