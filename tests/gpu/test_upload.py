"""Batches arrive whole on the device, however far the host is ahead, and what it waits for is known."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from triderm_dist.config import AugmentConfig
from triderm_dist.data.augment import AUGMENTATIONS
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.mixing import Mixing
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.index import read_index
from triderm_dist.data.upload import DataWait, HostCopy, Upload, read_behind

DEVICE = torch.device("cuda")
CYCLES = 20_000_000
"""Of `torch.cuda._sleep`: some 10 ms."""


def test_batches_arrive_whole_while_the_device_is_behind() -> None:
    upload, arrived, sizes = Upload(), [], (4, 2, 4, 3, 6, 6, 1, 6)
    for number, size in enumerate(sizes):
        pinned = [torch.full((size, 1000), number + view, dtype=torch.uint8).pin_memory() for view in (0, 100)]
        torch.cuda._sleep(CYCLES)
        with upload(pinned, DEVICE) as (on_device, copied):
            torch.cuda._sleep(CYCLES)  # as kernels that read the batch later than the next one could be copied
            arrived.append([tensor.clone() for tensor in on_device])
        assert copied is not None
        copied.synchronize()
        for tensor in pinned:
            tensor.fill_(255)  # as decoders fill a buffer again
    for number, (views, size) in enumerate(zip(arrived, sizes, strict=True)):
        assert [len(view) for view in views] == [size, size]
        assert [view.cpu().unique().tolist() for view in views] == [[number], [number + 100]]


def test_results_are_read_while_the_device_computes_the_next() -> None:
    def copies() -> Iterator[HostCopy]:
        for number in range(4):
            torch.cuda._sleep(CYCLES)
            result = torch.full((1000,), float(number), device=DEVICE)
            yield HostCopy([result, result > 1])
            result.fill_(-1)  # as the next replay of a graph writes to the same memory

    for number, (numbers, flags) in enumerate(read_behind(copies())):
        assert set(numbers.tolist()) == {number} and set(flags.tolist()) == {number > 1}
    assert number == 3


@pytest.mark.parametrize("busy", [True, False])
def test_a_wait_counts_only_where_the_device_has_nothing_to_compute(busy: bool) -> None:
    wait, seconds = DataWait(DEVICE), 0.05
    for _ in range(3):
        torch.cuda.synchronize()
        if busy:
            torch.cuda._sleep(20 * CYCLES)  # 100 ms and more
        with wait():
            time.sleep(seconds)
    waited = wait.take()
    assert waited < 0.02 if busy else 3 * seconds <= waited < 6 * seconds
    assert wait.take() == 0


def test_neither_augmentations_nor_mixing_wait_for_the_device(shards: Path) -> None:
    index, strengths = read_index(shards), {"clinical": 0.5, "dermoscopic": 0.5}
    built_in = [name for name, kind in AUGMENTATIONS.items() if kind.__module__.startswith("triderm_dist")]
    augment = AugmentConfig(mixup=0.4, cutmix=0.4, extra=dict.fromkeys(built_in, strengths))
    source, mixing = PhotoSource(index, 32, (0.5,) * 3, (0.4,) * 3, augment), Mixing(augment, index.signature)
    batches = EpochPlan(Samples.of(index, np.arange(len(index))), Sampling("shuffle"), 0, 0).batches(0, 1, 8)
    steps = iter(LoaderFactory(index, source).create(batches, 8, DEVICE, augment=augment))
    try:
        for number, step in zip(range(5), steps, strict=False):
            mixing(step.micro_batches[0])
            if number == 1:  # constants are on the device
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        steps.close()  # type: ignore[attr-defined]
