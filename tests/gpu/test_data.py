"""Photos on the device are the decoded ones, however late the device reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from simplejpeg import decode_jpeg

from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.shards.index import read_index, read_photo_bytes
from triderm_dist.schema import VIEWS

CYCLES = 20_000_000
"""Cycles of the GPU's clock for which it is kept busy before each batch, some 10 ms: many batches are then decoded
while it still has copies of earlier ones to do."""


def test_photos_are_the_decoded_ones_while_the_device_is_behind(shards: Path) -> None:
    index, device = read_index(shards), torch.device("cuda")
    width, height = index.canvas
    size = min(width, height)
    source = PhotoSource(index, size, (0.5,) * 3, (0.5,) * 3)
    rows = np.random.default_rng(0).permutation(len(index))
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    for step in LoaderFactory(index, source, workers=3).sequential(rows, 8, device):
        torch.cuda._sleep(CYCLES)
        (batch,) = step.micro_batches
        crops = tuple(getattr(batch, view) * 127.5 + 127.5 for view in VIEWS)  # copies on the device
        found |= {int(row): tuple(crop[at] for crop in crops) for at, row in enumerate(step.rows[: step.count])}
    source.close()
    assert sorted(found) == list(range(len(index)))
    left, top = (width - size) // 2, (height - size) // 2
    for row, crops in found.items():
        for view, crop in zip(VIEWS, crops, strict=True):
            photo = decode_jpeg(read_photo_bytes(index, row, view))
            if photo.shape[:2] == (height, width):
                expected = torch.from_numpy(photo[top : top + size, left : left + size].copy()).permute(2, 0, 1)
                torch.testing.assert_close(crop.cpu(), expected.float(), atol=0.01, rtol=0)
