"""Reading cached tokens in the order of a plan."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.scale_rows import Row, open_files

SHAPE = (1, 8)
VERSIONS = ("plain", *(f"augmented-{number}" for number in range(4)))
BATCHES, BATCH = 200, 512


def cache(n: int, folder: Path):  # type: ignore[no-untyped-def]
    from triderm_dist.data.token_cache import TokenCache

    return TokenCache(folder / "tokens", n, SHAPE)


def write_tokens(n: int, folder: Path) -> None:
    """Write one version; the others are links to its files."""
    import numpy as np

    own = cache(n, folder)
    for chunk in own.chunks:
        own.write(VERSIONS[0], chunk, np.zeros((len(own.rows(chunk)), 2, *SHAPE), np.float16))
    for version in VERSIONS[1:]:
        (own.folder / version).mkdir()
        for path in (own.folder / VERSIONS[0]).iterdir():
            os.link(path, own.folder / version / path.name)


def look_up(n: int, folder: Path) -> dict[str, float]:
    """List what is missing, and read as many batches of random lesions and versions at any n."""
    import numpy as np
    import torch

    own, random, opened = cache(n, folder), np.random.default_rng(0), 0
    out = np.empty((BATCH, own.record_size), np.uint8)
    before, began = open_files(), time.process_time()
    assert not own.missing(VERSIONS)
    for _ in range(BATCHES):
        rows, versions = random.integers(0, n, BATCH), random.choice(VERSIONS, BATCH).tolist()
        for view in range(2):
            own.read(rows, view, versions, out)
            own.decode(torch.from_numpy(out))
        opened = max(opened, open_files() - before)
    return {"cpu_s": time.process_time() - began, "open_files": opened}


ROWS = (Row("tokens lookup", look_up, write_tokens),)
