"""Findings of the doctor, and their table on the terminal."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "error"]
GIB = 2**30
MARKS: dict[State, str] = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "error": "[bold red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    """One line of the result. State `error` stops a run, `warning` may impair it; advice: what to do."""

    name: str
    text: str
    state: State = "ok"
    advice: str = ""


def try_import(name: str) -> Any:
    """Import a module; None if it is not installed or its import fails."""
    try:
        return importlib.import_module(name)
    except Exception:  # a broken installation raises many types, such as OSError for a shared library
        return None


def errors(findings: dict[str, list[Finding]]) -> list[Finding]:
    """Return the findings that stop a run."""
    return [finding for section in findings.values() for finding in section if finding.state == "error"]


def print_findings(findings: dict[str, list[Finding]]) -> None:
    """Print one table per section; plain lines if rich is not installed."""
    if try_import("rich") is None:
        for section, rows in findings.items():
            print(f"\n{section}")
            for row in rows:
                print(f"  {row.state:<8} {row.name}: {row.text}" + (f" -> {row.advice}" if row.advice else ""))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for section, rows in findings.items():
        console.print(f"\n[bold]{section}[/]")
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=3, justify="right")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            text = escape(row.text) + (f"\n[yellow]→ {escape(row.advice)}[/]" if row.advice else "")
            table.add_row(MARKS[row.state], escape(row.name), text)
        console.print(table)
    console.print()
