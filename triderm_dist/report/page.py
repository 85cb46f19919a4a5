"""The page of the report, section by section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from triderm_dist.ensemble.run_files import ENSEMBLE
from triderm_dist.ensemble.score_table import COLUMNS, SHOWN
from triderm_dist.files import PATIENT_DATA, write_text
from triderm_dist.intervals import Interval
from triderm_dist.metrics import METRICS
from triderm_dist.report.content import (
    GROUP,
    LOWER_RECALL,
    MIN_COMMON_LESIONS,
    MIN_SLICE_LESIONS,
    MIN_SLICE_POSITIVES,
    Content,
    DoubtfulLesion,
    extra_sets,
)
from triderm_dist.report.figures import draw
from triderm_dist.report.html import card, data_table, document, figure

RULES = {
    "argmax": "The most probable diagnosis of each lesion is predicted.",
    "fitted": "One diagnosis is predicted for each lesion: the one whose probability is largest relative to its fitted "
    "threshold.",
    "threshold": "A diagnosis is predicted where its probability exceeds its threshold.",
}
"""The decisions of `schema.DECISIONS` in words."""

MEASURES = {
    "argmax": "most probable diagnosis",
    "fitted": "one diagnosis by fitted thresholds",
    "threshold": "each diagnosis with p &gt; 0.5",
}
"""What the macro F1 of a decision counts as predicted; a challenge's metric is called official instead."""

COLUMN_NOTES = {
    "official": "p &gt; 0.5: nothing fitted.",
    "argmax": "Argmax: only the most probable diagnosis is predicted.",
    "argmax_tau": "Argmax, tau: the same after logit adjustment with tau fitted on the other folds.",
    "fitted": "Fitted: thresholds fitted on the same lesions, which biases the score upward; for comparison only.",
}
"""Notes under the score table, by column."""

