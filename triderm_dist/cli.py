"""The command line that all programs share: `triderm PROGRAM [--config FILE.yaml] [key.subkey=value ...]`.

Exit codes: 0 success, 2 invalid input (one line tells how to fix it), 3 interrupted; rerun the same command to resume.
"""

from __future__ import annotations

import atexit
import json
import os
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import get_origin

from triderm_dist import __version__
from triderm_dist.config import Experiment, RunReader, as_yaml, has_effect, load
from triderm_dist.environment import lacks_log, record_program
from triderm_dist.files import check_no_file, is_writable, remove_dead_parts
from triderm_dist.runtime import extras
from triderm_dist.runtime.messages import one_line, printable
from triderm_dist.runtime.plugins import explain_plugin_error
from triderm_dist.runtime.process import prepare_process, tolerate_closed_output
from triderm_dist.runtime.rank_variables import check_rank_variables
from triderm_dist.runtime.redact import redacted_output, register_secrets
from triderm_dist.runtime.run_log import LOG_FOLDER, RunLog
from triderm_dist.runtime.signals import (
    BAD_INPUT,
    INTERRUPTED,
    SIGNALS,
    cleaning_up,
    end_with_launcher,
    exit_on_second_request,
    handle_signals,
    raise_stopped,
)
from triderm_dist.runtime.usage import report_usage
from triderm_dist.schema import Busy, ConfigError, InputError
from triderm_dist.settings import Section, Tree, describe, flatten, read_override


class Interrupted(Exception):
    """Work stopped on request after saving its state, and can be resumed as the text describes."""


Users = Callable[[str], Sequence[str]]
"""The names of the programs that use a setting of the experiment."""


