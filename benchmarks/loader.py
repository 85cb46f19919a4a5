"""Batches of both views, ready for the device: this toolkit's loader beside bare decoding and other ways to read.

python -m benchmarks.loader source=MILK10k original=MILK10k_ORIGINAL [streaming_python=PYTHON] [key=value ...]

The ceiling is decoding the same JPEG bytes, held in memory, on the same cores by the faster of torchvision and
simplejpeg. Every way runs in a process of its own, one after the other, round by round; a rate is photos a second from
its first batch to its last, so that nobody pays for starting processes. What each hands over: ours and `webdataset`
uint8 photos (augmentation runs on the device), the folder augmented and normalized 224 crops (there they are the
workers' job), litData and mosaicml-streaming the photos as their own readers decode them.

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
from triderm_dist.config import Section

WAYS = Path(__file__).with_name("loader_ways.py")
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
    ways: tuple[str, ...] = Field(tuple(NAMES), description="what is measured")
    rounds: int = Field(3, ge=1, description="rounds; medians are reported")
    batch: int = Field(32, ge=1, description="lesions a batch")
    workers: int = Field(2, ge=1, description="worker threads or processes")
    simulated: int = Field(1_000_000, ge=1, description="lesions of the simulated large index")


def main(config: LoaderBenchmark) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = prepare(config, Path(folder))
        rates: dict[str, list[float]] = {way: [] for way in config.ways if way in where}
        for number in range(config.rounds):
            for way in rates:
                rates[way].append(rate(way, where[way], config))
                print(f"round {number + 1}: {NAMES[way]:<55}{rates[way][-1]:>8.0f} photos/s", flush=True)
        starts = {size: own("start", where[size], config) for size in ("packed", "simulated")}
    report(config, rates, starts)


def prepare(config: LoaderBenchmark, folder: Path) -> dict[str, Path]:
    """Where each way finds its files; makes them first."""
    from triderm_dist.data.readers.milk10k import read_challenge
    from triderm_dist.data.shards.pack import pack_shards

    shards = folder / "shards"
    pack_shards(read_challenge(config.source), shards, short_side=288)
    own("simulate", shards, config, str(folder / "simulated"), str(config.simulated))
    where = dict.fromkeys(NAMES, shards) | {"packed": shards, "simulated": folder / "simulated"}
    where |= {"folder_reduced": Path(config.source), "folder": Path(config.original or "")}
    if config.original is None:
        del where["folder"]
    for way in ("litdata", "streaming"):
        where[way] = folder / way
        if way == "streaming" and config.streaming_python is None:
            del where[way]
        elif way in config.ways:
            rival(way, where[way], config, "write", config.source)
    return where


def rate(way: str, where: Path, config: LoaderBenchmark) -> float:
    if way.startswith(("ours", "ceiling")):
        return own(way, where, config)["photos_s"]
    return float(rival(way.replace("folder_reduced", "folder"), where, config).splitlines()[-1])


def own(way: str, where: Path, config: LoaderBenchmark, *more: str) -> dict[str, Any]:
    return json.loads(_run(sys.executable, WAYS, way, where, config, *more).splitlines()[-1])


def rival(way: str, where: Path, config: LoaderBenchmark, *more: str) -> str:
    python = config.streaming_python if way == "streaming" else sys.executable
    return _run(str(python), RIVALS, way, where, config, *more)


def _run(python: str, program: Path, way: str, where: Path, config: LoaderBenchmark, *more: str) -> str:
    command = [python, str(program), way, str(where), str(config.batch), str(config.workers), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    # litData and streaming print to stdout while they work: what counts is the last line.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def report(config: LoaderBenchmark, rates: dict[str, list[float]], starts: dict[str, dict[str, Any]]) -> None:
    """The table, and the line of ratios: medians over rounds of ours / the other way in the same round."""
    ours = rates.get("ours", [])

    def against(*ways: str) -> float | None:
        fastest = [max(values) for values in zip(*(rates[way] for way in ways if way in rates), strict=True)]
        return (
            round(statistics.median(a / b for a, b in zip(ours, fastest, strict=True)), 3) if ours and fastest else None
        )

    shape = f"{config.workers} workers, batches of {config.batch} lesions, {os.cpu_count()} cores"
    print(f"\nmedian of {config.rounds} rounds, {shape}; ratio: ours / this, round by round")
    for way, values in sorted(rates.items(), key=lambda item: -statistics.median(item[1])):
        print(f"{NAMES[way]:<55}{statistics.median(values):>8.0f} photos/s   {against(way) or float('nan'):.2f}")
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
