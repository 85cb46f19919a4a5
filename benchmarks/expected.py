"""What each experiment file for a GPU is expected to take, by arithmetic, as the head of the file says it.

python -m benchmarks.expected [write=true]

Memory by `MemoryEstimate`, lesions/s from the FLOPs at an assumed MFU of the device's data sheet, cores that decode the
photos; with stand-ins for towers that are not on this machine. write=true replaces the lines of the files. The last
line is one JSON object: by file and model the GiB and lesions/s.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Experiment, find_file, load
from triderm_dist.files import write_text
from triderm_dist.settings import Section

if TYPE_CHECKING:
    from triderm_dist.models.network import Network

HEAD = "# Expected"
DEVICES = {
    "rtx3090": "NVIDIA GeForce RTX 3090",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100x8": "NVIDIA H100 80GB HBM3",
}
"""The GPU that a file is for, by the file's name, or its beginning for files of large towers."""
CONCEPTS = tuple(f"{view}/{number}" for view in ("clinical", "dermoscopic") for number in range(7))


class ExpectedBenchmark(Section):
    files: list[str] = Field([], description="names of the files; []: all")
    write: bool = Field(False, description="replace the lines in the heads of the files")


def main(config: ExpectedBenchmark) -> None:
    heads = expected_heads(config.files)
    for name, lines in heads.items():
        print("\n".join([name, *lines]))
        if config.write:
            path = find_file("experiments", name)
            old = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(HEAD)]
            first = next(i for i, line in enumerate(old) if not line.startswith("#"))
            write_text(path, "\n".join([*old[:first], *lines, *old[first:]]) + "\n")
    print(json.dumps({name: len(lines) for name, lines in heads.items()}))


def expected_heads(names: Collection[str] = ()) -> dict[str, list[str]]:
    """Return the lines on what is expected of files, () all, one for each model, by the file's name."""
    from triderm_dist.monitoring.flops import training_flops

    devices = {name: device for base, device in DEVICES.items() for name in (base, f"{base}_large")}
    flops_of = functools.cache(training_flops)  # several files train the same networks
    return {name: _head(name, devices[name], flops_of) for name in names or devices}


def _head(name: str, device: str, flops_of: Callable[[Network], float]) -> list[str]:
    from triderm_dist.doctor.advice import canvas_of
    from triderm_dist.monitoring.expectation import expect
    from triderm_dist.monitoring.flops import TrainingCompute, named_peak
    from triderm_dist.monitoring.memory_estimate import bare_network
    from triderm_dist.tasks import milk10k_task

    experiment, peak = load(Experiment, name), named_peak(device)
    assert peak is not None
    lines = []
    for model_name, model in experiment.models.items():
        network, _ = bare_network(model, milk10k_task().signature(CONCEPTS))
        compute = TrainingCompute(flops_of(network), peak, 1, "data sheet")
        found = expect(network, model.train, compute, True, canvas=canvas_of(experiment.data))
        lines.append(f"{HEAD} of {model_name} on one {device.removeprefix('NVIDIA ')}: {found}.")
    return lines


if __name__ == "__main__":
    run(ExpectedBenchmark, main, __doc__)
