"""Start ranks as `accelerate launch` does, return their exit code, and forward signals to them.

triderm ranks --config_file ddp -m train --config EXPERIMENT.yaml fold=0

Takes the options of `accelerate launch`, with the names of shipped files and of programs, then the settings of the
program, key.subkey=value. `accelerate launch` itself exits with 1 whatever its ranks return, and SIGUSR1 kills it
while they save. A scheduler needs the exit code: 0 success, 2 invalid input (give up), 3 interrupted (rerun the same
command), also where a rank was killed by SIGKILL. One that died from another signal N gives 128 + N, as in a shell.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

from triderm_dist.commands import names
from triderm_dist.runtime.process import prepare_process, tolerate_closed_output
from triderm_dist.runtime.signals import BAD_INPUT, INTERRUPTED, LAUNCHER

FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")


def forward(number: int, frame: FrameType | None) -> None:
    """Forward a signal to the child processes, until torch's agent sets its own handlers."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    if not children:
        sys.exit(INTERRUPTED)


def end_ranks() -> None:
    """Kill the child processes that are left: a second signal ended torch's agent while it waited for them to save."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()


def handled(environment: Mapping[str, str], ignored: Callable[[str], bool]) -> list[str]:
    """Return the names of the signals to forward, and for torch's agent to handle: those of PET_SIGNALS_TO_HANDLE, by
    default `FORWARDED`, without ignored ones; nohup ignores SIGHUP, and who closes the terminal then stops nothing.
    """
    wanted = environment.get("PET_SIGNALS_TO_HANDLE") or ",".join(FORWARDED)
    return [name for name in (word.strip() for word in wanted.split(",")) if name and not ignored(name)]


def is_ignored(name: str) -> bool:
    """Return whether a signal is ignored, as it was when this process started."""
    number = getattr(signal, name, None)
    return number is not None and signal.getsignal(number) == signal.SIG_IGN


def expand_names(words: list[str]) -> list[str]:
    """Replace the name of a shipped file after --config_file and of a program after -m, as in `-m train`."""
    words = list(words)
    if "--config_file" in words[:-1]:
        from triderm_dist.config import find_file

        at = words.index("--config_file") + 1
        words[at] = str(find_file("accelerate_configs", words[at]))
    if "-m" in words[:-1] and (at := words.index("-m") + 1) and words[at] in names():
        words[at] = f"triderm_dist.commands.{words[at]}"
    return words


def status_of(exit_code: int) -> int:
    """Return the exit code for that of a rank, which is -N for one that died from signal N: 3 for SIGKILL, with a line
    on stderr, since the kernel sends it where memory runs out, or a scheduler; else 128 + N.
    """
    if exit_code == -signal.SIGKILL:
        why = "a rank was killed (SIGKILL), as when memory runs out or by a scheduler"
        print(f"interrupted: {why}; rerun the same command to resume", file=sys.stderr)
        return INTERRUPTED
    return exit_code if exit_code >= 0 else 128 - exit_code


def restart_only_what_may_succeed() -> None:
    """Prevent restarts by torch's agent (--max_restarts) after invalid input, which would fail again."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    def monitor(agent: Any, group: Any) -> Any:
        result = watched(agent, group)
        if any(failure.exitcode == BAD_INPUT for failure in result.failures.values()):
            agent._remaining_restarts = 0
        return result

    watched = LocalElasticAgent._monitor_workers
    LocalElasticAgent._monitor_workers = monitor  # type: ignore[method-assign]


def start() -> None:
    prepare_process()
    if {"--help", "-h"} & set(sys.argv[1:2]):
        with tolerate_closed_output():
            print(__doc__)
        return
    for name in FORWARDED:
        if not is_ignored(name):
            signal.signal(getattr(signal, name), forward)
    sys.argv[1:] = expand_names(sys.argv[1:])
    os.environ["PET_SIGNALS_TO_HANDLE"] = ",".join(handled(os.environ, is_ignored))
    os.environ[LAUNCHER] = str(os.getpid())
    # Otherwise a launcher that replaces a lost one waits forever for rank 0's address, which is published only once.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from triderm_dist.doctor.launcher import read_launcher
    from triderm_dist.runtime.extras import DEEPSPEED, require
    from triderm_dist.runtime.redact import redacted_output
    from triderm_dist.schema import InputError

    restart_only_what_may_succeed()
    options = launch_command_parser().parse_args()
    try:
        uses_zero = options.config_file and read_launcher(options.config_file).strategy == "deepspeed"
        if options.use_deepspeed or uses_zero:
            require("DeepSpeed ZeRO", *DEEPSPEED)
        with redacted_output():
            launch_command(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except SignalException:
        end_ranks()
        sys.exit(INTERRUPTED)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        sys.exit(status_of(first.exitcode))
    except subprocess.CalledProcessError as error:
        sys.exit(status_of(error.returncode))


if __name__ == "__main__":
    start()