MISLABELED_LESIONS = 30
"""Lesions in the list of probable label errors, at most."""


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Write report.html, atomically, and its figures report/*.png from the files that triderm stack wrote.

    output: folder for them; None writes into the run. Returns the path of the page. Raises DataError where
    ensemble.json, ensemble_oof.parquet or oof.parquet is missing.
    """
    folder = Path(output or run_folder)
    content = Content(run_folder)
    alt_texts = draw(content, folder / "report")
    path = folder / "report.html"
    write_text(path, _page(content, alt_texts, folder / "report"), PATIENT_DATA)
    return path


def _page(content: Content, alt_texts: dict[str, str], folder: Path) -> str:
    def picture(name: str, caption: str) -> str:
        if name not in alt_texts:
            return ""
        return figure(folder / f"{name}.png", alt_texts[name], caption)

    sections = [
        _header(content),
        _score_table(content),
        _metrics(content),
        _published_results(content),
        _diagnoses(content),
        _malignancy(content),
        "<h2>Confusion matrix</h2>"
        + picture(
            "confusion",
            "Percent of the lesions of each diagnosis."
            + (
                " Diagnoses are predicted independently, so a row can add up to more than 100; “none”: no diagnosis "
                "was predicted."
                if content.task.decision == "threshold"
                else ""
            ),
        ),
        "<h2>Precision, recall, calibration</h2>"
        + picture(
            "precision_recall",
            "Number after the name: average precision. Dot: the decisions. Dashed: random predictions.",
        )
        + picture(
            "reliability",
            "On the dashed line, probabilities are calibrated. Larger dots hold more lesions; bars: 95% intervals.",
        ),
        _slices(content),
        _missing_views(content),
        _doubtful(content),
        _ensemble(content, picture),
        "<h2>Learning curves</h2>" + picture("learning_curves", "One line per fold.") if content.curves else "",
        _method(content),
        _settings(content),
    ]
    body = "\n".join(section for section in sections if section)
    return document(content.name, body)


def _header(content: Content) -> str:
    folds, models = content.fit["folds"], len(content.table.models)
    cards = [
        card(
            f"Macro F1, out of fold, nested, {_measure(content)}",
            f"{content.score.value:.3f}",
            f"95% interval {_range(content.score)} · {len(content.labels):,} lesions",
        )
    ]
    if held := content.held_out:
        low, high = held["interval"]
        cards.append(
            card(
                f"Macro F1 on the held-out test set, {_measure(content)}",
                f"{held['macro_f1']:.3f}",
                f"95% interval {low:.3f} to {high:.3f} · {held['n']:,} lesions"
                + (
                    f" · without {escape(', '.join(held['absent']))}, absent from the test set"
                    if held["absent"]
                    else ""
                ),
            )
        )
    banner = (
        '<p class="banner"><strong>SYNTHETIC data.</strong> Every photo and label was generated by a program. '
        "The figures show that the programs work; they say nothing about real lesions.</p>"
        if content.synthetic
        else ""
    )
    return (
        f"<header><h1>{escape(content.title)}: {escape(content.name)}</h1>"
        f"<p class=quiet>{models} {_plural('model', models)} · {folds} folds · "
        f"{len(content.diagnoses)} diagnoses · triderm-dist</p></header>{banner}"
        f'<div class="cards">{"".join(cards)}</div>'
        f"<p>Macro F1 is the unweighted mean of F1 over all diagnoses. {RULES[content.task.decision]} Every lesion was "
        f"predicted by networks that were not trained on it, with {_fitted_parts(content)} fitted on the other folds."
        f"{_best_row(content)}</p>"
    )


def _best_row(content: Content) -> str:
    """Explain why a row of the score table can be better than the ensemble's figure; "" where none is."""
    best = max((row for row in content.scores if row.name != ENSEMBLE), key=lambda row: row.nested.value)
    if best.nested.value <= content.score.value:
        return ""
    return (
        f" The figure {content.score.value:.3f} includes the choice among the rows below: in each fold it was made on "
        f"the other folds. So it can be lower than the best row ({escape(best.name)}, {best.nested.value:.3f}), which "
        "is known to be the best from these lesions only and is too high by that choice."
    )


def _score_table(content: Content) -> str:
    rows: list[tuple[str, Sequence[str], str]] = []
    shown = SHOWN[content.task.decision]
    for row in content.scores:
        cells = {key: text or "–" for key, text in row.cells().items()}
        cells["nested"] = f"<strong>{cells['nested']}</strong>"
        rows.append((row.name, [cells[key] for key in shown], "lead" if row.name == ENSEMBLE else ""))
    notes = "".join(f"<li>{escape(note[0].upper() + note[1:])}.</li>" for note in content.fit["notes"])
    column_notes = COLUMN_NOTES | {
        "nested": f"Nested: the main figure ({_measure(content)}), {_fitted_parts(content)} fitted on the other folds."
    }
    explained = " ".join(column_notes[key] for key in shown if key in column_notes)
    return (
        "<h2>Score of each stage</h2>"
        + data_table(("", *(COLUMNS[key] for key in shown)), rows, "Scores of members and ensemble")
        + f'<p class="note">Macro F1. {explained}</p><ul>{notes}</ul>{_pairs(content)}'
    )


def _metrics(content: Content) -> str:
    rows = [(f"Macro F1, {_measure(content)}", [f"{content.score.value:.3f}", _range(content.score)], "lead")]
    if content.common_score:
        title = f"Macro F1, diagnoses with at least {MIN_COMMON_LESIONS} lesions"
        rows.append((title, [f"{content.common_score.value:.3f}", _range(content.common_score)], ""))
    for name, interval in content.metric_values.items():
        rows.append((escape(METRICS[name].title), [_number(interval.value), _range(interval)], ""))
    return (
        "<h2>Metrics</h2>"
        + data_table(("", "nested", "95% interval"), rows, "Metrics of the ensemble", escaped=True, long_names=True)
        + '<p class="note">Of the ensemble on out-of-fold lesions, everything fitted on the other folds.</p>'
        + f"<p>{_spread(content)}</p>"
    )


def _spread(content: Content) -> str:
    """Describe how far macro F1 differs between test sets and between folds."""
    (lesions, spread), scores = content.test_set, content.fold_scores
    return (
        f"What a test set of {lesions:,} lesions like these would show: macro F1 from {_number(spread.low)} to "
        f"{_number(spread.high)} in 95% of test sets. The single folds here: {_number(min(scores))} to "
        f"{_number(max(scores))}, standard deviation {_number(float(np.std(scores, ddof=1)))}."
    )


def _pairs(content: Content) -> str:
    """Return a table of differences between members, each pair on the same lesions."""
    rows = []
    for pair in content.fit["pairs"]:
        difference = Interval(**pair["difference"])
        verdict = (
            '<span class="flag">significant</span>'
            if difference.excludes_zero
            else '<span class="quiet">not significant</span>'
        )
        cells = [f"{difference.value:+.3f}", _signed(difference), verdict]
        rows.append((f"{pair['first']} minus {pair['second']}", cells, ""))
    if not rows:
        return ""
    table = data_table(("", "nested macro F1", "95% interval", ""), rows, "Differences between members")
    return f"<details><summary>Paired differences between members</summary>{table}</details>"


def _published_results(content: Content) -> str:
    results = content.task.reference_results
    if not results:
        return ""
    title = "<h2>Published results</h2>"
    if content.synthetic:
        return f"{title}<p>No comparison: the data are synthetic, and published results are on real lesions.</p>"
    held_out = f"{content.held_out['macro_f1']:.3f}" if content.held_out else "–"
    rows = [("this run", [f"{content.score.value:.3f} nested", held_out, ""], "lead")]
    rows += [(each.who, [escape(cell) for cell in (each.validation, each.test, each.source)], "") for each in results]
    if not any(each.source for each in results):
        rows = [(who, cells[:2], kind) for who, cells, kind in rows]
    header = ("", "own validation", "test", "source")[: 1 + len(rows[0][1])]
    note = f" {escape(content.task.reference_note)}" if content.task.reference_note else ""
    return (
        title
        + data_table(header, rows, "Published results", long_names=True)
        + f'<p class="note">As published, each on its own split or test set: other lesions than in this report.{note}'
        "</p>"
    )


def _diagnoses(content: Content) -> str:
    counts, rows = content.counts, []
    has_thresholds = content.task.decision != "argmax"
    for index, diagnosis in enumerate(content.task.diagnoses):
        f1 = content.class_intervals[index]
        bar = f'<span class="bar" aria-hidden="true"><i style="width:{100 * np.nan_to_num(f1.value):.0f}%"></i></span>'
        cells = [
            f"{counts.positives[index]:,}",
            f"{bar}&ensp;{_number(f1.value)}",
            _range(f1),
            _number(counts.precision[index]),
            _number(counts.recall[index]),
            _number(content.areas[0][index]),
            _number(content.areas[1][index]),
            f"{counts.predicted[index]:,}",
            *([f"{content.ensemble.thresholds[index]:.3f}"] if has_thresholds else []),
        ]
        label = f"{escape(diagnosis.name)} <span class='quiet'>{escape(diagnosis.title)}</span>"
        rows.append((label, cells, ""))
    header = ["", "lesions", "F1", "95% interval", "precision", "recall", "AUC", "AP", "predicted"]
    thresholds = ""
    if has_thresholds:
        header.append("threshold")
        thresholds = " Thresholds: from the fit on all lesions."
    return (
        "<h2>Scores per diagnosis</h2>"
        + data_table(header, rows, "Scores per diagnosis", escaped=True, long_names=True)
        + f'<p class="note">Out of fold, nested.{thresholds} With few lesions, read the interval, not the value. '
        "AUC: area under the ROC curve; AP: average precision, which is the share of the diagnosis for random "
        "probabilities."
        "</p>"
    )


def _malignancy(content: Content) -> str:
    if content.malignancy is None:
        return ""
    malignancy = content.malignancy
    names = {
        kind: escape(", ".join(each.name for each in content.task.diagnoses if each.malignant is kind))
        for kind in (True, False)
    }
    rows = [(title, [_number(value.value), _range(value)], "") for title, value in malignancy.values.items()]
    (benign, false_alarms), (missed, found) = malignancy.lesions.tolist()
    counts = [
        ("malignant lesions", [f"{found:,}", f"{missed:,}"], ""),
        ("benign lesions", [f"{false_alarms:,}", f"{benign:,}"], ""),
    ]
    unknown = (
        f" {malignancy.unknown:,} {_plural('lesion', malignancy.unknown)} with another diagnosis left out."
        if malignancy.unknown
        else ""
    )
    return (
        "<h2>Malignant against benign</h2>"
        + data_table(("", "nested", "95% interval"), rows, "Malignant against benign", long_names=True)
        + data_table(("", "malignant decision", "no malignant decision"), counts, "Lesions by decision")
        + f'<p class="note">Out of fold, nested. Malignant: {names[True]}; benign: {names[False]}.{unknown} The '
        "decisions are those for macro F1; they weigh a missed malignant lesion no more than a false alarm.</p>"
    )


def _slices(content: Content) -> str:
    rows: list[tuple[str, Sequence[str], str]] = []
    field = ""
    for part in content.slices:
        if part.field != field:
            field = part.field
            rows.append((escape(_slice_title(content, field, with_unit=True)), [], "group"))
        kind = "flag" if part.warning == LOWER_RECALL else "quiet"
        cells = [
            f"{part.lesions:,}",
            f'<span class="{kind}">{part.warning}</span>' if part.warning else "",
            f"{part.recall_difference.value:+.3f}" if part.recall_difference else "–",
            _signed(part.recall_difference) if part.recall_difference else "",
            f"{part.macro_f1.value:.3f}" if part.macro_f1 else "–",
            _range(part.macro_f1) if part.macro_f1 else "",
        ]
        rows.append((escape(part.value.replace("_", " ")), cells, ""))
    header = ("", "lesions", "", "mean recall minus other lesions", "95% interval", "macro F1", "95% interval")
    worse = [
        f"{_slice_title(content, part.field)} {part.value}".replace("_", " ")
        for part in content.slices
        if part.warning == LOWER_RECALL
    ]
    summary = (
        '<p class="banner"><strong>Significantly lower recall than on the other lesions:</strong> '
        f"{escape(', '.join(worse))}.</p>"
        if worse
        else "<p>No slice that is large enough has significantly lower recall than the other lesions.</p>"
    )
    if not content.slices:
        return ""
    return (
        "<h2>Subgroups</h2>"
        + summary
        + data_table(header, rows, "Subgroups of the lesions", escaped=True)
        + f'<p class="note">Only diagnoses with at least {MIN_SLICE_POSITIVES} lesions inside and outside a slice '
        "are used, so macro F1 is not comparable between slices; the difference in mean recall is (same diagnoses on "
        f"both sides). Slices with fewer than {MIN_SLICE_LESIONS} lesions are not judged. About one difference in "
        "twenty lies outside its interval by chance.</p>"
    )


def _slice_title(content: Content, field: str, with_unit: bool = False) -> str:
    """Return the title of the slices of a metadata field, or of `GROUP`."""
    if field == GROUP:
        return f"lesions of the same {content.task.columns.group or 'group'}"
    info = next(each for each in content.task.fields if each.name == field)
    return f"{info.label} ({info.unit})" if with_unit and info.unit else info.label


def _missing_views(content: Content) -> str:
    if not content.missing_views:
        return ""
    rows = [
        (
            f"{part.model} without the {part.view} photo",
            [f"{part.macro_f1:.3f}", f"{part.difference.value:+.3f}", _signed(part.difference)],
            "",
        )
        for part in content.missing_views
    ]
    return (
        "<h2>Lesions with one photo</h2>"
        + data_table(
            ("", "macro F1", "minus with both photos", "95% interval"), rows, "Missing photos", long_names=True
        )
        + '<p class="note">Argmax, out of fold: every lesion predicted again by the same networks with one photo and '
        "its concept scores hidden. A network replaces the missing photo by learned tokens.</p>"
    )


def _doubtful(content: Content) -> str:
    networks = len(content.networks)

    def table(lesions: Sequence[DoubtfulLesion], alternative: str, label: str) -> str:
        rows = [
            (
                lesion.lesion_id,
                [
                    escape(lesion.label),
                    f"{100 * lesion.label_probability:.2f}%",
                    escape(lesion.alternative),
                    f"{100 * lesion.alternative_probability:.0f}%",
                    f"{lesion.agree} of {networks}",
                    escape(lesion.predicted),
                ],
                "",
            )
            for lesion in lesions
        ]
        header = ("lesion", "label", "its probability", alternative, "its probability", "networks agree", "predicted")
        return data_table(header, rows, label)

    wrong, shown = content.mislabeled, content.mislabeled[:MISLABELED_LESIONS]
    count = f"{len(wrong):,} {_plural('lesion', len(wrong))} ({100 * len(wrong) / len(content.labels):.1f}%)"
    mislabeled = (
        f"<p>For {count}, every network finds another diagnosis most probable, as probable as it is on average among "
        "its own lesions, and the label less probable than among its lesions (confident learning). That is a reason "
        "to look at the photos again, not a verdict: diagnoses that the networks have not learned appear in it as well."
        f"</p><details><summary>The {len(shown)} most probable</summary>"
        f"{table(shown, 'alternative', 'Probable label errors')}</details>"
        if wrong
        else "<p>None: no lesion resembles another diagnosis as much as that diagnosis's own lesions do.</p>"
    )
    return (
        f"<h2>Probable label errors</h2>{mislabeled}<h2>Hardest lesions</h2><p>Lesions whose label has the smallest "
        f"probability.</p><details><summary>{len(content.hardest)} lesions</summary>"
        f"{table(content.hardest, 'most probable', 'Hardest lesions')}</details>"
    )


def _ensemble(content: Content, picture: Callable[[str, str], str]) -> str:
    ensemble = content.ensemble
    rule = {
        "any": "A diagnosis is predicted where its probability exceeds its threshold.",
        "at_least_one": "A diagnosis is predicted where its probability exceeds its threshold; if none does, the one "
        "with the largest ratio of probability to threshold.",
        "nearest": "Only the diagnosis with the largest ratio of probability to threshold is predicted.",
    }[ensemble.rule]
    if content.task.decision == "argmax":
        rule, thresholds = RULES["argmax"], ""
    elif ensemble.tau is not None:
        thresholds = (
            f"Thresholds are the share of each diagnosis to the power {ensemble.tau:g}: logit adjustment, "
            "logits − tau · log(prior)."
        )
    elif ensemble.shrinkage:
        thresholds = (
            "Thresholds of rare diagnoses are shrunk toward a pooled threshold with the weight of "
            f"{ensemble.shrinkage:g} positives."
        )
    else:
        thresholds = "Thresholds are averages over resampled lesions, without shrinkage."
    temperatures = ", ".join(
        f"{name} {value:.2f}"
        for name, value in zip(ensemble.members, ensemble.temperatures, strict=True)
        if name in content.table.models
    )
    stacker = f" Stacker: {escape(content.stacker.model.summary())}." if content.stacker else ""
    title = escape(content.stacker.model.title) if content.stacker else ""
    measure = escape(content.importance[0]) if content.importance else ""
    return (
        f"<h2>Ensemble</h2><p>{rule} {thresholds} Logits are divided by a temperature first "
        f"({escape(temperatures)}).{stacker}</p>"
        + picture("weights", "Weight of each member in the mean of probabilities.")
        + picture("importance", f"The 20 most important columns of the {title} stacker, by {measure}.")
        + picture(
            "shap",
            f"Contributions of columns to the scores of the {title} stacker (SHAP values), one dot per lesion: right "
            "of the line for the diagnosis, left against it. Red: the column’s value is high, blue: low, gray: "
            "missing.",
        )
        + picture("shap_by_diagnosis", "Mean absolute contribution of each column to each diagnosis.")
    )


def _method(content: Content) -> str:
    sets = escape(", ".join(extra_sets(content.folder, content.networks)))
    joined = f"<li>Lesions of other sets joined the training: {sets}. No figure counts them.</li>" if sets else ""
    held_out, tested = content.transforms
    return (
        "<h2>Method and limits</h2><ul>"
        "<li>Intervals are 95% intervals over lesions, or over groups where lesions share one. F1: Beta quantiles of "
        "each diagnosis, combined for macro F1; differences and other metrics: percentiles over "
        f"{content.resamples:,} bootstrap resamples. The trained networks are fixed: training with another seed "
        "changes the score as well.</li>"
        "<li>The stacker of a fold was fitted without that fold’s labels, but on outputs of networks that were "
        "trained on them: the usual second-order leak of stacking.</li>"
        "<li>Test lesions are predicted by the mean of the networks of all folds, each averaged over "
        f"{tested} test-time {_plural('transform', tested)}; out-of-fold lesions by one network, averaged over "
        f"{held_out}. Temperatures, stacker, thresholds and the estimate are from the latter.</li>"
        f"{joined}<li>Not a medical device.</li></ul>"
    )


def _settings(content: Content) -> str:
    if not content.settings:
        return ""
    return (
        "<h2>Settings</h2><details><summary>Resolved config.yaml</summary>"
        f"<pre>{escape(content.settings)}</pre></details>"
    )


def _measure(content: Content) -> str:
    """Return what the run's macro F1 counts as predicted, as HTML."""
    return "official metric" if content.task.submission else MEASURES[content.task.decision]


def _fitted_parts(content: Content) -> str:
    """Name what is fitted on the out-of-fold lesions."""
    return (
        "temperatures, weights and stacker"
        if content.task.decision == "argmax"
        else ("thresholds, weights and stacker")
    )


def _number(value: float | None) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.3f}"


def _range(interval: Interval) -> str:
    return f"{_number(interval.low)} to {_number(interval.high)}"


def _signed(interval: Interval) -> str:
    return f"{interval.low:+.3f} to {interval.high:+.3f}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"
