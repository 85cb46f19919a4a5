"""Indexing tars of others, and taking a part of a packed set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.scale_rows import Row, packed_set

TAR_LESIONS, SCAN_LESIONS = 1024, 8192
"""Lesions of a tar, and of a simulated scan of one."""


def write_tars(n: int, folder: Path) -> None:
    """Write tars of n lesions with photos of 8 x 8 pixels, each with another comment."""
    import io
    import json

    from PIL import Image

    from triderm_dist.data.shards.tar_writer import TarWriter
    from triderm_dist.schema import DIAGNOSES, VIEWS

    photo = io.BytesIO()
    Image.new("RGB", (8, 8)).save(photo, "JPEG")
    (folder / "theirs").mkdir()
    for tar, start in enumerate(range(0, n, TAR_LESIONS)):
        writer = TarWriter(folder / "theirs" / f"part-{tar:06d}.tar")
        for number in range(start, min(start + TAR_LESIONS, n)):
            for view in VIEWS:
                comment = f"{number} {view}".encode()
                segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment
                writer.add(f"L{number}.{view}.jpg", photo.getvalue()[:2] + segment + photo.getvalue()[2:])
            record = {"label": DIAGNOSES[number % 11], "group": f"P{number // 2}", "concepts": {"hair": 0.5}}
            writer.add(f"L{number}.json", json.dumps(record).encode())
        writer.close()


def index_tars(n: int, folder: Path) -> None:
    from triderm_dist.data.group_hashes import GroupHashing
    from triderm_dist.data.shards.index_foreign import index_shards

    assert len(index_shards(folder / "theirs", hashing=GroupHashing())) == n


def write_scans(n: int, folder: Path) -> None:
    """Write what scans of tars of n lesions find, and the tars as holes."""
    from triderm_dist.data.shards.format import EXTENSIONS, ShardFile
    from triderm_dist.data.shards.scan_tar import TarScan, TarScanner
    from triderm_dist.tasks import milk10k_task

    scanner = TarScanner(folder / "theirs.index.part", milk10k_task(), EXTENSIONS, "refuse")
    (folder / "theirs").mkdir()
    for tar, table in enumerate(_scans(n)):
        path = folder / "theirs" / f"part-{tar:06d}.tar"
        with path.open("wb") as file:
            file.truncate(len(table) * 4096)
        shard, changed = ShardFile(path.name, len(table), len(table) * 4096, f"{tar:064x}"), path.stat().st_mtime_ns
        scan = TarScan(scanner.file(path.name), shard, changed, scanner.settings, (("hair",),), (), {}, {})
        scanner.write(scan, table)


def _scans(n: int) -> Iterator[Any]:
    import numpy as np
    import pyarrow as pa

    from triderm_dist.data.shards.scan_tar import scan_schema
    from triderm_dist.schema import VIEWS
    from triderm_dist.tasks import milk10k_task

    task, random = milk10k_task(), np.random.default_rng(0)
    schema = scan_schema(task)
    for start in range(0, n, SCAN_LESIONS):
        rows = np.arange(start, min(start + SCAN_LESIONS, n))
        count = len(rows)
        photos = np.full((count, len(VIEWS), 3), 8, np.uint64)
        photos[..., 2] = random.integers(1, 2**63, photos.shape[:2], np.uint64)
        columns = {
            "lesion_id": [f"L{row}" for row in rows],
            "group": [f"P{row // 2}" for row in rows],
            "label": rows % 11,
            "shard": np.full(count, -1),
            "metadata": pa.FixedSizeListArray.from_arrays(random.random(4 * count, np.float32), 4),
            "photos": pa.FixedSizeListArray.from_arrays(photos.ravel(), photos[0].size),
            "concepts": pa.ListArray.from_arrays(np.arange(count + 1), random.random(count, np.float32)),
            **{f"{view}_offset": np.arange(count) * 4096 for view in VIEWS},
            **{f"{view}_size": np.full(count, 900) for view in VIEWS},
            **dict.fromkeys(("concept_set", "rotated", "recolored"), np.zeros(count, np.int8)),
        }
        yield pa.table({name: columns[name] for name in schema.names}).cast(schema)


def finish_index(n: int, folder: Path) -> None:
    """Write the index of tars that slices have scanned."""
    index_tars(n, folder)


def prepare_set(n: int, folder: Path) -> None:
    packed_set(n, folder)


def select_part(n: int, folder: Path) -> None:
    """Take the lesions of one diagnosis."""
    from triderm_dist.data.select import select_rows
    from triderm_dist.data.shards.index import read_index
    from triderm_dist.data.shards.join import join_sets

    index = read_index(packed_set(n, folder))
    join_sets([index], [select_rows(index, "diagnosis == 'nv'")], folder / "part")


ROWS = (
    Row("index", index_tars, write_tars, largest=10**5),
    Row("index of scans", finish_index, write_scans),
    Row("join with select", select_part, prepare_set),
)
