"""Check a machine and an experiment before a run, and advise how to fix each problem.

Nothing is downloaded, started or written. A check whose package is missing reports that instead of failing.

    software, machine   of this host
    launcher            processes and port of an accelerate file
    networks            precision, batch, memory, weights
    disk                what the run will leave, and what it takes while it trains
    data                packed data sets, and the speed of reading them
    ranks               differences between the ranks that the doctor is started on, and their all-reduce
    advice              the shipped experiment for this machine
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from triderm_dist.config import Experiment
from triderm_dist.data.readers.source import find_task
from triderm_dist.data.threads import available_cores
from triderm_dist.doctor.advice import canvas_of, suggest
from triderm_dist.doctor.data import data_findings, open_shards
from triderm_dist.doctor.disk import disk_finding
from triderm_dist.doctor.findings import GIB, Finding
from triderm_dist.doctor.launcher import Launcher, launcher_findings, strategy
from triderm_dist.doctor.machine import find_gpus, machine_findings
from triderm_dist.doctor.networks import Hardware, network_findings
from triderm_dist.doctor.software import architectures, compiler, nccl, versions
from triderm_dist.schema import InputError, Signature
from triderm_dist.tasks import milk10k_task

if TYPE_CHECKING:
    from triderm_dist.data.shards.index import ShardIndex


def host_findings(experiment: Experiment, launcher: Launcher | None = None) -> dict[str, list[Finding]]:
    """Return the findings that may differ between the hosts of a run, by section."""
    gpus = find_gpus()
    required = {"deepspeed"} if strategy(launcher, 1) == "deepspeed" else set()
    if experiment.stack.enabled and experiment.stack.kind == "xgboost":
        required.add("xgboost")
    written_before = [Path(__file__), Path(experiment.train_shards, "index.json"), experiment.folder]
    return {
        "software": [
            *versions(required),
            nccl(bool(gpus)),
            *([compiler()] if gpus and any(model.train.compile for model in experiment.models.values()) else []),
            *architectures(gpus),
        ],
        "machine": machine_findings(gpus, experiment.folder, written_before),
    }


def examine(
    experiment: Experiment,
    ranks: int | None = None,
    gpu_memory: float | None = None,
    launcher: Launcher | None = None,
    gpu_share: float | None = None,
) -> dict[str, list[Finding]]:
    """Return all findings, by section.

    ranks: the processes of a training to plan for; None takes the launcher's, else one. gpu_memory: GiB of the GPU to
    plan for; None takes the smallest of this host. launcher: the accelerate file that the run will start with.
    gpu_share: of a GPU for each training, where folds are trained in parallel on all GPUs; None if they are not.
    """
    gpus = find_gpus()
    ranks = ranks or (launcher.ranks if launcher else 1)
    at_once = max(1, int(len(gpus) / gpu_share)) if gpu_share else ranks
    sections = host_findings(experiment, launcher)
    if "WORLD_SIZE" not in os.environ and (found := launcher_findings(launcher, len(gpus), available_cores())):
        sections["launcher"] = found  # under a launcher its port is in use
    packed = open_shards(experiment.train_shards, experiment.data)
    signature, test = _signature(experiment, packed), open_shards(experiment.test_shards, experiment.data)
    memory = gpu_memory or min((gpu.memory / GIB for gpu in gpus), default=None)
    canvas = None
    if memory is not None:
        canvas = canvas_of(experiment.data) if isinstance(packed, str) else packed.canvas
    hardware = Hardware(ranks, strategy(launcher, ranks), memory and memory * (gpu_share or 1), canvas)
    sections["experiment"] = [
        *network_findings(experiment, signature, hardware),
        disk_finding(experiment, signature, packed, test),
    ]
    sections["data"] = data_findings(experiment, packed, gpus, at_once)
    sections["recommended"] = suggest(gpus, signature)
    return sections


def _signature(experiment: Experiment, packed: ShardIndex | str) -> Signature:
    """Return that of the packed set, else of the task that it will be packed for, by default MILK10k's.

    Before packing, concepts that the task names by a prefix only are left out; what they add to the estimates is small.
    """
    if not isinstance(packed, str):
        return packed.signature
    task, data = milk10k_task(), experiment.data
    if data.source or data.task:
        with suppress(InputError):  # reported by `data_findings`
            task = find_task(data.source or "", data.task)
    return task.signature(task.concepts.names)
