"""Reading a table, and the memory of the process that packs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.scale_rows import Row


def write_table(n: int, folder: Path) -> None:
    from benchmarks.read_table import write

    write(folder, n)


def read_table(n: int, folder: Path) -> None:
    """Read the table and find its photos."""
    from benchmarks.read_table import read

    read(str(folder))


ROWS = (Row("read", read_table, write_table, largest=10**6),)
