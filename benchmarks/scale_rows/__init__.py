"""Rows of `benchmarks.scale`: what surrounds the training of many lesions, each as a function of their number.

A module holds `ROWS`, the rows of one part of the toolkit, and imports what they measure in the functions, so that the
memory of one row is not counted in another's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """What one row measures.

    measure: does the work on n lesions, in a process of its own whose CPU time and peak memory are counted, children
    included; returns other figures by name, or nothing. `cpu_s` in seconds or `peak_mb` among them replaces what is
    counted: for work that is a part of the process.
    prepare: writes what it reads into the folder before, in another process.  largest: n above which it is not
    measured.
    """

    name: str
    measure: Callable[[int, Path], Mapping[str, float] | None]
    prepare: Callable[[int, Path], None] | None = None
    largest: int = 10**7


def packed_set(n: int, folder: Path) -> Path:
    """Return the folder of a packed set of n lesions, whose photos are holes in sparse files. Rows share one set of a
    size: the first call writes it.
    """
    from benchmarks.simulated_set import write_simulated_set

    path = folder.parent / "set"
    if not path.exists():
        write_simulated_set(path, n)
    return path


def open_files() -> int:
    """Return the number of descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd"))
