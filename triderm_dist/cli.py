"""The one command line of every program: `python -m ROOM.PROGRAM [--config FILE.yaml] [key.subkey=value ...]`.

Exit status 0: done. 2: bad input, told in one line. 3: interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from triderm_dist.config import Section, Tree, describe, load
from triderm_dist.schema import InputError, one_line

BAD_INPUT = 2
INTERRUPTED = 3
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers ask a program to stop with. They stop it as Ctrl-C does, at once; training defers them to a step."""


class Interrupted(Exception):
    """Work was asked to stop, has saved its state, and can be resumed. Its text says how."""


class Stopped(KeyboardInterrupt):
    """A signal asked to stop. After a plain KeyboardInterrupt that passed through code run from text, as dataclasses
    are, Python ends by SIGINT whatever exit status it is given.
    """


def raise_stopped(number: int, frame: FrameType | None) -> None:
    """A handler of signals."""
    raise Stopped


def run(kind: type[Tree], main: Callable[[Tree], None], about: str | None, argv: Sequence[str] | None = None) -> None:
    """Read the settings of `kind` from the command line, call `main`, and leave with the right exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(_help(kind, about or ""))
        sys.exit(0)
    guarded(lambda: main(_settings(kind, arguments)))


def guarded(work: Callable[[], None]) -> None:
    """Call `work`; leave with the exit status and one line on the error stream where it fails or is interrupted."""
    try:
        with handle_signals(raise_stopped):
            work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except OSError as error:  # a full disk, a folder that is a file, no rights, no network
        text = error.strerror or one_line(error)
        print(f"error: {error.filename}: {text}" if error.filename else f"error: {text}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"interrupted: {str(stop) or 'run the same command again to go on'}", file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextmanager
def handle_signals(handler: Callable[..., object], numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Signals go to `handler` inside the block. Only the main thread may take signals: others are left as they are."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers} if here else {}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _settings(kind: type[Tree], arguments: list[str]) -> Tree:
    file: str | None = None
    overrides: list[str] = []
    while arguments:
        argument = arguments.pop(0)
        if argument == "--config":
            if not arguments:
                raise InputError("--config needs a YAML file after it")
            file = arguments.pop(0)
        elif argument.startswith("--config="):
            file = argument.removeprefix("--config=")
        elif argument.startswith("-"):
            raise InputError(f"unknown option {argument}; there are --config FILE, --help and key.subkey=value")
        else:
            overrides.append(argument)
    return load(kind, file, overrides)


def _help(kind: type[Section], about: str) -> str:
    heading = "settings, as key.subkey=value or in the YAML file of --config (`base: FILE` names one to build on):"
    lines = [about.strip(), "", heading, ""]
    for key, type_name, default, description in describe(kind):
        lines += [f"  {key}  ({type_name}, default {default})", f"      {description}"]
    return "\n".join(lines)
