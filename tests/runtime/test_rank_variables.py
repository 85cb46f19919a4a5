"""The variables of launchers are checked together, before anything reads one of them."""

import pytest

from triderm_dist.runtime.rank_variables import check_rank_variables
from triderm_dist.schema import ConfigError

FULL = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        FULL,
        {**FULL, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {**FULL, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {**FULL, "SLURM_NTASKS": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DYNAMO_BACKEND": "NO"},
        {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"},  # exported by a job script, read by nobody
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_complete_or_no_variables_are_accepted(environment):
    check_rank_variables(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "1"},
            "WORLD_SIZE=1: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing for ranks; unset",
        ),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: RANK, LOCAL_RANK"),
        ({"RANK": "1"}, "RANK=1: WORLD_SIZE, LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0: RANK, WORLD_SIZE"),
        ({key: FULL[key] for key in FULL if key != "LOCAL_RANK"}, "MASTER_PORT=29500: LOCAL_RANK missing"),
        ({**FULL, "MASTER_ADDR": ""}, "MASTER_ADDR= MASTER_PORT=29500: MASTER_ADDR missing"),
        ({**FULL, "RANK": "2"}, "RANK=2 WORLD_SIZE=2 .* contradict one another"),
        ({**FULL, "RANK": "-1"}, "RANK=-1: not a number"),
        ({**FULL, "WORLD_SIZE": "two"}, "WORLD_SIZE=two: not a number"),
        ({**FULL, "LOCAL_WORLD_SIZE": "1"}, "contradict one another"),
        ({**FULL, "MASTER_PORT": "0"}, "contradict one another"),
        ({**FULL, "MASTER_PORT": "99999"}, "contradict one another"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
            "COMM_WORLD_SIZE=2 .*of Open MPI, without RANK",
        ),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK=0"),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, "PMI_SIZE=4 PMI_RANK=3, of MPICH"),
        ({"PMI_RANK": "0"}, "PMI_RANK=0"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE=2"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_PROCID=1, of srun"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS=2"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "SLURM_NTASKS=4, but srun has not started this process"),
        ({"SLURM_NPROCS": "4"}, "SLURM_NPROCS=4"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR: .*train.compile=true"),
        ({**FULL, "ACCELERATE_DYNAMO_BACKEND": "eager"}, "ACCELERATE_DYNAMO_BACKEND=eager"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true without RANK"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
    ],
)
def test_half_an_environment_is_refused_in_one_line(environment, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        check_rank_variables(environment)
    assert "\n" not in str(refusal.value)


def test_program_that_only_starts_processes_runs_under_any_launcher():
    check_rank_variables({"SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "2"}, itself=False)
    with pytest.raises(ConfigError, match="RANK=1"):
        check_rank_variables({"RANK": "1"}, itself=False)
