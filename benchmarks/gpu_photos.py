"""The measurements of parts 3 and 4 of `benchmarks.gpu`: photos, and what a run does with them."""

from __future__ import annotations

import copy
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_cells import (
    device_of,
    free_memory,
    image_side,
    model_settings,
    network_of,
    plain_settings,
    synchronize,
)
from triderm_dist.config import ModelConfig, StackConfig
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.threads import openmp_threads
from triderm_dist.data.token_codec import TokenCodec
from triderm_dist.distributed import parallel
from triderm_dist.engine import bench
from triderm_dist.engine.evaluate import evaluate
from triderm_dist.engine.token_extraction import PLAIN, TokenExtractor
from triderm_dist.models.towers import build_tower
from triderm_dist.monitoring.memory_estimate import local_tower

READS_SHARDS = ("loading", "training_on_photos", "trainings_side_by_side", "tokens", "test_time", "fold")
"""Functions that take the packed photos of the settings; without them photos are synthetic."""
SECONDS = 3.0
"""Time of one measurement."""


@functools.cache
def photos(shards: str | None, size: str) -> ShardIndex:
    """Read the packed photos, or make synthetic ones, once on a machine, with the short side that `milk10k` packs."""
    if shards:
        return read_index(Path(shards))
    lesions, side = (64, 64) if size == "tiny" else (256, 450)
    return bench.synthetic_shards(Path(tempfile.gettempdir(), f"triderm-gpu-{lesions}x{side}"), lesions, side)


def loaders_of(model: ModelConfig, index: ShardIndex, side: int, workers: int) -> LoaderFactory[ShardIndex]:
    tower = build_tower_of(model)
    source = PhotoSource(index, side, tower.mean, tower.std, model.train.augment)
    return LoaderFactory(index, source, workers)


@functools.lru_cache(maxsize=1)
def build_tower_of(model: ModelConfig) -> Any:
    """Build the model's tower with random weights."""
    settings, _ = local_tower(model.tower)
    return build_tower(settings.source, False, settings.image_size)


def loading(name: str, workers: int, size: str, shards: str | None) -> dict[str, Any]:
    """Measure the loader alone: decoded, copied, augmented and normalized on the device, and not used."""
    device, index, model = device_of(size), photos(shards, size), plain_settings(name, size)
    side, batch = image_side(network_of(model)), 8 if size == "tiny" else 96
    loaders = loaders_of(model, index, side, workers)
    rows = np.resize(np.arange(len(index)), 10_000 * batch)
    plan = EpochPlan(Samples.of(index, rows), Sampling("shuffle"), 0, 0).batches(0, 1, batch)
    steps: Iterator[Any] = iter(loaders.create(plan, batch, device, augment=model.train.augment))
    for _ in range(4):
        next(steps)
    synchronize()
    started, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < (0.5 if size == "tiny" else SECONDS):
        next(steps)
        count += 1
    synchronize()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    steps.close()  # type: ignore[attr-defined]
    taken = 2 * batch * count
    return {
        "model": name, "side": side, "workers": workers, "packed_side": min(index.canvas),
        "photos_per_s": round(taken / seconds), "photos_per_cpu_s": round(taken / cpu),
    }  # fmt: skip


def training_on_photos(
    name: str, lesions: int, workers: int, size: str, shards: str | None, seconds: float = 5.0
) -> dict[str, Any]:
    """Measure a training on photos by the recipe, compiled and as a graph, and the share that waits for data."""
    index = photos(shards, size)
    settings = {"micro_batch": lesions, "global_batch": lesions, "precision": "bf16", "compile": size == "full"}
    model = model_settings(name, size, **settings)
    bare = network_of(plain_settings(name, size))
    accelerator = parallel.start_training(model.train)
    loaders = loaders_of(plain_settings(name, size), index, image_side(bare), workers)
    network: Any = fitted(copy.deepcopy(bare), plain_settings(name, size), index).to(accelerator.device)
    values = bench.measure(model, network, loaders, accelerator, 0.5 if size == "tiny" else seconds)
    return {
        "model": name, "lesions": lesions, "workers": workers, "packed_side": min(index.canvas),
        "lesions_per_s": round(values["lesions_per_s"], 1), "data_wait": round(values["data_wait"], 4),
        "memory_gib": round(values["memory_gib"], 2), "steps": int(values["steps"]),
    }  # fmt: skip


