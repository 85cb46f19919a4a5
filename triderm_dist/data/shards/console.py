"""What the programs of `shards/` print: progress, problems, what a folder holds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from triderm_dist.data.problems import Problem, count_by_kind, write_problems
from triderm_dist.data.shards.index import ShardIndex

SHOWN = 10


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line every 10 seconds elsewhere; call what is given with (done, in all)."""
    from rich.progress import Progress

    if sys.stderr.isatty():
        with Progress(transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= 10:
            said = time.monotonic()
            print(f"{what}: {done} of {total}", flush=True)

    yield say


def show_problems(problems: Sequence[Problem], table: Path) -> None:
    """The first problems as a table, counts by kind, and all of them in a CSV beside the data."""
    if not problems:
        table.unlink(missing_ok=True)
        return
    from rich.console import Console
    from rich.table import Table

    write_problems(table, problems)
    shown = Table("lesion", "problem", "where", "what", box=None, pad_edge=False)
    for problem in problems[:SHOWN]:
        shown.add_row(problem.lesion_id, problem.kind, problem.where, problem.what)
    Console(width=None if sys.stdout.isatty() else 240, highlight=False).print(shown, markup=False)
    counts = ", ".join(f"{count} {kind}" for kind, count in count_by_kind(problems).items())
    print(f"{len(problems)} problems: {counts}; all in {table}")


def show_index(index: ShardIndex) -> None:
    """Lesions of each diagnosis, shards and size; what should be known of the photos."""
    for diagnosis, count in index.counts().items():
        if count:
            print(f"  {diagnosis:<10} {count:>7}")
    size = sum(shard.bytes for shard in index.shards)
    dropped = len({problem.lesion_id for problem in index.problems})
    left_out = f", {dropped} left out" if dropped else ""
    for note in index.notes():
        print(f"note: {note}")
    print(f"{len(index)} lesions{left_out}, {len(index.shards)} shards, {size / 1e6:.1f} MB in {index.folder}")
