"""How fast a run goes: lesions a second, waiting for data, memory, MFU, and the time that is left."""

from __future__ import annotations

import resource
import time

import torch
import torch.distributed as dist

from triderm_dist.data.loader import Loader
from triderm_dist.monitoring.flops import Budget

GIB = 2**30


class ThroughputMeter:
    """Speed since the last log line, and since the start for the time that is left.

    budget: what MFU is measured by, or None where the peak is not known and none is shown.
    """

    def __init__(
        self, step: int, total_steps: int, global_batch: int, device: torch.device, budget: Budget | None = None
    ) -> None:
        self.total_steps, self.global_batch, self.device, self.budget = total_steps, global_batch, device, budget
        self._first_step, self._started = step, time.perf_counter()

    def start(self, loader: Loader, step: int) -> None:
        """Leave out what came before, such as validation."""
        self._last_step, self._last, loader.waited = step, time.perf_counter(), 0.0

    def read(self, loader: Loader, step: int) -> dict[str, float]:
        """lesions_per_s over all ranks; data_wait, the share of the time that the rank that waits most waited for data;
        mfu; memory_gib, the most that a rank has held so far; seconds_left.

        Call on all ranks, and after the device is done with the step, or its time counts for the next.
        """
        now = time.perf_counter()
        seconds, steps = now - self._last, step - self._last_step
        lesions_per_s = steps * self.global_batch / seconds
        most = torch.tensor([loader.waited / seconds, peak_memory(self.device)], device=self.device)
        if dist.is_initialized():
            dist.all_reduce(most, dist.ReduceOp.MAX)
        data_wait, memory = most.tolist()
        left = (now - self._started) / (step - self._first_step) * (self.total_steps - step)
        self.start(loader, step)
        values = {"lesions_per_s": lesions_per_s, "data_wait": data_wait, "memory_gib": memory, "seconds_left": left}
        return values if self.budget is None else {**values, "mfu": self.budget.mfu(lesions_per_s)}


def peak_memory(device: torch.device) -> float:
    """The most that this process has held so far in GiB: tensors on a GPU, or everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