def fitted(network: Any, model: ModelConfig, index: ShardIndex) -> Any:
    """Return a network for the signature of packed photos: this one where it has it."""
    from triderm_dist.monitoring.memory_estimate import network_without_weights

    return network if network.signature == index.signature else network_without_weights(model, index.signature)[0]


def trainings_side_by_side(name: str, lesions: int, workers: int, size: str, shards: str | None) -> dict[str, Any]:
    """Measure two trainings in two processes on one GPU at the same time."""
    photos(shards, size)
    free_memory()
    context = multiprocessing.get_context("spawn")
    together, queue = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_one_of_two, args=(together, queue, name, lesions, workers, size, shards))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a training of two on one GPU ended with {[process.exitcode for process in processes]}")
    rates = [queue.get(timeout=10)["lesions_per_s"] for _ in processes]
    return {
        "model": name, "lesions": lesions, "workers": workers, "each": rates, "lesions_per_s": round(sum(rates), 1)
    }  # fmt: skip


def _one_of_two(together: Any, queue: Any, name: str, lesions: int, workers: int, size: str, shards: Any) -> None:
    network_of(plain_settings(name, size))
    together.wait()
    queue.put(training_on_photos(name, lesions, workers, size, shards, seconds=10.0))


def tokens(name: str, compiled: bool, workers: int, size: str, shards: str | None) -> dict[str, Any]:
    """Measure the tokens of a frozen tower, from photos to float16 on the host."""
    index, model = photos(shards, size), plain_settings(name, size)
    tower = build_tower_of(model)
    tower.freeze(len(tower.blocks))
    loaders = loaders_of(model, index, image_side(network_of(model)), workers)
    extractor = TokenExtractor(tower, loaders, model.train.augment, 0, parallel.start_inference("bf16"))
    encoder = extractor.encoder(compiled and size == "full", 0)
    codec, few = TokenCodec("float16", tuple(tower.token_shape)), np.arange(min(64, len(index)))
    extractor.extract(encoder, few, PLAIN, codec)
    rows = few if size == "tiny" else np.resize(np.arange(len(index)), 1024)
    synchronize()
    started = time.perf_counter()
    extractor.extract(encoder, rows, PLAIN, codec)
    seconds = time.perf_counter() - started
    return {"model": name, "compiled": compiled, "workers": workers, "photos_per_s": round(2 * len(rows) / seconds)}


def test_time(name: str, transforms: int, workers: int, size: str, shards: str | None) -> dict[str, Any]:
    """Measure the prediction of lesions under `transforms` transforms of the dihedral group, from photos to logits."""
    index, model = photos(shards, size), plain_settings(name, size)
    accelerator = parallel.start_inference("bf16")
    bare = network_of(model)
    network: Any = fitted(copy.deepcopy(bare), model, index).to(accelerator.device).eval()
    loaders = loaders_of(model, index, image_side(bare), workers)
    wrapped = accelerator.prepare_model(network, evaluation_mode=True)
    batch = 4 if size == "tiny" else 64

    def predict(rows: np.ndarray) -> float:
        synchronize()
        started = time.perf_counter()
        evaluate(wrapped, loaders, rows, accelerator, micro_batch=batch, transforms=transforms)
        return time.perf_counter() - started

    rows = np.arange(len(index))
    rows = rows[: 8 if size == "tiny" else 1024]
    predict(rows[:batch])
    seconds = statistics.median(predict(rows) for _ in range(3))
    return {"model": name, "transforms": transforms, "lesions_per_s": round(len(rows) / seconds, 1)}


