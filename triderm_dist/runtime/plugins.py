"""Errors of plugins: an exception in a user's own code is invalid input, and is explained in one line.

Its author sees the traceback too with `TRIDERM_TRACEBACK=1` in the environment.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from traceback import extract_tb, print_exception

from triderm_dist.runtime.messages import one_line

IMPORTED: dict[str, str] = {}
"""Names of plugins as settings give them, by the name of their module."""
TRACEBACK = "TRIDERM_TRACEBACK"
"""Environment variable: 1 prints the traceback of each error of a plugin before its line."""

# Of calls that a signature does not take, abstract classes and missing attributes: raised by the caller.
_NAMED = re.compile(r"([\w.]+)\(\) |abstract class (\w+)|type object '(\w+)'|'(\w+)' object")


def explain_plugin_error(error: BaseException) -> str | None:
    """Return one line with the place in the plugin that raised the error, or with the name of the plugin whose class or
    function it is about; None if no plugin is involved.
    """
    place = _place(error)
    if place and os.environ.get(TRACEBACK) == "1":
        print_exception(error)
    return f"{place}: {one_line(error, 300, with_type=True)}" if place else None


def _place(error: BaseException) -> str | None:
    for frame in reversed(extract_tb(error.__traceback__)):
        if plugin := _plugin_of(frame.filename):
            return f"{plugin}, line {frame.lineno}" + ("" if frame.name == "<module>" else f", in {frame.name}")
    if not isinstance(error, TypeError | AttributeError):
        return None
    for found in _NAMED.finditer(str(error)):
        named = next(filter(None, found.groups())).split(".")[0]
        for module, name in IMPORTED.items():
            owner = getattr(getattr(sys.modules.get(module), named, None), "__module__", None) or ""
            if f"{owner}.".startswith(f"{module}."):
                return name
    return None


def _plugin_of(file: str) -> str | None:
    """Return the name of the plugin that a source file is, or, with the file, of the package that it is part of."""
    for module, name in IMPORTED.items():
        loaded = sys.modules.get(module)
        if file == getattr(loaded, "__file__", None):
            return name
        for folder in getattr(loaded, "__path__", ()):
            if Path(file).is_relative_to(folder):
                return f"{name}, {Path(file).relative_to(folder)}"
    return None
