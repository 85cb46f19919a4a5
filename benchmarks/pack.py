"""Packing speed against one process of Pillow and tarfile, and the time to open and plan an index of many lesions.

python -m benchmarks.pack source=../shared/milk10k_original

Both sides decode the same photos, reduce them to the same short side by the same filter, code them with the same
quality and write tars; ours also removes metadata, hashes its input and output and writes the index. They alternate,
each run in its own process on copies of the same lesions, whose files are in the page cache. The last line is one
JSON object.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.settings import Section


class PackBenchmark(Section):
    source: str = Field("../shared/milk10k_original", description="challenge folder with photos of their original size")
    short_side: int = Field(288, ge=32, description="short side in pixels that both reduce to")
    copies: int = Field(2, ge=1, description="copies of the folder's lesions, under other names")
    rounds: int = Field(5, ge=1, description="runs of each side, alternating; the median counts")
    lesions: int = Field(10_000_000, ge=0, description="lesions of the synthetic index; 0 leaves this part out")
    scratch: str | None = Field(None, description="folder for written files; null takes the system's temporary folder")


def main(config: PackBenchmark) -> None:
    with tempfile.TemporaryDirectory(dir=config.scratch) as folder:
        results = packing(config, Path(folder))
        if config.lesions:
            results |= planning(config, Path(folder))
    print(json.dumps(results))


def packing(config: PackBenchmark, folder: Path) -> dict[str, float]:
    sides = {"plain": "one process, Pillow and tarfile", "ours": f"triderm pack, {os.cpu_count()} threads"}
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(config.rounds + 1):
        for side in sides:
            result = child("side", side, config, folder / f"{side}-{number}")
            if number:  # the first round fills the page cache
                measured[side].append(result)
    median = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in measured.items()
    }
    print(f"\n{'':<34} {'lesions/s':>10} {'range':>15} {'peak MB':>8} {'MB written':>11}")
    for side, title in sides.items():
        speeds = [run["speed"] for run in measured[side]]
        spread = f"{min(speeds):.1f} to {max(speeds):.1f}"
        row = median[side]
        print(f"{title:<34} {row['speed']:>10.1f} {spread:>15} {row['peak_mb']:>8.0f} {row['written_mb']:>11.1f}")
    ratio = median["ours"]["speed"] / median["plain"]["speed"]
    print(f"ratio {ratio:.2f}; {int(median['ours']['lesions'])} lesions per run, median of {config.rounds}\n")
    return {"vs_plain": round(ratio, 2), "peak_mb": round(median["ours"]["peak_mb"])}


def planning(config: PackBenchmark, folder: Path) -> dict[str, float]:
    results: dict[str, float] = {}
    print(
        f"{'index of':>12} {'sampling':>9} {'window':>7} {'open s':>8} {'plan s':>8} {'peak MB':>8} {'of imports':>11}"
    )
    for lesions in (5_000, config.lesions):
        child("write", str(lesions), config, folder / f"index-{lesions}")
        for sampling, window in (("shuffle", "null"), ("balanced", "null"), ("balanced", "16384")):
            row = child("plan", f"{sampling},{window}", config, folder / f"index-{lesions}")
            print(
                f"{lesions:>12} {sampling:>9} {window:>7} {row['open_s']:>8.4f} {row['plan_s']:>8.4f} "
                f"{row['peak_mb']:>8.0f} {row['imports_mb']:>11.0f}"
            )
        results |= {f"plan_{lesions}_s": round(row["plan_s"], 4), f"plan_{lesions}_mb": round(row["peak_mb"])}
    return results


def child(job: str, argument: str, config: PackBenchmark, folder: Path) -> dict[str, float]:
    """Run one measurement in a new process, so that its peak memory counts nothing else."""
    arguments = [job, argument, config.source, str(config.short_side), str(config.copies), str(folder)]
    command = [sys.executable, "-m", "benchmarks.pack", "--measure", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(job: str, argument: str, source: str, short_side: str, copies: str, folder: str) -> dict[str, float]:
    if job == "write":
        return write_synthetic_index(int(argument), Path(folder))
    if job == "plan":
        sampling, window = argument.split(",")
        return open_and_plan(Path(folder), sampling, None if window == "null" else int(window))
    from dataclasses import replace

    from triderm_dist.data.readers.milk10k import read_challenge

    dataset = read_challenge(source)
    lesions = [
        replace(lesion, lesion_id=f"{lesion.lesion_id}-{copy}")
        for copy in range(int(copies))
        for lesion in dataset.lesions
    ]
    dataset = replace(dataset, lesions=lesions)
    began = time.perf_counter()
    if argument == "ours":
        from triderm_dist.data.shards.pack import pack_shards

        pack_shards(dataset, folder, short_side=int(short_side))
    else:
        pack_plainly(dataset, Path(folder), int(short_side))
    seconds = time.perf_counter() - began
    written = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "speed": len(lesions) / seconds,
        "lesions": len(lesions),
        "peak_mb": peak_mb(),
        "written_mb": written / 1e6,
    }


def pack_plainly(dataset, folder: Path, short_side: int) -> None:  # type: ignore[no-untyped-def]
    """Pack as a simple script would: Pillow, tarfile, a new tar every 512 lesions."""
    from PIL import Image

    folder.mkdir()
    tar: tarfile.TarFile | None = None
    for number, lesion in enumerate(dataset.lesions):
        if number % 512 == 0:
            if tar:
                tar.close()
            tar = tarfile.open(folder / f"shard-{number // 512:06d}.tar", "w")  # noqa: SIM115
        members = {}
        for view, path in lesion.images.items():
            image = Image.open(path).convert("RGB")
            scale = short_side / min(image.size)
            if scale < 1:
                size = (round(image.width * scale), round(image.height * scale))
                image = image.resize(size, Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            members[f"{view}.jpg"] = buffer.getvalue()
        members["json"] = json.dumps({"label": lesion.label, "metadata": lesion.metadata}).encode()
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{lesion.lesion_id}.{extension}")
            info.size = len(data)
            assert tar
            tar.addfile(info, io.BytesIO(data))
    if tar:
        tar.close()


def write_synthetic_index(lesions: int, folder: Path) -> dict[str, float]:
    """Write an index of many lesions, whose photos are holes in sparse files."""
    from benchmarks.simulated_set import write_simulated_set

    write_simulated_set(folder, lesions, shard_samples=4096)
    return {}


def open_and_plan(folder: Path, sampling: str, window: int | None) -> dict[str, float]:
    """Measure opening the index, and planning an epoch up to its first global batch."""
    import numpy as np

    from triderm_dist.data.plan import EpochPlan, Samples, Sampling
    from triderm_dist.data.shards.index import read_index

    imports = peak_mb()
    began = time.perf_counter()
    index = read_index(folder)
    opened = time.perf_counter()
    samples = Samples(np.arange(len(index)), index.labels, index.shard)
    plan = EpochPlan(samples, Sampling(sampling, window=window), seed=0, epoch=0)  # type: ignore[arg-type]
    next(iter(plan.batches(0, 8, 96)))
    planned = time.perf_counter()
    return {"open_s": opened - began, "plan_s": planned - opened, "peak_mb": peak_mb(), "imports_mb": imports}


def peak_mb() -> float:
    """Return the peak resident memory of this process; `ru_maxrss` would include the parent's."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        run(PackBenchmark, main, __doc__)
