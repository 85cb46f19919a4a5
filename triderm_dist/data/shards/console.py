"""Console output of triderm pack, index, verify and download: progress, problems, summary of a packed set."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from triderm_dist.data.problems import Problem, count_by_kind, write_problems
from triderm_dist.data.progress import Progress
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.shards.photos import describe_changes
from triderm_dist.runtime.terminal import counted, wrapped

MAX_SHOWN = 10
"""Problems shown on the console."""


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Show a progress bar on a terminal, elsewhere print a line every 10 seconds."""
    import rich.progress

    if sys.stderr.isatty():
        with rich.progress.Progress(transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def print_line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            print(f"{title}: {done} of {total}", flush=True)

    yield print_line


def print_problems(problems: Sequence[Problem], table: Path) -> None:
    """Print the first problems and counts by kind, and write all to the CSV file `table`; without any, remove it."""
    if not problems:
        table.unlink(missing_ok=True)
        return
    from rich.console import Console
    from rich.table import Table

    write_problems(table, problems)
    rows = Table("lesion", "problem", "where", "what", box=None, pad_edge=False)
    for problem in problems[:MAX_SHOWN]:
        rows.add_row(problem.lesion_id, problem.kind, problem.where, problem.what)
    Console(width=None if sys.stdout.isatty() else 240, highlight=False).print(rows, markup=False)
    counts = ", ".join(f"{count} {kind}" for kind, count in count_by_kind(problems).items())
    print(f"{len(problems)} problems: {counts}; all in {table}")


def print_index(index: ShardIndex, done: str = "packed") -> None:
    """Print the lesions of each diagnosis, notes, and what was read, converted, dropped and `done`."""
    counts = [(name, count) for name, count in (*index.counts().items(), ("unlabeled", index.unlabeled)) if count]
    width = max(10, *(len(name) for name, _ in counts)) if counts else 0
    for diagnosis, count in counts:
        print(f"  {diagnosis:<{width}} {count:>7}")
    dropped = len({problem.lesion_id for problem in index.problems} - {""})
    text = f", {dropped} dropped" if dropped else ""
    for note in index.notes():
        print(wrapped(f"note: {note}"))
    rows = [("read", f"{counted(len(index) + dropped, 'lesion')}")]
    rows += [("converted", line) for line in describe_changes(index.converted)]
    for kind in count_by_kind(index.problems):
        own = [problem for problem in index.problems if problem.kind == kind]
        lesions = counted(len({problem.lesion_id for problem in own}), "lesion")
        rows.append(("dropped", f"{lesions}: {kind}, such as {own[0]}"))
    rows.append((done, f"{counted(len(index), 'lesion')}, {counted(index.photos, 'photo')}"))
    for what, line in rows:
        print(wrapped(f"{what:<10} {line}", " " * 11))
    where = index.remote.store.shown("").rstrip("/") if index.remote else index.folder
    summary = f"{counted(len(index), 'lesion')}{text}, {counted(len(index.shards), 'shard')}"
    print(wrapped(f"{summary}, {index.bytes / 1e6:.1f} MB in {where}"))