def run(
    kind: type[Tree],
    main: Callable[[Tree], None],
    about: str | None,
    argv: Sequence[str] | None = None,
    *,
    users: Users = lambda key: (),
    locate: Callable[[str], object] = str,
    first: str | None = None,
    on_ranks: Callable[[Tree], bool] | None = None,
) -> None:
    """Read the settings of `kind` from the command line, call `main`, and exit.

    about: text of --help. users: names other programs in the error for a setting that has no effect on this one.
    locate: returns the folder of the run that `run=` names.
    first: the setting that the first words without `=` are the value of; one word if it is no list.
    on_ranks: for a program that trains or predicts: returns whether this process does so, on its own or as a rank, and
    not processes that it starts.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if first:
        arguments = with_first(kind, arguments, first)
    if {"--help", "-h", "--help-all"} & set(arguments):
        run_with_exit_codes(lambda: print(help_text(kind, about or "", everything="--help-all" in arguments)))
        sys.exit(0)
    print_config = "--print-config" in arguments
    arguments = [argument for argument in arguments if argument != "--print-config"]

    run_log: RunLog | None = None

    def work() -> None:
        nonlocal run_log
        config = read_settings(kind, arguments, users, locate)
        if print_config:
            print(as_yaml(config), end="")
        else:
            check_writable(config)
            if on_ranks:
                check_rank_variables(os.environ, itself=on_ranks(config))
            folder = config.log_folder if isinstance(config, Experiment) else os.environ.get(LOG_FOLDER)
            if folder and os.environ.get("RANK", "0") == "0":
                words = shlex.join(["triderm", program_of(main), *arguments])
                deferred = lacks_log(Path(folder))  # an export stays as it is where a program refuses to work in it
                run_log = log.enter_context(RunLog(Path(folder), f"{words} ({__version__})", deferred))
            if isinstance(config, Experiment) and config.is_stage:
                remove_dead_parts(config.folder, config.folder / "report", config.folder / "towers")
                with record_program(config.folder, program_of(main), exit_code):
                    main(config)
            else:
                main(config)

    with _process(), ExitStack() as log:  # open until the line of an error is printed
        status = _status_of(work)
        if run_log and status == BAD_INPUT:
            run_log.discard()
        report_usage()
    _exit(status)


def with_first(kind: type[Section], arguments: list[str], first: str) -> list[str]:
    """Replace the first words without `=` by the setting `first` with them as its value."""
    words = list(takewhile(lambda word: "=" not in word and not word.startswith("-"), arguments))
    if not words:
        return arguments
    if get_origin(kind.model_fields[first].annotation) is not tuple:
        return [f"{first}={words[0]}", *arguments[1:]]
    return [f"{first}={json.dumps(words)}", *arguments[len(words) :]]


@contextmanager
def _process() -> Iterator[None]:
    """Run a program in the block: its process is set up, its output may be closed by the reader, and has no
    secrets.
    """
    prepare_process()
    end_with_launcher()
    with tolerate_closed_output(), redacted_output():
        yield


def program_of(main: Callable[[Tree], None]) -> str:
    """Return the name of a program, also where Python runs its module by -m."""
    spec = sys.modules["__main__"].__spec__ if main.__module__ == "__main__" else None
    return (spec.name if spec else main.__module__).rpartition(".")[2]


def exit_code(error: BaseException) -> int:
    """Return the exit code of a program that an exception ends."""
    if isinstance(error, Interrupted | KeyboardInterrupt | Busy):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return BAD_INPUT if isinstance(error, InputError | OSError) else 1


def check_writable(config: Section) -> None:
    """Raise InputError where a program writes into a folder that this user may not write."""
    if isinstance(config, Experiment) and not isinstance(config, RunReader):
        check_no_file("output", config.folder)
    if not isinstance(config, Experiment) or not config.writes or is_writable(folder := Path(config.output)):
        return
    if isinstance(config, RunReader):
        advice = f"write the results elsewhere (run={config.folder} output=FOLDER), or copy the run"
    else:
        advice = "copy the run and name the copy, or choose another output"
    raise InputError(f"{folder}: this program writes into it, and it is read-only for this user; {advice}")


def run_words(main: Callable[[list[str]], None], about: str | None) -> None:
    """Call `main` with the words of the command line, for programs that take no settings, and exit.

    about: text of --help.
    """
    words = sys.argv[1:]
    run_with_exit_codes(lambda: print(about) if {"--help", "-h"} & set(words) else main(words))


def run_with_exit_codes(work: Callable[[], None]) -> None:
    """Call `work`; where it fails or is interrupted, print one line on stderr and exit with the code for it."""
    with _process():
        status = _status_of(work)
    _exit(status)


def _status_of(work: Callable[[], None]) -> int:
    """Call `work` and return its exit code; where it fails or is interrupted, print one line on stderr."""
    try:
        with exit_on_second_request(), handle_signals(raise_stopped, (*SIGNALS, signal.SIGINT)):
            work()
        sys.stdout.flush()
        return 0
    except InputError as error:
        print_error(f"error: {error}")
        return BAD_INPUT
    except OSError as error:  # a full disk, a folder that is a file, missing permissions, no network
        text = error.strerror or one_line(error)
        print_error(printable(f"error: {error.filename}: {text}" if error.filename else f"error: {text}"))
        return BAD_INPUT
    except Busy as error:
        print_error(f"error: {error}")
        return INTERRUPTED
    except (Interrupted, KeyboardInterrupt) as stop:
        cleaning_up()
        print_error(f"interrupted: {str(stop) or 'rerun the same command to resume'}")
        return INTERRUPTED
    except Exception as error:
        line = extras.explain(error) if isinstance(error, ModuleNotFoundError) else None
        if (line := line or explain_plugin_error(error)) is None:
            raise
        print_error(f"error: {line}")
        return BAD_INPUT


def _exit(status: int) -> None:
    """Exit with a status. With status 0 only ranks of a process group exit; other programs return.

    A rank waits for its threads and runs the exit handlers, but Python is not finalized: where a thread of gloo still
    releases the tensors of a finished collective it would abort (https://github.com/pytorch/pytorch/pull/179291).
    A program that was stopped does not wait for its threads either: one may read from a slow disk for minutes.
    """
    distributed = sys.modules.get("torch.distributed")
    is_rank = distributed is not None and distributed.is_available() and distributed.is_initialized()
    others = [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
    if is_rank or (status == INTERRUPTED and others):
        if status != INTERRUPTED:
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def print_error(line: str) -> None:
    """Print a line on stderr by one write: the ranks of a machine share it, and `print` writes the newline apart."""
    sys.stderr.write(f"{line}\n")


def read_settings(
    kind: type[Tree],
    arguments: Sequence[str],
    users: Users = lambda key: (),
    locate: Callable[[str], object] = str,
) -> Tree:
    """Read the settings of `kind` from the words of a command line. Raises InputError for an unknown option, and
    ConfigError as `load` does and for a setting that has no effect; those in the file are shared by all programs.

    users, locate: see `run`.
    """
    file: str | None = None
    overrides: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--config" or word.startswith("--config="):
            if file is not None:
                raise InputError("--config is given twice; write `base: FILE` in one file to build on another")
            if word == "--config" and not words:
                raise InputError("--config needs a YAML file after it")
            file = words.pop(0) if word == "--config" else word.removeprefix("--config=")
        elif word.startswith("-"):
            raise InputError(f"unknown option {word}; {OPTIONS}, and settings are written key.subkey=value")
        elif word.startswith("run="):
            overrides.append(f"run={locate(word.removeprefix('run='))}")
        else:
            overrides.append(word)
    config = load(kind, file, overrides)
    register_secrets(config.model_dump(), pass_on=True)
    without_effect = config.without_effect if isinstance(config, Experiment) else {}
    for key in (key for override in overrides for key in flatten(read_override(override))):
        for name, why in without_effect.items():
            if f"{key}.".startswith(f"{name}."):
                raise ConfigError(f"{key}: {why}")
        if key == "run" and issubclass(kind, Experiment):
            continue
        if not has_effect(kind, key):
            programs = users(key)
            hint = f"; programs that use it: {', '.join(programs)}" if programs else ""
            raise ConfigError(f"{key}: this program does not use the setting{hint}")
    return config


FORM = """Settings are written key.subkey=value, or in the YAML file of --config (`base: FILE` names one to build on).
A list is a,b or [a, b]. --print-config prints the resolved settings as YAML and ends."""
OF_RUN = "run=FOLDER works on the run in that folder, with its settings."
EXIT_CODES = "Exit codes: 0 success, 2 invalid input (one line tells how to fix it), 3 interrupted; rerun to resume."
OPTIONS = "options are --config FILE, --print-config, --help and --help-all"


def help_text(kind: type[Section], about: str, everything: bool = False) -> str:
    """Return the help of a program: its own settings first, then those of the experiment that it uses, by section.

    everything: also list the settings that have no effect on it, and those of `models.NAME.train` one by one.
    """
    rows = list(describe(kind))
    shared = set(Experiment.model_fields) if issubclass(kind, Experiment) else set()
    own = [row for row in rows if row[0].split(".")[0] not in shared]
    used = [row for row in rows if row not in own and (everything or has_effect(kind, row[0]))]
    lines = [about.strip(), "", FORM]
    if issubclass(kind, Experiment):
        lines.append(OF_RUN)
    if own and used:
        lines += ["", "Settings of this program:"]
    lines += _help_rows(own)
    if used:
        lines += ["", f"Settings of the experiment{'' if everything else ' that it uses (--help-all lists all)'}:"]
        lines += _help_rows([row for row in used if everything or not row[0].startswith("models.NAME.train.")])
        if not everything and any(row[0].startswith("models.NAME.train.") for row in used):
            lines += ["", "  models.NAME.train.KEY", "      as train.KEY, for one model"]
    lines += ["", EXIT_CODES]
    return "\n".join(lines)


def _help_rows(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Format each setting: key, type and default, then its description; with an empty line between sections."""
    lines: list[str] = []
    section = None
    for key, type_name, default, description in rows:
        if section != (section := key.rpartition(".")[0]):
            lines.append("")
        default = default if default == "required" else f"default {default}"
        lines.append(f"  {key}  ({type_name}, {default})")
        lines += textwrap.wrap(description, 112, initial_indent="      ", subsequent_indent="      ")
    return lines
