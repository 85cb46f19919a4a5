"""Waiting in tests: for an event, with a limit that only guards against hanging."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

HANG_SECONDS = 900.0
"""A test that waits this long for one thing hangs. How busy the machine is must decide no test: each limit is this one,
and that something happens early is shown by counts or events.
"""


def wait_for(
    condition: Callable[[], object],
    process: subprocess.Popen | None = None,
    output: Callable[[], str] = lambda: "",
    pause: float = 0.02,
) -> None:
    """Poll until `condition()` holds; fail where `process` ends first, or after HANG_SECONDS, showing `output()`."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert process is None or process.poll() is None or condition(), f"{process.args} ended\n{output()}"
        assert time.monotonic() < deadline, f"waited {HANG_SECONDS:g} s\n{output()}"
        time.sleep(pause)
