"""Methods and results as text to paste into a paper, and the works to cite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from triderm_dist.ensemble.run_files import STACKER
from triderm_dist.intervals import Interval
from triderm_dist.report.content import Content
from triderm_dist.report.elements import Section, Table
from triderm_dist.report.extra_sets import extra_sets
from triderm_dist.report.manuscript import network_sentences
from triderm_dist.report.references import bibliography, used_works
from triderm_dist.report.sections.cohort import cohort
from triderm_dist.report.sections.ensemble import ensemble
from triderm_dist.report.sections.head import HELD_OUT, NESTED, head
from triderm_dist.report.sections.malignancy import malignancy
from triderm_dist.report.sections.metrics import metrics
from triderm_dist.report.sections.missing_inputs import missing_inputs
from triderm_dist.report.sections.operating_points import operating_points
from triderm_dist.report.sections.run import run
from triderm_dist.report.sections.slices import slices
from triderm_dist.report.wording import decision_rule, fitted_out_of_fold, predicts_alone, scored_decision

QUOTED: tuple[Callable[[Content], Section | None], ...] = (
    *(head, run, cohort, metrics, malignancy, operating_points, slices, missing_inputs, ensemble),
)
"""The sections whose tables the text quotes."""


def manuscript(content: Content) -> Section:
    """Return the text; each of its numbers is a cell of a table, or a setting of the run."""
    sections = [section for build in QUOTED if (section := build(content)) is not None]
    tables: dict[str, Table] = {table.name: table for section in sections for table in section.tables}
    experiment, task = content.experiment, content.task
    flow = tables["flow"]
    beyond = next((section.values["beyond"] for section in sections if "beyond" in section.values), None)
    values = {
        "quoted": tables,
        "title": content.title,
        "diagnoses": len(task.diagnoses),
        "folds": int(content.fit["folds"]),
        "grouped": task.columns.group if len(np.unique(content.table.groups)) < len(content.labels) else None,
        "dropped": [row.name for row in flow.rows if not row.lead],
        "nested": NESTED,
        "held_out": HELD_OUT if content.held_out else "",
        "networks": network_sentences(experiment, content.networks, task) if experiment else [],
        "stacker": content.stacker.model.title if content.stacker and STACKER in content.ensemble.members else "",
        "stacker_inputs": [
            "logits of the networks",
            *(["concept scores"] if content.table.concept_names else []),
            *(["metadata"] if task.fields else []),
        ],
        "members": len(content.ensemble.members),
        "alone": predicts_alone(content),
        "extra_sets": extra_sets(content.folder, content.networks),
        "transforms": content.transforms,
        "rule": decision_rule(content),
        "measure": scored_decision(content),
        "fitted_parts": fitted_out_of_fold(content),
        "resamples": content.resamples,
        "synthetic": content.synthetic,
        "medians": [(row.group, row.name) for row in tables["cohort"].rows if isinstance(row.values[0], Interval)],
        "beyond": beyond,
        "judged": next((section.values["judged"] for section in sections if "judged" in section.values), 0),
        "packages": sorted(content.provenance.packages.items()),
        "bibliography": bibliography(used_works(experiment, content.networks), "" if content.synthetic else task.name),
    }
    return Section("Text for a paper", "manuscript.html", values=values)