def predicting(size: str) -> dict[str, Any]:
    """Measure `triderm predict` on photo files with a run of two networks in two folds, 8 transforms."""
    from benchmarks import predict
    from triderm_dist.inference.inputs import read_input
    from triderm_dist.inference.predictor import Predictor
    from triderm_dist.inference.run_folder import open_run_folder

    full = size == "full"
    tower = {"tower": "timm:vit_base_patch16_224"} if full else {"tower": "timm:test_vit", "image_size": 32}
    config = predict.PredictBenchmark(frozen=not full, lesions=512 if full else 50, **tower)
    with tempfile.TemporaryDirectory() as folder:
        at = predict.train(Path(folder), config)
        run = open_run_folder(at)
        lesions = read_input([at / "data" / "test"], run).lesions
        predictor = Predictor(run)
        predict.predict(predictor, lesions.take(slice(64)), Path(folder, "first"))
        started = time.perf_counter()
        predict.predict(predictor, lesions, Path(folder, "second"))
        seconds = time.perf_counter() - started
    return {"lesions": len(lesions), "networks": 4, "transforms": 8, "lesions_per_s": round(len(lesions) / seconds, 1)}


def fold(model: str, weights: str | None, most_seconds: float, size: str, shards: str | None) -> dict[str, Any]:
    """Train one fold by the recipe of `milk10k` from an ImageNet tower at 384 pixels; its scores and speed.

    Where `most_seconds` are too few, they are those of the finished epochs.

    weights: file of tf_efficientnet_lite0, None for random weights.
    """
    index = photos(shards, size)
    key = f"models.{model}.tower"
    words = [f"model={model}", "fold=0", f"data.shards={index.folder}", "train.trackers=[]"]
    source = "timm:tf_efficientnet_lite0" if size == "full" else "timm:test_efficientnet"
    words += [f"{key}.source={source}@{weights}" if weights else f"{key}.source={source}"]
    words += [f"{key}.pretrained={str(bool(weights)).lower()}", f"{key}.image_size={384 if size == 'full' else 32}"]
    words += [f"{key}.freeze_clinical=2", f"{key}.freeze_dermoscopic=0", "seed=0", "train.compile=false"]
    if size == "tiny":
        words += [
            "train.epochs=1",
            "train.log_every=1",
            "train.global_batch=8",
            "train.micro_batch=8",
            "train.compile=false",
        ]
        words += ["data.folds=2", f"models.{model}.width=32", f"models.{model}.heads=2"]
        words += [f"{key}.freeze_clinical=1", f"{key}.drop_path=null"]
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        command = [sys.executable, "-m", "triderm_dist", "train", "--config", "milk10k", *words, f"output={name}/run"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=most_seconds)
            if done.returncode:
                raise RuntimeError(" | ".join((done.stdout + done.stderr).splitlines()[-4:]))
            ended = True
        except subprocess.TimeoutExpired as error:
            print((error.stdout or b"").decode(errors="replace")[-2000:], flush=True)
            ended = False
        seconds = time.perf_counter() - started
        (file,) = Path(name, "run").glob("**/metrics.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    scores = [row for row in rows if "macro_f1" in row]
    steps = [row for row in rows if "lesions_per_s" in row]
    if not scores:
        raise RuntimeError(f"no epoch ended within {seconds:.0f} s")
    return {
        "model": model, "pretrained": bool(weights), "lesions": len(index), "packed_side": min(index.canvas),
        "seconds": round(seconds, 1), "epochs": len(scores), "ended": ended,
        "macro_f1": round(scores[-1]["macro_f1"], 4), "official": round(scores[-1]["official"], 4),
        "lesions_per_s": round(statistics.median(row["lesions_per_s"] for row in steps), 1),
        "data_wait": round(statistics.median(row["data_wait"] for row in steps), 4),
        "scores": [round(row["macro_f1"], 4) for row in scores],
    }  # fmt: skip


def xgboost(rows: int, columns: int, size: str) -> dict[str, Any]:
    """Fit the stacker of a run on the CPU and on the GPU: 100 rounds at most, early stopping included."""
    from benchmarks.stack import rows_of, training_rows
    from triderm_dist.ensemble.fitted_stacker import fit_stacker

    if size == "tiny":
        rows, columns = 500, 60
    values, labels = rows_of(rows, columns, seed=1)
    found: dict[str, Any] = {"rows": rows, "columns": columns, "threads": openmp_threads()}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        config = StackConfig(device=device, max_rounds=100)
        seconds = []
        for _ in range(2):  # the first one on the GPU compiles and allocates
            started = time.perf_counter()
            fit_stacker(training_rows(values, labels), config, cores=openmp_threads())
            seconds.append(time.perf_counter() - started)
            if seconds[0] > 10:
                break
        found[f"{device}_s"] = round(min(seconds), 2)
    return found
