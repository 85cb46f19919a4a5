"""`triderm NAME ...`: run one of the programs in triderm_dist.commands."""

from __future__ import annotations

import importlib
import sys

from triderm_dist import __version__
from triderm_dist.commands import PROGRAMS, names
from triderm_dist.runtime import extras
from triderm_dist.runtime.messages import did_you_mean
from triderm_dist.runtime.process import open_missing_streams, tolerate_closed_output


def usage() -> str:
    """Return the text of `triderm --help`."""
    lines = ["usage: triderm NAME [--config FILE] [key.subkey=value ...]", "       triderm NAME --help"]
    for group, programs in PROGRAMS.items():
        lines += ["", f"{group}:", *(f"  {name:<10} {about}" for name, about in programs.items())]
    return "\n".join(lines)


def main() -> None:
    """Run the program that the first argument names. Exits with 2 for an unknown one."""
    open_missing_streams()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help", "--version", "version"):
        with tolerate_closed_output():
            print(f"triderm-dist {__version__}" if "version" in name else usage())
    elif name in names():
        sys.argv[:2] = [f"triderm {name}"]
        try:
            program = importlib.import_module(f"triderm_dist.commands.{name}")
        except ModuleNotFoundError as error:
            if (line := extras.explain(error)) is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)
        program.start()
    else:
        hint = did_you_mean(name, names(), "triderm --help lists them")
        print(f"error: {name!r} is not a program of triderm; {hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
