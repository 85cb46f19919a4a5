"""Fit the stacker in a child process, and keep idle OpenMP threads from slowing down busy ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from triderm_dist.runtime.plugins import explain_plugin_error
from triderm_dist.runtime.usage import add_child_peak, own_peak_mb
from triderm_dist.schema import InputError

Result = TypeVar("Result")


def run_in_child(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call `function` in a child process, so that all memory of XGBoost is released afterwards, also on the GPU.

    Raises InputError if that process is killed.
    """
    set_passive_openmp()  # read when the child loads OpenMP
    context = get_context("forkserver")  # further children of the same program start at once
    context.set_forkserver_preload([function.__module__])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            result, peak_mb = pool.submit(_with_peak_memory, function, *arguments).result()
    except BrokenProcessPool:
        raise InputError(
            "the process that fits the stacker was killed, probably by the system for its memory; free some, or set "
            "stack.enabled=false"
        ) from None
    add_child_peak(peak_mb)
    return result


def _with_peak_memory(function: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """Return the result of `function`, and the peak memory of this process in MiB.

    Raises InputError for an exception of a plugin, whose traceback does not reach the other process.
    """
    try:
        return function(*arguments), own_peak_mb()
    except Exception as error:
        if isinstance(error, InputError) or (line := explain_plugin_error(error)) is None:
            raise
        raise InputError(line) from None


def set_passive_openmp() -> None:
    """Let idle OpenMP threads sleep. Call it before OpenMP is loaded.

    Spinning threads steal the cores of those that work: one fit took 1.4 to 31 s with them, and 2 s without.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
