"""Read cached tokens in threads and move them to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from triderm_dist.data.augment import LesionRng
from triderm_dist.data.threads import Decoders
from triderm_dist.data.token_cache import JoinedCache, TokenCache
from triderm_dist.data.upload import Upload
from triderm_dist.data.view_source import JOB_LESIONS, Fetched, ViewSource
from triderm_dist.schema import VIEWS, Batch


class TokenSource(ViewSource):
    """Cached tokens (B, L, D) of a frozen tower, or output (B, ...) of frozen blocks.

    variants: cached versions of which an rng chooses one for each lesion and view.
    transforms: cached versions under the transforms of the dihedral group, the identity first.
    views: names of the cache's views, in its order.
    """

    def __init__(
        self,
        cache: TokenCache | JoinedCache,
        variants: Sequence[str],
        transforms: Sequence[str],
        views: Sequence[str] = VIEWS,
    ) -> None:
        self.cache, self.variants, self.transforms, self.views = cache, variants, transforms, views
        self._upload = Upload()

    def fetch(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, device: torch.device) -> Fetched:
        buffers = [self._buffer(rows) for _ in self.views]
        jobs = []
        for v, name in enumerate(self.views):
            if rng is None:
                chosen = [self.transforms[0]] * len(rows)
            else:
                pick = np.floor(rng.uniform(f"{name}/variant") * len(self.variants)).astype(int)
                chosen = [self.variants[i] for i in pick]
            records, size = buffers[v].numpy(), max(JOB_LESIONS, -(-len(rows) // pool.workers))
            for part in (slice(start, start + size) for start in range(0, len(rows), size)):
                jobs.append(pool.submit(self.cache.read, rows[part], v, chosen[part], records[part]))
        return Fetched(buffers, jobs)

    def finish(self, fetched: Fetched, device: torch.device, rng: LesionRng | None) -> dict[str, torch.Tensor]:
        with self._upload(fetched.views, device) as (on_device, copied):
            # Copied even if they are float32, since the next batch overwrites the uploaded memory.
            floats = [self.cache.decode(records, copy=copied is not None) for records in on_device]
        return dict(zip(self.views, floats, strict=True))

    def transformed(self, batch: Batch, rows: np.ndarray, transform: int) -> Batch:
        if transform == 0:
            return batch
        views = [self._buffer(rows) for _ in self.views]
        for v, tokens in enumerate(views):
            self.cache.read(rows, v, [self.transforms[transform]] * len(rows), tokens.numpy())
        tokens_of: dict[str, Any] = self.finish(Fetched(views, []), batch.labels.device, None)
        return replace(batch, **tokens_of)

    def _buffer(self, rows: np.ndarray) -> torch.Tensor:
        """Return memory for the records of rows (B,), pinned if there is a GPU; PyTorch reuses it after the copy."""
        return torch.empty((len(rows), self.cache.record_size), dtype=torch.uint8, pin_memory=torch.cuda.is_available())


class JointSource(ViewSource):
    """Reads the views of one set from several caches, each of which holds some of the views."""

    def __init__(self, sources: Sequence[TokenSource]) -> None:
        self.sources = sources

    def fetch(self, pool: Decoders, rows: np.ndarray, rng: LesionRng | None, device: torch.device) -> Fetched:
        parts = [source.fetch(pool, rows, rng, device) for source in self.sources]
        return Fetched.join(parts, parts)

    def finish(self, fetched: Fetched, device: torch.device, rng: LesionRng | None) -> dict[str, torch.Tensor]:
        parts = zip(self.sources, fetched.memory, strict=True)
        return {view: tokens for source, part in parts for view, tokens in source.finish(part, device, rng).items()}

    def transformed(self, batch: Batch, rows: np.ndarray, transform: int) -> Batch:
        for source in self.sources:
            batch = source.transformed(batch, rows, transform)
        return batch
