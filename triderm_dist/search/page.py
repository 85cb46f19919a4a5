"""The report of a search: OUTPUT/search/report.html."""

from __future__ import annotations

from html import escape
from pathlib import Path

from triderm_dist.files import write_text
from triderm_dist.report.html import card, data_table, document, figure
from triderm_dist.search.figures import draw_summary
from triderm_dist.search.results import Summary, format_value, gain_over, remarks, verdict
from triderm_dist.search.settings import BASELINE
from triderm_dist.search.space import own_settings

CAPTIONS = {
    "curves": (
        "Score of each trial after each epoch",
        "One line per trial. A cross marks the end of a stopped trial; a diamond marks where a trial of pbt copied a "
        "leading one: the curve before it is that trial’s.",
    ),
    "importance": (
        "Which settings matter",
        "Share of the variance of the scores that a setting explains, by a random forest (fANOVA). Bars: 5 to 95% "
        "over resamples of the trials; with a dozen trials only bars that do not overlap are informative. "
        "Stopped trials count with the score at which they were stopped.",
    ),
    "settings": (
        "Score against each setting",
        "One point per trial. Settings vary together: a trend may be due to another setting.",
    ),
    "parallel": ("All settings of each trial", "One line per trial, darker for a higher macro F1; dotted: stopped."),
}


def write_page(summary: Summary) -> tuple[Path, list[Path]]:
    """Draw the figures and write SEARCH/report.html; return the paths of page and figures."""
    figures = draw_summary(summary)
    sections = [_head(summary)]
    for path, description in figures.items():
        title, caption = CAPTIONS[path.stem]
        sections.append(f"<h2>{title}</h2>" + figure(path, description, caption))
        if path.stem == "curves":
            sections.append(_trials(summary))
    page = summary.folder / "report.html"
    write_text(page, document(f"search of {summary.run.folder.name}", "\n".join(sections)))
    return page, list(figures)


def _head(summary: Summary) -> str:
    run, baseline, best = summary.run, summary.baseline, summary.best
    cards = []
    for label, trial in (("Best", best), ("The experiment’s own settings", baseline)):
        if trial and trial.macro_f1 is not None:
            note = f"trial {trial.number} · {trial.epochs} epochs · {trial.seconds:.0f} s"
            cards.append(card(f"{label}: macro F1 (argmax)", f"{trial.macro_f1:.3f}", note))
    if summary.repeats:
        gain, seeds = summary.repeats.gain, len(summary.repeats.seeds)
        interval = f"95% interval {gain.low:+.3f} to {gain.high:+.3f} · " if seeds > 1 else ""
        cards.append(card("Gain with other seeds", f"{gain.value:+.3f}", f"{interval}{seeds} seed{'s'[: seeds > 1]}"))
    return (
        f"<header><h1>Search: {escape(run.folder.name)}, {escape(run.model)}</h1>"
        f"<p class=quiet>{len(summary.trials)} trials over {len(summary.space)} settings · {run.search.searcher} · "
        f"{run.search.scheduler} · validation on fold {', '.join(map(str, run.search.folds))} · triderm-dist</p>"
        f'</header><div class="cards">{"".join(cards)}</div><p>{escape(" ".join(verdict(summary)))}</p>{_best(summary)}'
    )


def _best(summary: Summary) -> str:
    best = summary.best
    if best is None or best.number == BASELINE:
        return ""
    own = own_settings(summary.run.experiment.models[summary.run.model], best.settings)
    rows = [
        (key, (escape(format_value(own[key])), escape(format_value(value))), "") for key, value in best.settings.items()
    ]
    return "<h2>The best settings</h2>" + data_table(("setting", "experiment", "best"), rows, "The best settings")


def _trials(summary: Summary) -> str:
    rows = []
    for trial in summary.trials:
        gain = gain_over(summary.baseline, trial)
        gain_text = "baseline" if trial.number == BASELINE else "–" if gain is None else f"{gain:+.3f}"
        score = "–" if trial.macro_f1 is None else f"{trial.macro_f1:.3f}"
        about = f'<span class="long">{escape(remarks(trial))}</span>'
        cells = (trial.state, str(trial.epochs), score, gain_text, f"{trial.seconds:.0f}", about)
        rows.append((str(trial.number), cells, "lead" if trial is summary.best else ""))
    header = ("trial", "state", "epochs", "macro F1", "gain", "seconds", "settings")
    return f"<details><summary>all trials</summary>{data_table(header, rows, 'All trials')}</details>"
