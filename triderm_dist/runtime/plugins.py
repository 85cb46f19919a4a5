"""Errors of plugins: an exception in a user's own code is invalid input, and is explained in one line."""

from __future__ import annotations

import re
import sys
from traceback import extract_tb

from triderm_dist.runtime.messages import one_line

IMPORTED: dict[str, str] = {}
"""Names of plugins as settings give them, by the name of their module."""

# Of calls that a signature does not take, abstract classes and missing attributes: raised by the caller.
_NAMED = re.compile(r"([\w.]+)\(\) |abstract class (\w+)|type object '(\w+)'|'(\w+)' object")


def explain_plugin_error(error: BaseException) -> str | None:
    """Return one line with the place in the plugin that raised the error, or with the name of the plugin whose class or
    function it is about; None if no plugin is involved.
    """
    text = one_line(error, 300, with_type=True)
    files = {getattr(sys.modules.get(module), "__file__", None): name for module, name in IMPORTED.items()}
    for frame in reversed(extract_tb(error.__traceback__)):
        if frame.filename in files:
            where = "" if frame.name == "<module>" else f", in {frame.name}"
            return f"{files[frame.filename]}, line {frame.lineno}{where}: {text}"
    if not isinstance(error, TypeError | AttributeError):
        return None
    for found in _NAMED.finditer(str(error)):
        named = next(filter(None, found.groups())).split(".")[0]
        for module, name in IMPORTED.items():
            if getattr(getattr(sys.modules.get(module), named, None), "__module__", None) == module:
                return f"{name}: {text}"
    return None
