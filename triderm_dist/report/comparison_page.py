"""The page that compares runs: paired differences, McNemar tests, and settings that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triderm_dist.files import PATIENT_DATA
from triderm_dist.metrics import METRICS
from triderm_dist.report.comparison import Comparison, Pair
from triderm_dist.report.elements import Column, Figure, Flag, Row, Section, Share, Table
from triderm_dist.report.render import write_page
from triderm_dist.report.style import BLUE, GRAY, MEDIUM, ORANGE
from triderm_dist.schema import InputError


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write FOLDER/report.html and its figures and tables into FOLDER/report; return the path of the page.

    Raises InputError where the folder is that of one of the runs, whose report it would replace.
    """
    if folder.resolve() in {run.folder.resolve() for run in comparison.runs}:
        raise InputError(f"output={folder}: is the folder of a run, whose report would be replaced; name another one")
    sections = [
        _head(comparison), _metrics(comparison), _decisions(comparison), _diagnoses(comparison), _settings(comparison)
    ]  # fmt: skip
    title = " and ".join(run.name for run in comparison.runs)
    shown = [section for section in sections if section is not None]
    return write_page(folder / "report.html", folder / "report", title, shown, PATIENT_DATA)


def _title(pair: Pair) -> str:
    return f"{pair.first} minus {pair.second}"


def _head(comparison: Comparison) -> Section:
    runs, pairs = comparison.runs, comparison.pairs
    scores = [Row(run.name, (score, str(run.folder))) for run, score in zip(runs, comparison.macro_f1, strict=True)]
    score_columns = [Column("macro_f1", "macro F1, nested"), Column("folder", "folder", long=True)]
    columns = [
        Column("macro_f1", "macro F1", "+.3f"),
        Column("verdict", "beyond the noise"),
        Column("corrected", f"interval for {len(pairs)} pairs together", "+.3f"),
    ]
    rows = [Row(_title(pair), (pair.macro_f1, _verdict(pair.beyond_noise), pair.corrected)) for pair in pairs]
    if len(pairs) == 1:
        columns, rows = columns[:2], [Row(row.name, row.values[:2]) for row in rows]
    figure = Figure(
        "differences",
        lambda canvas: _draw(canvas, pairs),
        "Differences in macro F1: " + "; ".join(f"{_title(pair)} {pair.macro_f1.signed()[0]}" for pair in pairs) + ".",
        "Nested macro F1, paired by lesion, with 95% intervals"
        + (" corrected for the number of pairs." if len(pairs) > 1 else "."),
        (MEDIUM, 1.1 + 0.42 * len(pairs)),
    )
    return Section(
        "",
        "comparison_head.html",
        tables=[
            Table("differences_macro_f1", "Paired differences in nested macro F1", columns, rows, "difference", True),
            Table("runs", "The runs", score_columns, scores, "run", emphasis=True),
        ],
        figures=[figure],
        values={
            "heading": f"Comparison of {len(runs)} runs",
            "about": f"{comparison.task.title or comparison.task.name} · {len(comparison.labels):,} lesions · "
            f"{len(comparison.diagnoses)} diagnoses · triderm-dist",
            "different": [_title(pair) for pair in pairs if pair.beyond_noise],
            "pairs": len(pairs),
            "other_folds": comparison.other_folds,
            "grouped": comparison.grouped,
        },
    )


def _verdict(different: bool) -> Flag:
    return Flag("yes" if different else "no", different)


def _draw(figure: Any, pairs: list[Pair]) -> None:
    axes = figure.subplots()
    for row, pair in enumerate(pairs):
        color = ORANGE if pair.beyond_noise else BLUE
        axes.plot([pair.corrected.low, pair.corrected.high], [row, row], color=color, linewidth=2)
        axes.plot(pair.macro_f1.value, row, "o", color=color, markersize=6)
    axes.axvline(0, color=GRAY, linewidth=1)
    axes.set_yticks(range(len(pairs)), [_title(pair) for pair in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("difference in macro F1")


def _metrics(comparison: Comparison) -> Section:
    """Return the other metrics of each run, and their paired differences."""
    columns = [Column(f"run_{number}", run.name) for number, run in enumerate(comparison.runs, 1)]
    rows = [Row(metric.title, tuple(values[name] for values in comparison.metrics)) for name, metric in METRICS.items()]
    differences = [
        Row(_title(pair), (pair.metrics[name], _verdict(pair.metrics[name].excludes_zero)), group=metric.title)
        for name, metric in METRICS.items()
        for pair in comparison.pairs
    ]
    of_difference = [Column("difference", "difference", "+.3f"), Column("verdict", "95% interval without 0")]
    return Section(
        "Other metrics",
        tables=[
            Table("metrics", "Metrics of each run", columns, rows, "metric"),
            Table("differences_metrics", "Paired differences of the metrics", of_difference, differences, "difference"),
        ],
        values={"note": "Not corrected for the number of metrics: of twenty differences without a cause, about one has "
        "an interval without 0."},
    )  # fmt: skip


def _decisions(comparison: Comparison) -> Section:
    """Return how many lesions only one run of each pair decides correctly."""
    lesions = len(comparison.labels)
    columns = [
        Column("first", "only the first is correct"),
        Column("second", "only the second is correct"),
        Column("both", "both are correct"),
        Column("neither", "neither is correct"),
        Column("p", "McNemar p", ".2g"),
        Column("adjusted", f"p, adjusted for {len(comparison.pairs)} pairs", ".2g"),
    ]
    rows = []
    for pair in comparison.pairs:
        test = pair.mcnemar
        counts = [Share(count, lesions) for count in (test.first, test.second, test.both, test.neither)]
        rows.append(Row(f"{pair.first} and {pair.second}", (*counts, test.p, test.adjusted)))
    if len(rows) == 1:
        columns, rows = columns[:-1], [Row(row.name, row.values[:-1]) for row in rows]
    note = (
        "Exact McNemar test of whether one of the two is correct more often, two-sided; adjusted by Holm's method. "
        "Correct: the label is decided, and nothing else. It weighs lesions, so common diagnoses count most; macro F1 "
        "weighs diagnoses."
    )
    if comparison.grouped:
        note += " The test takes lesions as independent, and some share a group, so p is too small."
    table = Table("mcnemar", "Lesions that are decided correctly", columns, rows, "first and second")
    return Section("Decisions on the same lesions", tables=[table], values={"note": note})


def _diagnoses(comparison: Comparison) -> Section:
    columns = [Column(f"run_{number}", run.name) for number, run in enumerate(comparison.runs, 1)]
    rows = [
        Row(each.name, (*(f1[number] for f1 in comparison.f1), int((comparison.labels == number).sum())), each.title)
        for number, each in enumerate(comparison.task.diagnoses)
    ]
    columns.append(Column("lesions", "lesions"))
    return Section("F1 of each diagnosis", tables=[Table("f1", "F1 of each diagnosis", columns, rows, "diagnosis")])


def _settings(comparison: Comparison) -> Section | None:
    if not comparison.settings:
        return Section("Settings that differ", values={"text": "None, apart from where files lie."})
    columns = [Column(f"run_{number}", run.name, long=True) for number, run in enumerate(comparison.runs, 1)]
    rows = [Row(key, tuple(value or None for value in values)) for key, values in comparison.settings]
    table = Table("settings", "Settings that differ", columns, rows, "setting")
    return Section("Settings that differ", tables=[table])
