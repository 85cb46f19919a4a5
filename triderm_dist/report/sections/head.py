"""The top of the page: what was run, the main figures, and what they mean."""

from __future__ import annotations

from triderm_dist.ensemble.run_files import ENSEMBLE, in_training
from triderm_dist.intervals import Interval
from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Row, Section, Table
from triderm_dist.report.wording import decision_rule, fitted_out_of_fold, scored_decision
from triderm_dist.runtime.messages import joined
from triderm_dist.runtime.terminal import counted

NESTED, HELD_OUT = "out of fold, nested", "held-out test set"


def head(content: Content) -> Section:
    """Return the section without a title that opens the page."""
    decided = scored_decision(content)
    rows = [Row(NESTED, (content.score, len(content.labels)))]
    absent: list[str] = []
    if held := content.held_out:
        rows.append(Row(HELD_OUT, (Interval(held["macro_f1"], *held["interval"]), held["n"])))
        absent = held["absent"]
    best = max((row for row in content.scores if row.name != ENSEMBLE), key=lambda row: row.nested.value)
    models, folds = len(content.table.models), content.fit["folds"]
    columns = [Column("macro_f1", f"macro F1, {decided}"), Column("lesions", "lesions")]
    return Section(
        title="",
        template="head.html",
        tables=[Table("main", "Main figures", columns, rows, head="lesions", emphasis=True)],
        values={
            "heading": content.title if content.title == content.name else f"{content.title}: {content.name}",
            "about": f"{counted(models, 'model')} · {folds} folds · {len(content.diagnoses)} diagnoses · triderm-dist",
            "networks": models,
            "folds": folds,
            "diagnoses": len(content.diagnoses),
            "inputs": _inputs(content),
            "synthetic": content.synthetic,
            "measure": decided,
            "nested": NESTED,
            "held_out": HELD_OUT if held else "",
            "absent": absent,
            "in_training": in_training(held["in_training"], held["n"]) if held and held.get("in_training") else "",
            "rule": decision_rule(content),
            "fitted_parts": fitted_out_of_fold(content),
            "best": best if best.nested.value > content.score.value else None,
        },
    )


def _inputs(content: Content) -> str:
    """Name what the networks read, as far as the task says."""
    views = [f"{view.label} photos" for view in content.task.views]
    concepts = ["concept scores"] if content.table.concept_names else []
    return joined([*views, *concepts, *(["metadata"] if content.task.fields else [])])
