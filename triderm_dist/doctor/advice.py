"""The shipped experiment and accelerate file for a machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from triderm_dist.doctor.findings import GIB, Finding
from triderm_dist.doctor.machine import Gpu
from triderm_dist.doctor.networks import largest_micro_batch


def suggest(gpus: Sequence[Gpu]) -> list[Finding]:
    """Name the shipped experiment and accelerate file for a machine with these GPUs, and the command to start."""
    count, memory = len(gpus), min((gpu.memory for gpu in gpus), default=0)
    overrides: list[str] = []
    if not gpus:
        experiment = "cpu"
    elif count == 1:
        # Cards sold as 80 and 24 GB have a little less, of which the driver takes a share.
        large, old = memory > 70 * GIB, gpus[0].capability < (8, 9)
        experiment = "a100" if large else "rtx3090" if old or memory < 20 * GIB else "rtx4090"
        if memory < 20 * GIB:
            overrides.append(f"train.micro_batch={_power_of_two(16 * memory / (24 * GIB))}")
    else:
        experiment = "h100x8" if count == 8 and memory > 70 * GIB else "milk10k"
        if experiment == "milk10k":
            fitting = largest_micro_batch(96, count, _power_of_two(32 * memory / (24 * GIB)), smallest=2)
            overrides += [f"train.micro_batch={fitting}"] if fitting else [f"train.global_batch={count * 16}"]
            overrides += [] if fitting else ["train.micro_batch=16"]
    launcher = "single" if count < 2 else "ddp"
    words = ["triderm pipeline", f"--config {experiment}", *overrides, "data.source=FOLDER"]
    if count > 1:
        words.append(f"launcher={launcher}")
    accelerate = launcher if count in (0, 1, 8) else f"{launcher} with num_processes: {count}"
    return [
        Finding("experiment", f"{experiment}; `triderm config copy {experiment}` makes a copy to change"),
        Finding("accelerate file", accelerate),
        Finding("start", " ".join(words)),
    ]


def _power_of_two(value: float) -> int:
    """Return the largest power of two up to `value`, at least 1."""
    return 2 ** max(0, math.floor(math.log2(max(1.0, value))))
