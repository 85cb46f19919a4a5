"""Looks over a machine and an experiment for what would stop a run, and says what to do about it.

Nothing is downloaded, started or written. A check that needs a package says that it is missing instead of failing.

    software, machine      of this host                     launcher   processes and port of an accelerate file
    networks               precision, batch, memory, weights
    data                   packed sets and the speed of reading them
    ranks                  what the ranks that the doctor is started on see, and whether they reach one another
    advice                 what suits the machine
"""

from __future__ import annotations

import os
from pathlib import Path

from triderm_dist.config import Experiment
from triderm_dist.data.threads import available_cores
from triderm_dist.doctor.advice import suggest
from triderm_dist.doctor.data import data_findings
from triderm_dist.doctor.findings import GIB, Finding
from triderm_dist.doctor.launcher import Launcher, launcher_findings
from triderm_dist.doctor.machine import find_gpus, machine_findings
from triderm_dist.doctor.networks import network_findings
from triderm_dist.doctor.software import nccl, versions


def this_host(experiment: Experiment, launcher: Launcher | None = None) -> dict[str, list[Finding]]:
    """The findings that each host of a run has to be asked for, by section."""
    gpus = find_gpus()
    deepspeed = launcher.deepspeed if launcher else os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    written = [Path(__file__), Path(experiment.train_shards, "index.json"), experiment.folder]
    return {
        "software": [*versions(deepspeed), nccl(bool(gpus))],
        "machine": machine_findings(gpus, experiment.folder, written),
    }


def examine(
    experiment: Experiment,
    ranks: int | None = None,
    gpu_memory: float | None = None,
    launcher: Launcher | None = None,
) -> dict[str, list[Finding]]:
    """Return all findings, by section.

    ranks: the processes to plan for; None takes the launcher's, else the number of GPUs, or one. gpu_memory: GiB of the
    GPU to plan for; None takes the smallest of this host. launcher: of the file that the run will be started with.
    """
    gpus = find_gpus()
    ranks = ranks or (launcher.ranks if launcher else max(1, len(gpus)))
    sections = this_host(experiment, launcher)
    if "WORLD_SIZE" not in os.environ and (found := launcher_findings(launcher, len(gpus), available_cores())):
        sections["launcher"] = found  # the ranks' own launcher holds its port
    sections["experiment"] = network_findings(
        experiment, ranks, gpu_memory or min((gpu.memory / GIB for gpu in gpus), default=None)
    )
    sections["data"] = data_findings(experiment, gpus, ranks)
    sections["suits this machine"] = suggest(gpus)
    return sections
