"""Reading cached tokens in the order of a plan."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.scale_rows import Row, open_files

SHAPE = (1, 8)
BATCHES, BATCH = 200, 96


def cache(n: int, folder: Path):  # type: ignore[no-untyped-def]
    from triderm_dist.data.token_cache import TokenCache

    return TokenCache(folder / "tokens", n, SHAPE)


def write_tokens(n: int, folder: Path) -> None:
    import numpy as np

    own = cache(n, folder)
    for chunk in own.chunks:
        own.write("plain", chunk, np.zeros((len(own.rows(chunk)), 2, *SHAPE), np.float16))


def look_up(n: int, folder: Path) -> dict[str, float]:
    """Read as many batches of random lesions at any n, as the first steps of an epoch do."""
    import numpy as np

    own, random, opened = cache(n, folder), np.random.default_rng(0), 0
    out = np.empty((BATCH, *SHAPE), np.float16)
    began = time.process_time()
    for _ in range(BATCHES):
        own.read(random.integers(0, n, BATCH), 0, ["plain"] * BATCH, out)
        opened = max(opened, open_files())
    return {"cpu_s": time.process_time() - began, "open_files": opened}


ROWS = (Row("tokens lookup", look_up, write_tokens),)
