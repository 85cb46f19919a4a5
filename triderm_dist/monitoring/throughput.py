"""Training throughput: lesions per second, data wait, peak memory, MFU and ETA."""

from __future__ import annotations

import sys
import time

import torch

from triderm_dist.data.loader import Loader
from triderm_dist.distributed.collectives import all_reduce_max
from triderm_dist.monitoring.flops import TrainingCompute

GIB = 2**30


class ThroughputMeter:
    """Measures the speed between log lines, and the ETA from the mean speed since the start.

    compute: FLOPs per lesion and peak of the devices, for MFU; None if the peak is unknown.
    """

    def __init__(
        self,
        step: int,
        total_steps: int,
        global_batch: int,
        device: torch.device,
        compute: TrainingCompute | None = None,
    ) -> None:
        self.total_steps, self.global_batch, self.device, self.compute = total_steps, global_batch, device, compute
        self._first_step, self._started = step, time.perf_counter()

    def start(self, loader: Loader, step: int) -> None:
        """Start an interval, so that time before it (validation) does not count."""
        loader.wait.take()
        self._last_step, self._last = step, time.perf_counter()

    def read(self, loader: Loader, step: int) -> dict[str, float]:
        """End the interval and return its values. Call on all ranks.

        lesions_per_s: over all ranks.  data_wait: largest share, over ranks, of the time in which the device waited for
        data (`DataWait`).  mfu: if the peak is known.  memory_gib: largest peak memory of any rank.  seconds_left.
        The device must have finished the step; otherwise its time counts for the next interval.
        """
        now = time.perf_counter()
        seconds, steps = now - self._last, step - self._last_step
        lesions_per_s = steps * self.global_batch / seconds
        largest = torch.tensor([loader.wait.take() / seconds, peak_memory(self.device)], device=self.device)
        data_wait, memory = all_reduce_max(largest).tolist()
        left = (now - self._started) / (step - self._first_step) * (self.total_steps - step)
        self.start(loader, step)
        values = {"lesions_per_s": lesions_per_s, "data_wait": data_wait, "memory_gib": memory, "seconds_left": left}
        return values if self.compute is None else {**values, "mfu": self.compute.mfu(lesions_per_s)}


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: of tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        import resource
    except ImportError:  # on Windows: the memory in use now
        import psutil

        return psutil.Process().memory_info().rss / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
