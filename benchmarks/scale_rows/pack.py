"""Reading a table, and the memory of the process that packs while others write the shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.scale_rows import Row

if TYPE_CHECKING:
    from triderm_dist.data.readers.dataset import Dataset

CHUNK = 1 << 16
"""Lesions that are written at a time."""


def write_tables(n: int, folder: Path) -> None:
    """Write the tables of a challenge with n lesions: 7 scores of 6 decimals a photo, a patient for 1.5 lesions."""
    import pyarrow as pa
    import pyarrow.csv as csv

    from triderm_dist.data.readers.milk10k import GROUP_COLUMN, MONET_COLUMNS
    from triderm_dist.tasks import milk10k_task

    task, rng = milk10k_task(), np.random.default_rng(0)
    sites = task.fields[3].categories
    paths = [folder / f"MILK10k_Training_{name}.csv" for name in ("Metadata", "GroundTruth")]
    writers: list[Any] = [None, None]
    for start in range(0, n, CHUNK):
        own = np.arange(start, min(start + CHUNK, n))
        lesions, rows = len(own), 2 * len(own)
        both: dict[str, Any] = {
            "lesion_id": np.repeat([f"IL_{at:08d}" for at in own.tolist()], 2),
            "image_type": np.tile(["clinical: close-up", "dermoscopic"], lesions),
            "isic_id": [f"ISIC_{at:08d}" for at in range(2 * start, 2 * start + rows)],
            GROUP_COLUMN: np.repeat([f"P{at * 2 // 3}" for at in own.tolist()], 2),
            "age_approx": np.repeat(5 * rng.integers(1, 18, lesions), 2),
            "sex": np.repeat(rng.choice(["male", "female"], lesions), 2),
            "skin_tone_class": np.repeat(rng.integers(0, 6, lesions), 2),
            "site": np.repeat(rng.choice([*sites, ""], lesions), 2),
        }
        scores = {name: rng.integers(0, 10**6 + 1, rows) / 10**6 for name in MONET_COLUMNS}
        label = rng.integers(0, len(task.diagnoses), lesions)
        truth = {"lesion_id": both["lesion_id"][::2]}
        truth |= {name: (label == at).astype(np.float64) for at, name in enumerate(task.diagnosis_names)}
        for number, table in enumerate((pa.table(both | scores), pa.table(truth))):
            writers[number] = writers[number] or csv.CSVWriter(
                paths[number], table.schema, write_options=csv.WriteOptions(quoting_style="none")
            )
            writers[number].write_table(table)
    for writer in writers:
        writer.close()


def read_tables(n: int, folder: Path) -> Dataset:
    """Read the tables; the photos are names only."""
    from triderm_dist.data.readers import find_photos, milk10k

    def walk_files(*arguments: Any) -> Iterator[tuple[str, str, str]]:
        for at in range(2 * n):
            yield f"{folder}/MILK10k_Training_Input/IL_{at // 2:08d}", f"ISIC_{at:08d}.jpg", ".jpg"

    find_photos.walk_files = walk_files  # type: ignore[assignment]
    (folder / "MILK10k_Training_Input").mkdir()
    found = milk10k.read_challenge(folder)
    assert len(found.lesions) == n and len(found.notes) == 1, found.notes
    return found


def measure_read(n: int, folder: Path) -> None:
    read_tables(n, folder)


def measure_driver(n: int, folder: Path) -> dict[str, float]:
    """Do all that the process does which packs by a cluster, but hand the lesions to none: the shards are holes."""
    import pyarrow as pa

    from triderm_dist.data.group_hashes import GroupHashing, hash_groups
    from triderm_dist.data.readers import milk10k  # noqa: F401, its memory is not the driver's
    from triderm_dist.data.shards.format import ShardFile, rows_schema
    from triderm_dist.data.shards.pack import pack_shards
    from triderm_dist.data.shards.part_folder import FinishedShard
    from triderm_dist.runtime.memory import return_freed_memory

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # for the columns of the set
    before = _memory("VmRSS")
    dataset, hashes = hash_groups(read_tables(n, folder), folder / "out", GroupHashing())
    return_freed_memory()  # as packing begins with
    Path("/proc/self/clear_refs").write_text("5")  # the peak of reading is that of the row `read`
    schema = rows_schema(dataset.task, dataset.concepts)
    size = 10240

    def distribute(work: Any, shards: Any) -> Iterator[int]:
        part = work.args[0]
        for number, lesions in shards:
            count, path = len(lesions), part.tar(number)
            with path.open("wb") as tar:
                tar.truncate(size)
            zeros = np.zeros(count, np.int32)
            photos = np.full((count, 6), 100, np.uint64)
            photos[:, 2::3] = np.arange(count * 2).reshape(count, 2) + number * 2 * 512 + 1
            columns = {
                "lesion_id": [lesion.lesion_id for lesion in lesions],
                "group": [lesion.group for lesion in lesions],
                "label": [lesion.label for lesion in lesions],
                "shard": zeros,
                **{name: zeros + 512 for name in schema.names if name.endswith(("_offset", "_size"))},
                "concepts": [lesion.concepts for lesion in lesions],
                "metadata": [lesion.metadata for lesion in lesions],
                "photos": photos.tolist(),
            }
            arrays = [pa.array(columns[field.name]).cast(field.type) for field in schema]
            file = ShardFile(path.name, count, size, "0" * 64)
            part.add(number, FinishedShard("", "", file, (), {}), pa.table(arrays, schema))
            yield number

    options: dict[str, Any] = {"group_hashes": hashes, "distribute": distribute, "release_lesions": True}
    pack_shards(dataset, folder / "out", short_side=None, **options)
    return {"peak_mb": _memory("VmHWM") - before}


def _memory(what: str) -> float:
    """Return a figure of this process's memory in MB, of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


ROWS = (
    Row("read", measure_read, write_tables),
    Row("pack driver", measure_driver, write_tables, largest=10**6),
)
