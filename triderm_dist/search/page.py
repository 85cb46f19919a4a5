"""The report of a search: OUTPUT/search/report.html, with its figures and tables in OUTPUT/search/report/."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from triderm_dist.intervals import Interval
from triderm_dist.report.elements import Column, Row, Section, Table
from triderm_dist.report.render import write_page
from triderm_dist.runtime.terminal import counted
from triderm_dist.search.figures import figures_of
from triderm_dist.search.results import Summary, format_value, gain_over, remarks, verdict
from triderm_dist.search.settings import BASELINE
from triderm_dist.search.space import own_settings

TITLES = {
    "curves": "Score of each trial after each epoch",
    "importance": "Which settings matter",
    "settings": "Score against each setting",
    "parallel": "All settings of each trial",
}
"""Titles of the sections by the figure that they show."""

OTHER_SEEDS = "with other seeds"


def write_search_page(summary: Summary) -> Path:
    """Write SEARCH/report.html, its figures and its tables; return the path of the page."""
    sections = [_head(summary), *_best(summary)]
    for figure in figures_of(summary):
        sections.append(Section(TITLES[figure.name], figures=[figure]))
    sections += [_trials(summary), *_repeats(summary)]
    page, title = summary.folder / "report.html", f"search of {summary.run.folder.name}"
    return write_page(page, summary.folder / "report", title, sections)


def _head(summary: Summary) -> Section:
    run = summary.run
    rows = []
    for label, trial in (("best", summary.best), ("the experiment’s own settings", summary.baseline)):
        if trial and trial.macro_f1 is not None:
            note = f"trial {trial.number} · {trial.epochs} epochs · {trial.seconds:.0f} s"
            rows.append(Row(label, (trial.macro_f1,), note=note))
    columns = [Column("macro_f1", "macro F1 (argmax)")]
    tables = [Table("main", "Main figures of the search", columns, rows, head="trial")]
    gains = []
    if summary.gain:
        gains.append(Row("on the validation lesions", (summary.gain, f"{summary.lesions:,} lesions")))
    if summary.repeats:
        seeds = len(summary.repeats.seeds)
        gain: Interval | float = summary.repeats.gain if seeds > 1 else summary.repeats.gain.value
        gains.append(Row(OTHER_SEEDS, (gain, counted(seeds, "seed"))))
    columns = [Column("gain", "gain in macro F1", "+.3f"), Column("of", "interval over")]
    tables.append(Table("gains", "The best settings against the experiment's own", columns, gains, head="gain"))
    trials = counted(len(summary.trials), "trial")
    return Section(
        "",
        "search_head.html",
        tables=tables,
        values={
            "heading": f"Search: {run.folder.name}, {run.model}",
            "about": f"{trials} over {len(summary.space)} settings · {run.search.searcher} · {run.search.scheduler} · "
            f"validation on fold {', '.join(map(str, run.search.folds))} · triderm-dist",
            "verdict": verdict(summary),
            "other_seeds": OTHER_SEEDS if summary.repeats else "",
        },
    )


def _best(summary: Summary) -> list[Section]:
    """Return a table of the best settings and the experiment's; [] if the experiment's are the best."""
    best = summary.best
    if best is None or best.number == BASELINE:
        return []
    own = own_settings(summary.run.experiment.models[summary.run.model], best.settings)
    rows = [Row(key, (format_value(value), format_value(own[key]))) for key, value in best.settings.items()]
    columns = [Column("best", "best"), Column("experiment", "experiment")]
    table = Table("best_settings", "Settings of the best trial", columns, rows, "setting", emphasis=True)
    return [Section("The best settings", tables=[table])]


def _trials(summary: Summary) -> Section:
    columns = [
        Column("macro_f1", "macro F1"),
        Column("gain", "gain", "+.3f"),
        Column("state", "state"),
        Column("epochs", "epochs"),
        Column("seconds", "seconds", ".0f"),
        Column("settings", "settings", long=True),
    ]
    rows = [
        Row(
            str(trial.number),
            (
                trial.macro_f1,
                "baseline" if trial.number == BASELINE else gain_over(summary.baseline, trial),
                trial.state,
                trial.epochs,
                float(trial.seconds),
                remarks(trial),
            ),
            lead=trial is summary.best,
        )
        for trial in summary.trials
    ]
    table = Table("trials", "All trials, the best first", columns, rows, "trial")
    listed = counted(len(rows), "trial")
    return Section("Trials", "search_trials.html", tables=[table], values={"listed": listed})


def _repeats(summary: Summary) -> list[Section]:
    """Return the scores of baseline and best settings with other seeds; nothing if there are none."""
    repeats = summary.repeats
    if repeats is None:
        return []
    pairs = zip(repeats.seeds, repeats.best, repeats.baseline, strict=True)
    rows = [Row(f"seed {seed}", (best, own, best - own)) for seed, best, own in pairs]
    if len(rows) > 1:
        scores = np.array([row.values for row in rows])
        rows.append(Row("mean", scores.mean(axis=0).tolist(), lead=True))
        rows.append(Row("standard deviation", [*scores[:, :2].std(axis=0, ddof=1).tolist(), None]))
    columns = [Column("best", "best"), Column("experiment", "experiment"), Column("gain", "gain", "+.3f")]
    table = Table("repeats", "Macro F1 (argmax) with other seeds", columns, rows, "training")
    return [Section("Other seeds", tables=[table])]
