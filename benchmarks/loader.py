"""Batches of both views, ready for the device: this toolkit's loader against bare decoding and other readers.

python -m benchmarks.loader source=MILK10k original=MILK10k_ORIGINAL [streaming_python=PYTHON] [key=value ...]

The ceiling is decoding the same JPEG bytes, held in memory, on the same cores by the faster of torchvision and
simplejpeg. Each method runs in a process of its own, one after the other, round by round; a rate is photos per second
from the first batch to the last, so that process start-up does not count. What each returns: ours and `webdataset`
uint8 photos (augmentation runs on the device), the folder augmented and normalized 224 crops (computed by its workers),
litData and mosaicml-streaming the photos as their own readers decode them.

litData comes with the `bench` extra. mosaicml-streaming pins older numpy and transformers and needs an environment of
its own: `python -m venv E; E/bin/pip install mosaicml-streaming torch torchvision`, then streaming_python=E/bin/python.
The last line is one JSON object. Its worker_mb is what a rank holds above its imports (index, plan, ring of buffers),
the larger of the packed and the simulated index, over the worker threads that share it; resume_s is of the packed set.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import Section

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
    original: str | None = Field("../shared/milk10k_original", description="challenge folder with photos as they came")
    streaming_python: str | None = Field(None, description="Python that has mosaicml-streaming; null leaves (e) out")
    methods: tuple[str, ...] = Field(tuple(NAMES), description="what is measured")
    rounds: int = Field(3, ge=1, description="rounds; medians are reported")
    batch: int = Field(32, ge=1, description="lesions per batch")
    workers: int = Field(2, ge=1, description="worker threads or processes")
    simulated: int = Field(1_000_000, ge=1, description="lesions of the simulated large index")


def main(config: LoaderBenchmark) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = prepare(config, Path(folder))
        rates: dict[str, list[float]] = {method: [] for method in config.methods if method in where}
        for number in range(config.rounds):
            for method in rates:
                rates[method].append(rate(method, where[method], config))
                print(f"round {number + 1}: {NAMES[method]:<55}{rates[method][-1]:>8.0f} photos/s", flush=True)
        starts = {size: own("start", where[size], config) for size in ("packed", "simulated")}
    report(config, rates, starts)


def prepare(config: LoaderBenchmark, folder: Path) -> dict[str, Path]:
    """Where each method finds its files; makes them first."""
    from triderm_dist.data.readers.milk10k import read_challenge
    from triderm_dist.data.shards.pack import pack_shards

    shards = folder / "shards"
    pack_shards(read_challenge(config.source), shards, short_side=288)
    own("simulate", shards, config, str(folder / "simulated"), str(config.simulated))
    where = dict.fromkeys(NAMES, shards) | {"packed": shards, "simulated": folder / "simulated"}
    where |= {"folder_reduced": Path(config.source), "folder": Path(config.original or "")}
    if config.original is None:
        del where["folder"]
    for method in ("litdata", "streaming"):
        where[method] = folder / method
        if method == "streaming" and config.streaming_python is None:
            del where[method]
        elif method in config.methods:
            rival(method, where[method], config, "write", config.source)
    return where


def rate(method: str, where: Path, config: LoaderBenchmark) -> float:
    if method.startswith(("ours", "ceiling")):
        return own(method, where, config)["photos_s"]
    return float(rival(method.replace("folder_reduced", "folder"), where, config).splitlines()[-1])


def own(method: str, where: Path, config: LoaderBenchmark, *more: str) -> dict[str, Any]:
    return json.loads(_run(sys.executable, METHODS, method, where, config, *more).splitlines()[-1])


def rival(method: str, where: Path, config: LoaderBenchmark, *more: str) -> str:
    python = config.streaming_python if method == "streaming" else sys.executable
    return _run(str(python), RIVALS, method, where, config, *more)


def _run(python: str, program: Path, method: str, where: Path, config: LoaderBenchmark, *more: str) -> str:
    command = [python, str(program), method, str(where), str(config.batch), str(config.workers), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    # litData and streaming print to stdout while they work: what counts is the last line.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def report(config: LoaderBenchmark, rates: dict[str, list[float]], starts: dict[str, dict[str, Any]]) -> None:
    """The table, and the line of ratios: medians over rounds of ours / the other method in the same round."""
    ours = rates.get("ours", [])

    def against(*methods: str) -> float | None:
        measured = [rates[method] for method in methods if method in rates]
        fastest = [max(values) for values in zip(*measured, strict=True)]
        return (
            round(statistics.median(a / b for a, b in zip(ours, fastest, strict=True)), 3) if ours and fastest else None
        )

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
        "vs_webdataset": against("webdataset"),
        "vs_litdata": against("litdata"),
        "vs_streaming": against("streaming"),
    }
    resume = max(starts["packed"]["start_s"], starts["packed"]["resume_s"])
    megabytes = max(start["mb"] for start in starts.values()) / config.workers
    print(json.dumps({**ratios, "resume_s": round(resume, 3), "worker_mb": round(megabytes, 1)}))


if __name__ == "__main__":
    run(LoaderBenchmark, main, __doc__)
