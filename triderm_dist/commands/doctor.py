"""Look over this machine and an experiment: versions, devices, precision, batch, weights, data, and what is missing.

triderm doctor --config EXPERIMENT.yaml data.source=FOLDER
triderm doctor --config EXPERIMENT.yaml launcher=accelerate_configs/ddp_multi_node.yaml
triderm ranks --config_file accelerate_configs/ddp.yaml -m triderm_dist.commands.doctor --config EXPERIMENT.yaml

Started on all ranks, as a run is, it also compares what they see and lets them sum numbers; rank 0 prints.
Exit status 0 if a run can start, 2 if not; the last line says what is missing. Downloads and writes nothing.
"""

import sys

from pydantic import Field

from triderm_dist.cli import BAD_INPUT, run
from triderm_dist.commands import programs_using
from triderm_dist.config import Experiment
from triderm_dist.schema import InputError
from triderm_dist.settings import PathText


class DoctorRun(Experiment):
    uses = None

    launcher: PathText | None = Field(None, description="accelerate config file that the run will be started with")
    ranks: int | None = Field(
        None, ge=1, description="processes to plan for; null takes the launcher's, or the GPUs here, or one"
    )
    gpu_memory: float | None = Field(None, gt=0, description="GiB of the GPU to plan for; null takes the smallest here")
    answer_seconds: float = Field(
        30.0, gt=0, description="started on several ranks: seconds within which each has to answer, and sums be made"
    )


def main(config: DoctorRun) -> None:
    from triderm_dist.doctor import examine
    from triderm_dist.doctor.findings import missing, print_findings
    from triderm_dist.doctor.launcher import read_launcher
    from triderm_dist.doctor.ranks import meet, started_on_ranks

    launcher = read_launcher(config.launcher) if config.launcher else None
    meeting, between = None, {}
    if started_on_ranks():
        meeting, between["ranks"] = meet(config, config.answer_seconds)  # of which only rank 0 comes back
    ranks = config.ranks or (meeting.world if meeting else None)
    findings = {**between, **examine(config, ranks, config.gpu_memory, launcher)}
    print_findings(findings)
    lacking = "; ".join(f"{each.name} ({each.text})" for each in missing(findings))
    if not lacking:
        print("a run can start")
    sys.stdout.flush()  # what is missing comes last, on the error stream
    if meeting:
        if lacking:
            print(f"error: missing: {lacking}", file=sys.stderr)
        meeting.end(BAD_INPUT if lacking else 0)
    if lacking:
        raise InputError(f"missing: {lacking}")


def start() -> None:
    run(DoctorRun, main, __doc__, users=programs_using)


if __name__ == "__main__":
    start()
