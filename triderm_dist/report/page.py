"""The page itself: what it says of a run, section by section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from triderm_dist.files import write_text
from triderm_dist.metrics import Interval
from triderm_dist.report.content import FALLS_BEHIND, LEAST_IN_SLICE, OTHERS, SMALL_SLICE, Content, Hard
from triderm_dist.report.figures import draw
from triderm_dist.report.html import card, data_table, document, figure
from triderm_dist.schema import DIAGNOSIS_NAMES, METADATA_FIELDS

MOST_MISLABELED = 30


def write_report(run_folder: Path) -> Path:
    """Write RUN/report.html and its pictures RUN/report/*.png from what triderm stack left; the page is whole "
    "or not there.

    Raises DataError where ensemble.json, ensemble_oof.parquet or oof.parquet is missing.
    """
    run_folder = Path(run_folder)
    content = Content(run_folder)
    words = draw(content, run_folder / "report")
    path = run_folder / "report.html"
    write_text(path, _page(content, words, run_folder / "report"))
    return path


def _page(content: Content, words: dict[str, str], folder: Path) -> str:
    def picture(name: str, caption: str) -> str:
        if name not in words:
            return ""
        return figure(folder / f"{name}.png", words[name], caption)

    sections = [
        _head(content),
        _ways(content),
        _others(content),
        _diagnoses(content),
        "<h2>What is taken for what</h2>"
        + picture(
            "confusion",
            "Percent of the lesions of each diagnosis. Each diagnosis is claimed on its own, as the challenge scores "
            "it, so that a row can add up to more than 100; “none”: no diagnosis was claimed.",
        ),
        "<h2>Precision, recall, reliability</h2>"
        + picture(
            "precision_recall",
            "Number beside the name: average precision. Dot: where the thresholds cut. Dashed: a guess at random.",
        )
        + picture(
            "reliability",
            "On the dashed line, probabilities can be read as they stand. Larger dots hold more lesions; bars: 95%.",
        ),
        _slices(content),
        _one_photo(content),
        _hard(content),
        _inside(content, picture),
        "<h2>Learning curves</h2>" + picture("learning_curves", "One line a fold.") if content.curves else "",
        _method(content),
        _settings(content),
    ]
    body = "\n".join(section for section in sections if section)
    return document(content.name, body)


def _head(content: Content) -> str:
    folds, models = content.about["folds"], len(content.table.models)
    cards = [
        card(
            "Macro F1 out of fold, official rule, nested",
            f"{content.score.value:.3f}",
            f"95% interval {_range(content.score)} · {len(content.labels):,} lesions",
        )
    ]
    if held := content.held_out:
        low, high = held["interval"]
        cards.append(
            card(
                "Macro F1 on held-out lesions, official rule",
                f"{held['macro_f1']:.3f}",
                f"95% interval {low:.3f} to {high:.3f} · {held['n']:,} lesions"
                + (f" · without {', '.join(held['absent'])}, which none has" if held["absent"] else ""),
            )
        )
    banner = (
        '<p class="banner"><strong>SYNTHETIC data.</strong> Every picture and label was drawn by a program. '
        "The figures show that the tools work; they say nothing about real skin.</p>"
        if content.synthetic
        else ""
    )
    return (
        f"<header><h1>Skin-lesion diagnosis: {escape(content.name)}</h1>"
        f"<p class=quiet>{models} {_plural('model', models)} · {folds} folds · "
        f"{len(content.diagnoses)} diagnoses · triderm-dist</p></header>{banner}"
        f'<div class="cards">{"".join(cards)}</div>'
        "<p>The score is the plain mean of the F1 of all diagnoses, each claimed where its probability passes its "
        "threshold. Every lesion was judged by networks that were not trained on it, with thresholds, weights and "
        "stacker fitted on the other folds.</p>"
    )


def _ways(content: Content) -> str:
    rows = []
    for name, score in content.about["scores"].items():
        nested, difference = Interval(**score["nested"]), Interval(**score["chosen_minus_this"])
        cells = [_number(score[key]) for key in ("official", "argmax", "argmax_tau")]
        cells += [f"<strong>{nested.value:.3f}</strong>", _range(nested)]
        cells += ["" if name == "ensemble" else _signed(difference)]
        cells += [_number(score["fitted"])]
        rows.append((name, cells, "lead" if name == "ensemble" else ""))
    header = (
        "", "cut at 0.5", "argmax", "argmax, tau", "nested", "95% interval", "ensemble less this, 95%", "fitted "
        "(too high)",
    )  # fmt: skip
    notes = "".join(f"<li>{escape(note[0].upper() + note[1:])}.</li>" for note in content.about["notes"])
    return (
        "<h2>What each stage added</h2>"
        + data_table(header, rows, "Scores of members and ensemble")
        + '<p class="note">Macro F1. Cut at 0.5: nothing fitted. Argmax: only the likeliest diagnosis is claimed; with '
        "tau, after logit adjustment fitted on the other folds. Nested: thresholds, weights and stacker fitted "
        "on the other folds. "
        "Fitted: thresholds judged on the lesions they were fitted on, shown only to tell how much that flatters.</p>"
        f"<ul>{notes}</ul>{_pairs(content)}"
    )


def _pairs(content: Content) -> str:
    """What members differ by, each pair on the same lesions."""
    rows = []
    for pair in content.about["pairs"]:
        difference = Interval(**pair["difference"])
        beyond = difference.low > 0 or difference.high < 0
        said = '<span class="flag">beyond the noise</span>' if beyond else '<span class="quiet">within the noise</span>'
        cells = [f"{difference.value:+.3f}", _signed(difference), said]
        rows.append((f"{pair['first']} less {pair['second']}", cells, ""))
    if not rows:
        return ""
    table = data_table(("", "nested macro F1", "95% interval", ""), rows, "Differences between members")
    return f"<details><summary>differences between members, on the same lesions</summary>{table}</details>"


def _others(content: Content) -> str:
    if content.synthetic:
        return (
            "<h2>Next to what others reached</h2><p>Nothing to compare: the data are synthetic, and published "
            "figures are "
            "of real lesions.</p>"
        )
    rows = [("this run", [f"{content.score.value:.3f} nested", "not submitted"], "lead")]
    rows += [(who, [own, official], "") for who, own, official in OTHERS]
    return (
        "<h2>Next to what others reached</h2>"
        + data_table(("", "own validation", "official test"), rows, "What others reached", long_names=True)
        + '<p class="note">What others say of themselves on MILK10k, macro F1, each on its own split or on the '
        "hidden test set: not the "
        "same lesions as here. Official scores fell 0.02 to 0.06 below validation; noise on the 479 test "
        "lesions is about 0.04.</p>"
    )


def _diagnoses(content: Content) -> str:
    counts, rows = content.counts, []
    for index, name in enumerate(content.diagnoses):
        f1 = content.class_intervals[index]
        bar = f'<span class="bar" aria-hidden="true"><i style="width:{100 * np.nan_to_num(f1.value):.0f}%"></i></span>'
        cells = [
            f"{counts.positives[index]:,}",
            f"{bar}&ensp;{_number(f1.value)}",
            _range(f1),
            _number(counts.precision[index]),
            _number(counts.recall[index]),
            f"{counts.predicted[index]:,}",
            f"{content.fitted.thresholds[index]:.3f}",
        ]
        label = f"{name} <span class='quiet'>{escape(DIAGNOSIS_NAMES.get(name, ''))}</span>"
        rows.append((label, cells, ""))
    header = ("", "lesions", "F1", "95% interval", "precision", "recall", "claimed", "threshold")
    return (
        "<h2>Each diagnosis</h2>"
        + data_table(header, rows, "Each diagnosis", escaped=True, long_names=True)
        + '<p class="note">Out of fold, nested. Thresholds: those of the final fit on all lesions, mapped onto '
        "0.5 in the submission. "
        "With few lesions the interval is what counts, not the figure.</p>"
    )


def _slices(content: Content) -> str:
    rows: list[tuple[str, Sequence[str], str]] = []
    field = ""
    for part in content.slices:
        if part.field != field:
            field = part.field
            about = METADATA_FIELDS[field]
            rows.append((escape(f"{about.label} ({about.unit})" if about.unit else about.label), [], "group"))
        f1 = f"{part.macro_f1.value:.3f}" if part.macro_f1 else "–"
        around = _range(part.macro_f1) if part.macro_f1 else ""
        behind = f"{part.behind.value:+.3f}" if part.behind else "–"
        behind_range = _signed(part.behind) if part.behind else ""
        kind = "flag" if part.warning == FALLS_BEHIND else "quiet"
        flag = f'<span class="{kind}">{part.warning}</span>' if part.warning else ""
        rows.append(
            (escape(part.value.replace("_", " ")), [f"{part.lesions:,}", flag, behind, behind_range, f1, around], "")
        )
    header = ("", "lesions", "", "mean recall less the rest's", "95% interval", "macro F1", "95% interval")
    lagging = [
        f"{METADATA_FIELDS[part.field].label} {part.value}".replace("_", " ")
        for part in content.slices
        if part.warning == FALLS_BEHIND
    ]
    said = (
        '<p class="banner"><strong>Fewer lesions are found than among the others, diagnosis by diagnosis:</strong> '
        f"{escape(', '.join(lagging))}.</p>"
        if lagging
        else "<p>No slice that is large enough to tell falls significantly behind the other lesions.</p>"
    )
    return (
        "<h2>Who it works for</h2>"
        + said
        + data_table(header, rows, "Slices of the lesions", escaped=True)
        + f'<p class="note">Only diagnoses with at least {LEAST_IN_SLICE} lesions inside and outside a slice '
        f"count, so that macro F1 is "
        "not comparable between slices; the difference in mean recall is (the same diagnoses on both sides). "
        "Too small to tell: under "
        f"{SMALL_SLICE} lesions. About one difference in twenty lies outside its interval by chance alone.</p>"
    )


def _one_photo(content: Content) -> str:
    if not content.one_photo:
        return ""
    rows = [
        (
            f"{part.model} without the {part.missing} photo",
            [f"{part.macro_f1:.3f}", f"{part.difference.value:+.3f}", _signed(part.difference)],
            "",
        )
        for part in content.one_photo
    ]
    return (
        "<h2>Lesions with one photo</h2>"
        + data_table(
            ("", "macro F1", "minus with both photos", "95% interval"), rows, "Without a photo", long_names=True
        )
        + '<p class="note">Argmax, out of fold: every lesion judged again by the same networks with one photo and its '
        "concept scores hidden. A network stands in learned tokens for what is missing.</p>"
    )


def _hard(content: Content) -> str:
    networks = len(content.networks)

    def table(lesions: Sequence[Hard], believed: str, label: str) -> str:
        rows = [
            (
                hard.lesion_id,
                [hard.label, f"{100 * hard.of_label:.2f}%", hard.believed, f"{100 * hard.of_believed:.0f}%",
                 f"{hard.agree} of {networks}", hard.claimed],
                "",
            )
            for hard in lesions
        ]  # fmt: skip
        header = ("lesion", "labeled", "its probability", believed, "its probability", "networks agree", "claimed")
        return data_table(header, rows, label)

    wrong, shown = content.mislabeled, content.mislabeled[:MOST_MISLABELED]
    count = f"{len(wrong):,} {_plural('lesion', len(wrong))} ({100 * len(wrong) / len(content.labels):.1f}%)"
    likely = (
        f"<p>{count} look to every network like another diagnosis, as surely as lesions of that one do on average, "
        "and less like their own than its lesions do (confident learning). That is a reason to look at the photos "
        "again, not a verdict: what the networks have not learnt shows up here as well.</p>"
        f"<details><summary>the {len(shown)} likeliest</summary>"
        f"{table(shown, 'looks like', 'Likely mislabeled lesions')}</details>"
        if wrong
        else "<p>None: no lesion looks like another diagnosis as surely as that one's own lesions do.</p>"
    )
    return (
        f"<h2>Likely mislabeled</h2>{likely}<h2>Hardest lesions</h2><p>The diagnosis on file is what the ensemble "
        "thinks least likely.</p>"
        f"<details><summary>{len(content.hardest)} lesions</summary>"
        f"{table(content.hardest, 'likeliest', 'Hardest lesions')}</details>"
    )


def _inside(content: Content, picture: Callable[[str, str], str]) -> str:
    rule = {
        "any": "A diagnosis is claimed where its probability is above its threshold.",
        "at_least_one": "A diagnosis is claimed where its probability is above its threshold; where none is, the one "
        "that comes nearest is claimed.",
        "nearest": "The diagnosis that is largest in proportion to its threshold is claimed, and no other.",
    }[content.fitted.rule]
    shrinkage = (
        f"Thresholds are the share of each diagnosis to the power {content.fitted.tau:g}: logit adjustment, "
        "logits − tau · log(prior)."
        if content.fitted.tau is not None
        else f"Thresholds of rare diagnoses are pulled to a pooled cut with the weight of "
        f"{content.fitted.shrinkage:g} positives."
        if content.fitted.shrinkage
        else "Thresholds are means over resampled lesions, not pulled to a pooled cut."
    )
    temperatures = ", ".join(
        f"{name} {value:.2f}"
        for name, value in zip(content.fitted.members, content.fitted.temperatures, strict=True)
        if name in content.table.models
    )
    stack = (
        f" The stacker has {content.about['rounds']} rounds and ran on {content.about['device']}."
        if content.importance
        else ""
    )
    return (
        f"<h2>Inside the ensemble</h2><p>{rule} {shrinkage} Logits are divided by a temperature first "
        f"({escape(temperatures)}).{stack}</p>"
        + picture("weights", "Share of each member in the mean of probabilities.")
        + picture("importance", "What the XGBoost stage builds on: total gain of its 20 strongest columns.")
        + picture(
            "shap",
            "SHAP values of the XGBoost stage, a dot a lesion: right of the line the column spoke for the diagnosis, "
            "left against it. Red: the column’s value is high, blue: low, gray: missing.",
        )
        + picture("shap_by_diagnosis", "How much each column moves each diagnosis, whichever way.")
    )


def _method(content: Content) -> str:
    return (
        "<h2>How to read the figures</h2><ul>"
        "<li>Intervals are 95% percentiles over "
        f"{content.resamples:,} resamples of the lesions, stratified by diagnosis. They hold the trained "
        f"networks fixed: training again "
        "with another seed moves the score as well.</li>"
        "<li>The stacker of a fold was fitted without that fold’s labels, but on outputs of networks that had "
        "trained on them: the usual "
        "second-order leak of stacking.</li>"
        "<li>Test lesions are predicted by the mean of all folds’ networks, each over several transforms of the "
        "photos; out-of-fold lesions by one network, as they are. Temperatures and thresholds were fitted on the "
        "latter.</li>"
        "<li>Not a medical device.</li></ul>"
    )


def _settings(content: Content) -> str:
    if not content.settings:
        return ""
    return (
        "<h2>Settings</h2><details><summary>config.yaml, as resolved</summary>"
        f"<pre>{escape(content.settings)}</pre></details>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.3f}"


def _range(interval: Interval) -> str:
    return f"{_number(interval.low)} to {_number(interval.high)}"


def _signed(interval: Interval) -> str:
    return f"{interval.low:+.3f} to {interval.high:+.3f}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"
