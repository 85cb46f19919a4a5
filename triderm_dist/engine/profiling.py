"""A few steps under torch's profiler, as a trace for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

WARM_UP = 3
"""Steps before the first that is recorded: compilation, autotuning and the first allocations are not the news."""


def profiler(folder: Path, steps: int | None, active: bool) -> AbstractContextManager[Any]:
    """A context whose `.step()` ends an optimiser step; records `steps` of them into FOLDER/trace.json. Does nothing
    where `steps` is None or `active` is False.
    """
    if steps is None or not active:
        return nullcontext(SimpleNamespace(step=lambda: None))
    from torch.profiler import ProfilerActivity, profile, schedule

    def write(profile: Any) -> None:
        profile.export_chrome_trace(str(folder / "trace.json"))
        print(f"{steps} steps are in {folder / 'trace.json'}: open it in https://ui.perfetto.dev", flush=True)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    return profile(
        activities=activities,
        schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
        profile_memory=True,
    )
