"""Macro F1 of each member and weighting, and the differences between members."""

from __future__ import annotations

from triderm_dist import intervals
from triderm_dist.ensemble.run_files import ENSEMBLE
from triderm_dist.ensemble.score_table import COLUMNS, FINAL_MODEL, SHOWN
from triderm_dist.intervals import Interval
from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Flag, Row, Section, Table
from triderm_dist.report.wording import fitted_out_of_fold, scored_decision

COLUMN_NOTES = {
    "official": "p > 0.5: nothing fitted.",
    "argmax": "Argmax: only the most probable diagnosis is predicted.",
    "argmax_tau": "Argmax, tau: the same after logit adjustment with tau fitted on the other folds.",
    "fitted": "Fitted: thresholds fitted on the same lesions, which biases the score upward; for comparison only.",
}
"""Notes under the score table, by column."""

TITLES = COLUMNS | {"ensemble_minus_this": f"{FINAL_MODEL} minus this"}


def scores(content: Content) -> Section:
    """Return the score table, and the paired differences between members."""
    shown = ["nested", *(key for key in SHOWN[content.task.decision] if key not in ("nested", "interval"))]
    rows = [
        Row(
            row.title,
            [None if (row.name, key) == (ENSEMBLE, "ensemble_minus_this") else getattr(row, key) for key in shown],
            lead=row.name == ENSEMBLE,
        )
        for row in content.scores
    ]
    columns = [Column(key, TITLES[key], "+.3f" if key == "ensemble_minus_this" else "") for key in shown]
    main, fitted = scored_decision(content), fitted_out_of_fold(content)
    nested = f"Nested: the main figure ({main}), {fitted} fitted on the other folds."
    column_notes = COLUMN_NOTES | {"nested": nested}
    caption = f"Macro F1 of members and {FINAL_MODEL}, with 95% intervals"
    return Section(
        "Score of each stage",
        "scores.html",
        tables=[Table("scores", caption, columns, rows, head="stage", emphasis=True), *_pairs(content)],
        values={
            "column_notes": [column_notes[key] for key in shown if key in column_notes],
            "notes": [note[0].upper() + note[1:] for note in content.fit["notes"]],
        },
    )


def _pairs(content: Content) -> list[Table]:
    pairs = content.fit["pairs"]
    differences = [Interval(**pair["difference"]) for pair in pairs]
    rows = [
        Row(
            f"{pair['first']} minus {pair['second']}",
            (difference, Flag("beyond the noise") if beyond else Flag("within the noise", strong=False)),
        )
        for pair, difference, beyond in zip(pairs, differences, intervals.beyond_noise(differences), strict=True)
    ]
    columns = [Column("nested", "nested macro F1", "+.3f"), Column("verdict", "verdict")]
    caption = "Paired differences between members; verdicts are corrected for their number (Holm), intervals are not"
    return [Table("pairs", caption, columns, rows, head="members")] if rows else []
