"""Look over this machine and an experiment: versions, devices, precision, batch, weights, data, and what is missing.

python -m launch.doctor --config EXPERIMENT.yaml data.source=FOLDER
python -m launch.doctor --config EXPERIMENT.yaml launcher=accelerate_configs/ddp_multi_node.yaml

Exit status 0 if a run can start, 2 if not; the last line says what is missing. Downloads and writes nothing.
"""

import sys
from pathlib import Path

from pydantic import Field

from triderm_dist.cli import run
from triderm_dist.config import Experiment
from triderm_dist.schema import InputError


class DoctorRun(Experiment):
    launcher: str | None = Field(None, description="accelerate config file that the run will be started with")
    ranks: int | None = Field(
        None, ge=1, description="processes to plan for; null takes the launcher's, or the GPUs here, or one"
    )
    gpu_memory: float | None = Field(None, gt=0, description="GiB of the GPU to plan for; null takes the smallest here")


def main(config: DoctorRun) -> None:
    from triderm_dist.doctor import examine
    from triderm_dist.doctor.findings import missing, print_findings
    from triderm_dist.doctor.launcher import read_launcher

    launcher = read_launcher(config.launcher) if config.launcher else None
    findings = examine(config, Path(__file__).parents[1], config.ranks, config.gpu_memory, launcher)
    print_findings(findings)
    sys.stdout.flush()  # what is missing comes last, on the error stream
    if lacking := missing(findings):
        raise InputError("missing: " + "; ".join(f"{each.name} ({each.text})" for each in lacking))
    print("a run can start")


if __name__ == "__main__":
    run(DoctorRun, main, __doc__)
