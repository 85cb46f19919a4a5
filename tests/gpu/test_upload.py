"""Batches arrive whole on the device, however far the host is ahead, and its waits for data are measured."""

from __future__ import annotations

import time

import pytest
import torch

from triderm_dist.data.upload import DataWait, Upload

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
