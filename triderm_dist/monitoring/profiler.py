"""Profile a few steps with torch.profiler, as a trace for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from triderm_dist.distributed.collectives import is_main
from triderm_dist.runtime.terminal import wrapped

WARM_UP = 3
"""Steps before the first recorded one: compilation, autotuning, first allocations."""


@contextmanager
def profiler(folder: Path, steps: int | None) -> Iterator[Any]:
    """Profile rank 0 in the block; yields an object whose `.step()` must be called after every optimizer step.

    Records up to `steps` steps into FOLDER/trace.json and prints how many, or that there were too few; None records
    none.
    """
    if steps is None or not is_main():
        yield SimpleNamespace(step=lambda: None)
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    recorded = 0

    def write(profile: Any) -> None:
        nonlocal recorded
        recorded = profile.step_num - WARM_UP
        if recorded:
            profile.export_chrome_trace(str(folder / "trace.json"))
            text = f"{recorded} steps are in {folder / 'trace.json'}: open it in https://ui.perfetto.dev"
            print(wrapped(text), flush=True)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(
        activities=activities,
        schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
        profile_memory=True,
    ) as running:
        yield running
    if not recorded:
        print(
            wrapped(
                f"train.profile: no trace, since the first {WARM_UP} steps are not recorded and {running.step_num} "
                "were taken"
            ),
            flush=True,
        )
