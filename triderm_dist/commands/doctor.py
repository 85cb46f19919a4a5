"""Check this machine and an experiment before a run: versions, devices, precision, batch, weights, data.

triderm doctor --config EXPERIMENT.yaml data.source=FOLDER
triderm doctor --config EXPERIMENT.yaml launcher=ddp_multi_node
triderm ranks --config_file ddp -m doctor --config EXPERIMENT.yaml

Started on all ranks, as a run is, it also compares the ranks and times an all-reduce between them; rank 0 prints.
Exit code 0 if a run can start, 2 if not; the last line names the problems. Downloads and writes nothing.
"""

import sys

from pydantic import Field

from triderm_dist.cli import print_error, run
from triderm_dist.commands import programs_using
from triderm_dist.config import MAX_SECONDS, Experiment
from triderm_dist.runtime.signals import BAD_INPUT
from triderm_dist.schema import InputError
from triderm_dist.settings import PathText


class DoctorRun(Experiment):
    uses = None
    launcher: PathText | None = Field(None, description="accelerate config file that the run will be started with")
    ranks: int | None = Field(
        None,
        ge=1,
        description="processes of a training to plan for; null takes the launcher's, or 1",
    )
    gpus: float | None = Field(
        None,
        gt=0,
        le=1,
        description="plan for folds in parallel on all GPUs (parallel_folds=true), each on this share of a GPU",
    )
    gpu_memory: float | None = Field(
        None, gt=0, description="GiB of the GPU to plan for; null takes the smallest of this host"
    )
    answer_seconds: float = Field(
        30.0,
        gt=0,
        le=MAX_SECONDS,
        description="on several ranks: seconds within which each must answer and the all-reduce must end",
    )

    @property
    def writes(self) -> bool:
        return False


def main(config: DoctorRun) -> None:
    from triderm_dist.doctor import examine
    from triderm_dist.doctor.findings import errors, print_findings
    from triderm_dist.doctor.launcher import read_launcher
    from triderm_dist.doctor.ranks import check_ranks, started_on_ranks

    launcher = read_launcher(config.launcher) if config.launcher else None
    rendezvous, compared = None, {}
    if started_on_ranks():
        rendezvous, compared["ranks"] = check_ranks(config, config.answer_seconds)  # returns on rank 0 only
    ranks = config.ranks or (rendezvous.world if rendezvous else None)
    findings = {**compared, **examine(config, ranks, config.gpu_memory, launcher, config.gpus)}
    print_findings(findings)
    problems = "; ".join(f"{each.name} ({each.text})" for each in errors(findings))
    if not problems:
        print("a run can start")
    sys.stdout.flush()  # so that the error is the last line
    if rendezvous:
        if problems:
            print_error(f"error: a run cannot start: {problems}")
        rendezvous.exit_all(BAD_INPUT if problems else 0)
    if problems:
        raise InputError(f"a run cannot start: {problems}")


def start() -> None:
    run(DoctorRun, main, __doc__, users=programs_using)


if __name__ == "__main__":
    start()
