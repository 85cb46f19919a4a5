"""How fast a run goes: lesions a second, waiting for data, and the time that is left."""

from __future__ import annotations

import time

from triderm_dist.data.loader import Loader


class Meter:
    """Speed between two log lines, and since the start for the time that is left."""

    def __init__(self, step: int) -> None:
        self._first_step, self._started = step, time.perf_counter()

    def start(self, loader: Loader, step: int) -> None:
        """Leave out what came before, such as validation."""
        self._last_step, self._last, loader.waited = step, time.perf_counter(), 0.0

    def read(self, loader: Loader, step: int, global_batch: int) -> dict[str, float]:
        """lesions_per_s over all ranks, and the share of the time that this rank waited for data."""
        seconds = time.perf_counter() - self._last
        lesions = (step - self._last_step) * global_batch
        result = {"lesions_per_s": lesions / seconds, "data_wait": loader.waited / seconds}
        self.start(loader, step)
        return result

    def seconds_a_step(self, step: int) -> float:
        return (time.perf_counter() - self._started) / (step - self._first_step)
