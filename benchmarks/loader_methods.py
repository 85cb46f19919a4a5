"""The methods of this toolkit in `benchmarks.loader`, one per process.

python benchmarks/loader_methods.py METHOD FOLDER BATCH WORKERS

Its last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from triderm_dist.checksums import write_checked_json
from triderm_dist.config import AugmentConfig
from triderm_dist.data.augment import LesionRng
from triderm_dist.data.loader import Loader
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.format import INDEX, SAMPLES
from triderm_dist.data.shards.index import ShardIndex, read_index
from triderm_dist.data.shards.reader import FolderShards
from triderm_dist.data.threads import Decoders
from triderm_dist.data.view_source import Fetched
from triderm_dist.distributed.malloc import disable_malloc_trim

CPU, HALF = torch.device("cpu"), (0.5,) * 3


class HostPhotos(PhotoSource):
    """Photos as copied to the device: uint8, both views, in the ring's buffers."""

    def fetch(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, device: torch.device) -> Fetched:
        return super().fetch(pool, rows, rng, torch.device("cuda"))  # else crops are computed as well

    def finish(self, fetched: Fetched, device: torch.device, rng: LesionRng | None) -> dict[str, torch.Tensor]:
        self.release(fetched)
        return dict(zip(self.views, fetched.views, strict=True))


def plan_of(index: ShardIndex) -> EpochPlan:
    return EpochPlan(Samples.of(index, np.arange(len(index))), Sampling("balanced"), 0, 0)


def ours(folder: Path, batch: int, workers: int, source_class: type[PhotoSource] = HostPhotos) -> dict[str, float]:
    index = read_index(folder)
    source = source_class(index, 224, HALF, HALF)
    batches = plan_of(index).batches(0, 1, batch)
    steps = iter(
        Loader(index, source, batches, micro_batch=batch, device=CPU, augment=AugmentConfig(), workers=workers)
    )
    next(steps)
    started, photos = time.perf_counter(), 0
    for step in steps:
        photos += 2 * len(step.rows)
    return {"photos_s": photos / (time.perf_counter() - started)}


def ours_spare(folder: Path, batch: int, workers: int) -> dict[str, float]:
    return ours(folder, batch, workers + 1)


def ours_finished(folder: Path, batch: int, workers: int) -> dict[str, float]:
    disable_malloc_trim()  # as every training on a CPU does
    return ours(folder, batch, workers, PhotoSource)


def ceiling(folder: Path, workers: int, decoder: str) -> dict[str, float]:
    """Decode JPEG bytes in memory on all cores, and drop each photo at once."""
    index = read_index(folder)
    shards = FolderShards(index)
    locations = zip(index.shard, index.offsets, index.sizes, strict=True)
    by_row = [
        [shards.read(int(shard), int(offset), int(size)) for offset, size in zip(offsets, sizes, strict=True)]
        for shard, offsets, sizes in locations
    ]
    photos = [photo for row in plan_of(index).order for photo in by_row[row]]
    if decoder == "torchvision":
        from torchvision.io import decode_jpeg

        encoded = [torch.frombuffer(bytearray(photo), dtype=torch.uint8) for photo in photos]
        decode_one = decode_jpeg
    else:
        import simplejpeg

        encoded, decode_one = photos, lambda photo: simplejpeg.decode_jpeg(photo, "RGB")

    def decode(part: list) -> None:
        for photo in part:
            decode_one(photo)

    with Decoders(workers) as pool:
        parts = [encoded[number::workers] for number in range(workers)]
        list(pool.map(decode, [part[:50] for part in parts]))
        started = time.perf_counter()
        list(pool.map(decode, parts))
        return {"photos_s": len(encoded) / (time.perf_counter() - started)}


def start(folder: Path, batch: int, workers: int) -> dict[str, float]:
    """Measure the seconds from opening the index to the first batch, at the start and at 90% of an epoch.

    Also the memory of index, plan and loader after 60 batches.
    """
    before = resident()
    seconds = {}
    for name, part in (("start_s", 0.0), ("resume_s", 0.9)):
        started = time.perf_counter()
        index = read_index(folder)
        source = HostPhotos(index, 224, HALF, HALF)
        plan = plan_of(index)
        batches = plan.batches(0, 1, batch, start=int(part * plan.num_batches(batch)))
        steps = iter(
            Loader(index, source, batches, micro_batch=batch, device=CPU, augment=AugmentConfig(), workers=workers)
        )
        next(steps)
        seconds[name] = time.perf_counter() - started
        for _, _ in zip(range(60), steps, strict=False):
            pass
        seconds.setdefault("mb", (resident() - before) / 1e6)
        steps.close()  # type: ignore[attr-defined]
        source.close()
    return seconds


def resident() -> int:
    """Return the resident bytes of this process."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


def simulate(folder: Path, output: Path, lesions: int) -> dict[str, int]:
    """Write an index of many lesions over the same shards: its rows repeated under new ids."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from triderm_dist.files import file_sha256

    output.mkdir()
    raw = json.loads((folder / INDEX).read_text())
    table = pq.read_table(folder / SAMPLES)
    copies = -(-lesions // len(table))
    parts = []
    for copy in range(copies):
        names = pa.array([f"{name}-{copy}" for name in table["lesion_id"].to_pylist()])
        column = table.schema.get_field_index("lesion_id")
        parts.append(table.set_column(column, table.schema.field(column), names))
    pq.write_table(pa.concat_tables(parts), output / SAMPLES, row_group_size=1 << 17)
    for shard in raw["shards"]:
        shard["samples"] *= copies
        os.link(folder / shard["url"], output / shard["url"])
    raw["photo_sizes"] = {size: copies * count for size, count in raw["photo_sizes"].items()}
    raw["samples"] |= {
        "rows": copies * len(table),
        "bytes": (output / SAMPLES).stat().st_size,
        "sha256": file_sha256(output / SAMPLES),
    }
    write_checked_json(output / INDEX, raw)
    return {"lesions": copies * len(table)}


def main(method: str, path: str, batch: str, workers: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    folder = Path(path)
    if method.startswith("ceiling_"):
        result: dict = ceiling(folder, int(workers), method.removeprefix("ceiling_"))
    elif method == "simulate":
        result = simulate(folder, Path(arguments[0]), int(arguments[1]))
    else:
        methods = {"ours": ours, "ours_spare": ours_spare, "ours_finished": ours_finished, "start": start}
        result = methods[method](folder, int(batch), int(workers))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
