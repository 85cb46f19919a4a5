"""Write the index of a packed set of any size, without photos: index.json, samples.parquet, and tars that are holes.

The class shares are those of MILK10k, a patient has 1 to 3 lesions (2 on average), and both ids are in no order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from triderm_dist.data.shards.format import ROW_GROUP, ShardFile, rows_schema
from triderm_dist.data.shards.write_index import write_index
from triderm_dist.schema import UNLABELED, VIEWS
from triderm_dist.tasks import milk10k_task

COUNTS = (303, 2522, 44, 544, 52, 50, 9, 450, 749, 473, 44)
"""Lesions of each diagnosis in MILK10k."""
CONCEPTS = [f"concept {number}" for number in range(14)]
PHOTO_BYTES = 30_000
UNLABELED_SHARE = 0.01


def write_simulated_set(folder: Path, lesions: int, shard_samples: int = 512, seed: int = 0) -> Path:
    """Write a set of so many lesions into a new folder, and return it. Holds about 60 bytes per lesion in memory."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    photo = f"{PHOTO_BYTES:05d}".encode()
    shards = []
    for number, start in enumerate(range(0, lesions, shard_samples)):
        samples = min(shard_samples, lesions - start)
        size = samples * len(VIEWS) * PHOTO_BYTES
        shards.append(ShardFile(f"shard-{number:06d}.tar", samples, size, hashlib.sha256(photo * number).hexdigest()))
        with (folder / shards[-1].url).open("wb") as file:
            file.truncate(size)
    write_index(folder, _tables(lesions, shard_samples, random), shards, milk10k_task(), CONCEPTS, [], {})
    return folder


def _tables(lesions: int, shard_samples: int, random: np.random.Generator) -> Iterator[pa.Table]:
    task = milk10k_task()
    schema = rows_schema(task, CONCEPTS)
    lesion_numbers = random.permutation(lesions).astype(np.int32)
    patients = np.repeat(np.arange(lesions, dtype=np.int32), np.arange(lesions, dtype=np.int32) % 3 + 1)[:lesions]
    patients = random.permutation(lesions).astype(np.int32)[random.permutation(patients)]
    for start in range(0, lesions, ROW_GROUP):
        rows = np.arange(start, min(start + ROW_GROUP, lesions))
        count = len(rows)
        labels = random.choice(len(COUNTS), count, p=np.array(COUNTS) / sum(COUNTS))
        labels[random.random(count) < UNLABELED_SHARE] = UNLABELED
        within = rows % shard_samples
        photos = np.empty((count, len(VIEWS), 3), np.uint64)
        photos[..., :2] = 384, 288
        photos[..., 2] = random.integers(1, 2**63, photos.shape[:2], np.uint64)
        metadata = np.stack(
            [random.integers(20, 90, count), *(random.integers(0, 2, (len(task.fields) - 1, count)))]
        ).T.astype(np.float32)
        metadata[random.random(metadata.shape) < 0.1] = np.nan
        columns = {
            "lesion_id": _text(b"IL_", lesion_numbers[rows]),
            "group": _text(b"IP_", patients[rows]),
            "label": labels,
            "shard": rows // shard_samples,
            "concepts": _lists(random.random((count, len(CONCEPTS)), np.float32)),
            "metadata": _lists(metadata),
            "photos": _lists(photos.reshape(count, -1)),
        }
        for view, name in enumerate(VIEWS):
            columns[f"{name}_offset"] = (within * len(VIEWS) + view) * PHOTO_BYTES
            columns[f"{name}_size"] = np.full(count, PHOTO_BYTES)
        arrays = [pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names]
        yield pa.Table.from_arrays(arrays, schema=schema)


def _text(prefix: bytes, numbers: np.ndarray, digits: int = 8) -> pa.Array:
    """Return the prefix and each number (n,) with leading zeros, as MILK10k writes ids."""
    text = np.empty((len(numbers), len(prefix) + digits), np.uint8)
    text[:, : len(prefix)] = np.frombuffer(prefix, np.uint8)
    text[:, len(prefix) :] = numbers[:, None] // 10 ** np.arange(digits - 1, -1, -1) % 10 + ord("0")
    ends = np.arange(len(numbers) + 1, dtype=np.int32) * text.shape[1]
    return pa.StringArray.from_buffers(len(numbers), pa.py_buffer(ends), pa.py_buffer(text))


def _lists(matrix: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
