"""Check the environment variables of a rank together, before anything reads one of them.

Half a set (a shell inside of mpirun, a pod with RANK alone, a variable that was exported once) otherwise ends in a
traceback of a library, or in a process that waits for ranks which never come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from triderm_dist.schema import ConfigError

OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What PyTorch and Accelerate need, and their launchers set."""
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
FAMILIES = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "MPICH": ("PMI_SIZE", "PMI_RANK"),
    "MVAPICH": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "PMIx": ("PMIX_SIZE", "PMIX_RANK"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
}
"""(number of processes, number of this one) of other launchers, which start processes but set none of `OWN`."""
ADVICE = "unset {names} for one process, or start the ranks by triderm ranks"


def check_rank_variables(environment: Mapping[str, str], itself: bool = True) -> None:
    """Raise ConfigError where the variables of a launcher are incomplete, contradict one another, or ask for what this
    toolkit does not do; the message names those found and missing.

    itself: this process trains or predicts, and does not only start processes that do.
    """
    found = {name: environment[name] for name in OWN if environment.get(name)}
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & {name for name in OWN if name in environment}:
        _check_own(environment, found)
    elif itself:
        _check_families(environment)
    _check_accelerate(environment, bool(found.get("WORLD_SIZE")))


def _check_own(environment: Mapping[str, str], found: Mapping[str, str]) -> None:
    shown = _shown(environment, [name for name in OWN if name in environment])
    names = " ".join(name for name in OWN if name in environment)
    if missing := [name for name in OWN if name not in found]:
        raise ConfigError(f"{shown}: {', '.join(missing)} missing for ranks; {ADVICE.format(names=names)}")
    for name in NUMBERS:
        value = environment.get(name)
        if value is not None and not (value.isascii() and value.isdigit()):
            raise ConfigError(f"{name}={value}: not a number; {ADVICE.format(names=names)}")
    rank, ranks, local = (int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    per_host = int(environment.get("LOCAL_WORLD_SIZE", ranks))
    if not (rank < ranks and local <= rank and local < per_host <= ranks and 0 < int(found["MASTER_PORT"]) < 65_536):
        raise ConfigError(f"{shown}: these contradict one another; {ADVICE.format(names=names)}")


def _check_families(environment: Mapping[str, str]) -> None:
    """Refuse processes of unsupported launchers: each would run as a single process, on the same files."""
    for launcher, (size_name, rank_name) in FAMILIES.items():
        size, rank = (_number(environment, name) for name in (size_name, rank_name))
        present = [name for name in (size_name, rank_name) if name in environment]
        has_size = size_name in environment
        if size > 1 or rank > 0 or (rank_name in environment and not has_size and launcher not in ("PMIx", "srun")):
            raise ConfigError(
                f"{_shown(environment, present)}, of {launcher}, without RANK and WORLD_SIZE: this process would work "
                f"as if it were the only one; {ADVICE.format(names=' '.join(present))}"
            )
    tasks = next((name for name in ("SLURM_NTASKS", "SLURM_NPROCS") if _number(environment, name) > 1), None)
    if tasks and "SLURM_STEP_NUM_TASKS" not in environment:
        raise ConfigError(
            f"{tasks}={environment[tasks]}, but srun has not started this process, which is the only one; start the "
            f"ranks by srun and triderm ranks (launch/slurm), or ask for cores by --cpus-per-task and unset {tasks}"
        )


def _check_accelerate(environment: Mapping[str, str], has_ranks: bool) -> None:
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        raise ConfigError(
            f"ACCELERATE_DYNAMO_BACKEND={backend}: Accelerate would compile the whole network; unset it, or set "
            "dynamo_backend to no in the launcher's file, and use train.compile=true"
        )
    for name, key in (("MEGATRON_LM", "Megatron-LM"), ("PARALLELISM_CONFIG", "a parallelism_config")):
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise ConfigError(
                f"ACCELERATE_USE_{name}={environment[f'ACCELERATE_USE_{name}']}: {key} is not supported; unset it, or "
                "use a file of accelerate_configs/"
            )
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true" and not has_ranks:
        raise ConfigError(
            f"ACCELERATE_USE_DEEPSPEED={environment['ACCELERATE_USE_DEEPSPEED']} without {', '.join(OWN)}: unset it "
            "for one process, or start the ranks by triderm ranks"
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    """Return the number in a variable, -1 if there is none."""
    value = environment.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else -1


def _shown(environment: Mapping[str, str], names: Sequence[str]) -> str:
    return " ".join(f"{name}={environment[name]}" for name in names)
