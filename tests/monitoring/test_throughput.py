"""Speed, data wait and ETA, with a fake clock."""

from types import SimpleNamespace

import pytest
import torch

from triderm_dist.data.upload import DataWait
from triderm_dist.monitoring import throughput
from triderm_dist.monitoring.flops import TrainingCompute
from triderm_dist.monitoring.throughput import ThroughputMeter


def test_speed_covers_the_last_interval_and_eta_the_whole_run(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    loader = SimpleNamespace(wait=DataWait(torch.device("cpu")))

    def wait_for_data(seconds: float) -> None:
        with loader.wait():
            clock.now += seconds

    wait_for_data(7.0)
    compute = TrainingCompute(flops=1e9, peak=1e12, devices=1, source="")
    meter = ThroughputMeter(10, total_steps=30, global_batch=8, device=torch.device("cpu"), compute=compute)
    clock.now = 109.0  # 9 s before the first step
    meter.start(loader, 10)
    wait_for_data(0.25)
    wait_for_data(0.25)
    clock.now = 111.0
    first = meter.read(loader, 14)
    assert (first["lesions_per_s"], first["data_wait"], first["seconds_left"]) == (16, 0.25, 16)
    assert first["mfu"] == pytest.approx(0.016) and first["memory_gib"] > 0
    clock.now = 113.0
    second = meter.read(loader, 20)
    assert (second["lesions_per_s"], second["data_wait"], second["seconds_left"]) == (24, 0, 6)
