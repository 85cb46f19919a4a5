"""`accelerate launch` that ends as its ranks do, and hands their signals on.

triderm ranks --config_file accelerate_configs/ddp.yaml -m triderm_dist.commands.train --config EXPERIMENT.yaml fold=0

Takes the options of `accelerate launch`, then the program and its settings, key.subkey=value. That one ends with 1
whatever its ranks said, and SIGUSR1 kills it while they save. A scheduler must know more: 0 done, 2 bad input (give
up), 3 interrupted (start the same command again). A rank that died of signal N gives 128 + N, as in a shell.
"""

import os
import signal
import subprocess
import sys
from types import FrameType

from triderm_dist.commands import names

BAD_INPUT, INTERRUPTED = 2, 3
"""As in triderm_dist.cli, whose import takes longer than a signal may."""
HANDED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")


def hand_on(number: int, frame: FrameType | None) -> None:
    """Until torch's agent has its own handlers, and where one process needs no agent."""
    import psutil

    children = psutil.Process().children()
    for child in children:
        child.send_signal(number)
    if not children:
        sys.exit(INTERRUPTED)


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
    return exit_code if exit_code >= 0 else 128 - exit_code


def start() -> None:
    if {"--help", "-h"} & set(sys.argv[1:2]):
        print(__doc__)
        return
    for name in HANDED_ON:
        signal.signal(getattr(signal, name), hand_on)
    sys.argv[1:] = expand_names(sys.argv[1:])
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(HANDED_ON))
    # Else a launcher that replaces a lost one waits in vain for the address of rank 0, told in the first round only.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from triderm_dist.doctor.launcher import read_launcher
    from triderm_dist.schema import ConfigError

    options = launch_command_parser().parse_args()
    try:
        if options.config_file:
            read_launcher(options.config_file)
        launch_command(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except SignalException:
        sys.exit(INTERRUPTED)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        sys.exit(status_of(first.exitcode))
    except subprocess.CalledProcessError as error:
        sys.exit(status_of(error.returncode))


if __name__ == "__main__":
    start()
