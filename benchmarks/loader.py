"""Batches of both views, ready for the device: this toolkit's loader against bare decoding and other readers.

python -m benchmarks.loader source=MILK10k original=MILK10k_ORIGINAL [streaming_python=PYTHON] [key=value ...]

The ceiling is decoding the same JPEG bytes, held in memory, on the same cores by the faster of torchvision and
simplejpeg. Each method runs in its own process, one after the other, round by round; a rate is photos per second
from the first batch to the last, so that process start-up does not count. What each returns: ours and `webdataset`
uint8 photos (augmentation runs on the device), the folder augmented and normalized 224 crops (computed by its workers),
litData and mosaicml-streaming the photos as their own readers decode them.

litData comes with the `bench` extra. mosaicml-streaming pins older numpy and transformers and needs a separate
environment: `python -m venv E; E/bin/pip install mosaicml-streaming torch torchvision`, then
streaming_python=E/bin/python.
The last line is one JSON object. Its worker_mb is the memory per rank above its imports (index, plan, ring of
buffers) for the larger of the packed and the simulated index, divided by the worker threads that share it; resume_s is
of the packed set, first_batch_s of the simulated one. augmented_vs_folder compares what a CPU trains on: crops that
are augmented and normalized on the same cores, from photos of the same size.

python -m benchmarks.loader latency_ms=2

Only reads lesions in random order from shards of two lesions, with each opening and reading delayed as by a network
disk, in one thread and in 16. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import Section

if TYPE_CHECKING:
    from triderm_dist.data.shards.index import ShardIndex
    from triderm_dist.data.shards.reader import FolderShards

THREADS, READS = 16, 100
"""Threads that read with a latency, and lesions that each of them reads."""
METHODS = Path(__file__).with_name("loader_methods.py")
RIVALS = Path(__file__).with_name("loader_rivals.py")
NAMES = {
    "ceiling_torchvision": "bare decoding, torchvision",
    "ceiling_simplejpeg": "bare decoding, simplejpeg",
    "ours": "ours",
    "ours_spare": "ours, one thread more than cores",
    "ours_finished": "ours, augmented and normalized on the same cores",
    "folder": "(b) folder of original photos, Pillow + torchvision",
    "folder_reduced": "(b) the same, folder of reduced photos",
    "webdataset": "(c) webdataset, rgb8",
    "webdataset_simplejpeg": "(c) webdataset with simplejpeg",
    "litdata": "(d) litData",
    "streaming": "(e) mosaicml-streaming",
}


class LoaderBenchmark(Section):
    source: str = Field("../shared/milk10k", description="challenge folder, packed for the comparison")
    original: str | None = Field("../shared/milk10k_original", description="challenge folder with the original photos")
    streaming_python: str | None = Field(None, description="Python that has mosaicml-streaming; null leaves (e) out")
    methods: tuple[str, ...] = Field(tuple(NAMES), description="methods to measure")
    rounds: int = Field(3, ge=1, description="rounds; medians are reported")
    batch: int = Field(32, ge=1, description="lesions per batch")
    workers: int = Field(2, ge=1, description="worker threads or processes")
    simulated: int = Field(1_000_000, ge=1, description="lesions of the simulated large index")
    latency_ms: float | None = Field(
        None, gt=0, description="measure reading from a disk with this latency instead; null: measure loading"
    )


def main(config: LoaderBenchmark) -> None:
    if config.latency_ms:
        return read_with_latency(config, config.latency_ms / 1000)
    with tempfile.TemporaryDirectory() as folder:
        folders = prepare(config, Path(folder))
        rates: dict[str, list[float]] = {method: [] for method in config.methods if method in folders}
        for number in range(config.rounds):
            for method in rates:
                rates[method].append(rate(method, folders[method], config))
                print(f"round {number + 1}: {NAMES[method]:<55}{rates[method][-1]:>8.0f} photos/s", flush=True)
        starts = {size: run_ours("start", folders[size], config) for size in ("packed", "simulated")}
    report(config, rates, starts)


def read_with_latency(config: LoaderBenchmark, seconds: float) -> None:
    """Compare one thread with 16 on shards whose files take `seconds` to open and to read from."""
    from triderm_dist.data.readers.milk10k import read_challenge
    from triderm_dist.data.shards.pack import pack_shards
    from triderm_dist.data.shards.reader import FolderShards

    class DelayedShards(FolderShards):
        def read(self, shard: int, offset: int, size: int) -> bytes:
            time.sleep(seconds)
            return super().read(shard, offset, size)

        def _open_file(self, shard: int) -> IO[bytes]:
            time.sleep(seconds)
            return super()._open_file(shard)

    rates: dict[int, list[float]] = {1: [], THREADS: []}
    with tempfile.TemporaryDirectory() as folder:
        index = pack_shards(read_challenge(config.source), Path(folder) / "shards", short_side=32, shard_samples=2)
        order = np.random.default_rng(0).permutation(len(index))
        for _ in range(config.rounds):
            for threads, measured in rates.items():
                measured.append(read_rate(DelayedShards(index), index, order[: READS * threads], threads))
    medians = {threads: statistics.median(measured) for threads, measured in rates.items()}
    print(f"{len(index.shards)} shards, {seconds * 1000:g} ms for each opening and each reading")
    for threads, median in medians.items():
        print(f"{threads:>3} threads{median:>8.0f} lesions/s")
    print(json.dumps({f"threads_{THREADS}_vs_1": round(medians[THREADS] / medians[1], 2)}))


def read_rate(shards: FolderShards, index: ShardIndex, rows: np.ndarray, threads: int) -> float:
    """Return the lesions (rows of the index) per second that threads read from shards that are not open yet."""
    starts, ends = index.offsets.min(axis=1), (index.offsets + index.sizes).max(axis=1)

    def read(row: int) -> None:
        shards.read(int(index.shard[row]), int(starts[row]), int(ends[row] - starts[row]))

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(read, rows))
        seconds = time.perf_counter() - started
    shards.close()
    return len(rows) / seconds


def prepare(config: LoaderBenchmark, folder: Path) -> dict[str, Path]:
    """Write the files of each method; return their folders by method."""
    from triderm_dist.data.readers.milk10k import read_challenge
    from triderm_dist.data.shards.pack import pack_shards

    shards = folder / "shards"
    pack_shards(read_challenge(config.source), shards, short_side=288)
    run_ours("simulate", shards, config, str(folder / "simulated"), str(config.simulated))
    folders = dict.fromkeys(NAMES, shards) | {"packed": shards, "simulated": folder / "simulated"}
    folders |= {"folder_reduced": Path(config.source), "folder": Path(config.original or "")}
    if config.original is None:
        del folders["folder"]
    for method in ("litdata", "streaming"):
        folders[method] = folder / method
        if method == "streaming" and config.streaming_python is None:
            del folders[method]
        elif method in config.methods:
            run_rival(method, folders[method], config, "write", config.source)
    return folders


def rate(method: str, folder: Path, config: LoaderBenchmark) -> float:
    """Measure a method once, in photos per second."""
    if method.startswith(("ours", "ceiling")):
        return run_ours(method, folder, config)["photos_s"]
    return float(run_rival(method.replace("folder_reduced", "folder"), folder, config).splitlines()[-1])


def run_ours(method: str, folder: Path, config: LoaderBenchmark, *arguments: str) -> dict[str, Any]:
    return json.loads(_run(sys.executable, METHODS, method, folder, config, *arguments).splitlines()[-1])


def run_rival(method: str, folder: Path, config: LoaderBenchmark, *arguments: str) -> str:
    python = config.streaming_python if method == "streaming" else sys.executable
    return _run(str(python), RIVALS, method, folder, config, *arguments)


def _run(python: str, program: Path, method: str, folder: Path, config: LoaderBenchmark, *arguments: str) -> str:
    """Run a method in its own process; return its output."""
    command = [python, str(program), method, str(folder), str(config.batch), str(config.workers), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    # litData and streaming print to stdout while they work: the result is the last line.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def report(config: LoaderBenchmark, rates: dict[str, list[float]], starts: dict[str, dict[str, Any]]) -> None:
    """Print the table, and the line of ratios: medians over rounds of ours / the other method in the same round."""

    def against(*methods: str, ours: str = "ours") -> float | None:
        measured = [rates[method] for method in methods if method in rates]
        fastest = [max(values) for values in zip(*measured, strict=True)]
        if ours not in rates or not fastest:
            return None
        return round(statistics.median(a / b for a, b in zip(rates[ours], fastest, strict=True)), 3)

    shape = f"{config.workers} workers, batches of {config.batch} lesions, {os.cpu_count()} cores"
    print(f"\nmedian of {config.rounds} rounds, {shape}; ratio: ours / this, round by round")
    for method, values in sorted(rates.items(), key=lambda item: -statistics.median(item[1])):
        print(f"{NAMES[method]:<55}{statistics.median(values):>8.0f} photos/s   {against(method) or float('nan'):.2f}")
    for name, start in starts.items():
        print(
            f"{name} set: first batch after {start['start_s']:.2f} s, index read, {start['resume_s']:.2f} s at 90% of "
            f"an epoch; {start['mb']:.0f} MB above imports: index, plan and {config.workers} workers together"
        )
    ratios = {
        "vs_ceiling": against("ceiling_torchvision", "ceiling_simplejpeg"),
        "vs_folder": against("folder"),
        "augmented_vs_folder": against("folder_reduced", ours="ours_finished"),
        "vs_webdataset": against("webdataset"),
        "vs_webdataset_simplejpeg": against("webdataset_simplejpeg"),
        "vs_litdata": against("litdata"),
        "vs_streaming": against("streaming"),
    }
    resume = max(starts["packed"]["start_s"], starts["packed"]["resume_s"])
    megabytes = max(start["mb"] for start in starts.values()) / config.workers
    simulated = {"first_batch_s": round(starts["simulated"]["start_s"], 3), "worker_mb": round(megabytes, 1)}
    print(json.dumps({**ratios, "resume_s": round(resume, 3), **simulated}))


if __name__ == "__main__":
    run(LoaderBenchmark, main, __doc__)
