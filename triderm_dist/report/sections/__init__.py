"""The sections of the report, in the order of the page.

A section is a module with a function of the same name that gets the `Content` and returns a `Section`, or None where
the run has nothing to show for it. What it computes belongs into `Content` or a module beside it, as functions of
arrays; the section only names tables, figures and sentences. To add one:

1. Write `sections/NAME.py`, and add its function to `SECTIONS`.
2. Without a template, the section is `values["text"]`, its tables and its figures (`templates/section.html`). For
   another order or more text, write `templates/NAME.html`: it starts with `{% import "macros.html" as ui %}` and uses
   `ui.table(tables.NAME)`, `ui.figure(figures.NAME)` and, for each number in a sentence, `ui.quote(tables.NAME, row,
   column)`, which writes the cell as the table shows it.

    def duration(content: Content) -> Section | None:
        hours = Column("hours", "hours", ".1f")
        rows = [Row(name, (value,)) for name, value in content.hours.items()]
        return Section("Duration", tables=[Table("duration", "Duration of each stage", [hours], rows, head="stage")])

Table: rows `Row(name, values, note="", lead=False, group="")` of raw values: numbers, text, `Interval`, `Share(part,
total)`, `Flag(text, strong)`, None; the column that matters comes first. Written as report/NAME.csv, too.
Figure: `Figure(name, draw, alt, caption, size)`; `draw(figure)` gets an empty matplotlib figure. Colors and widths are
those of `report.style`. Written as report/NAME.svg and .png, too. Names are unique on the page.
"""

from collections.abc import Callable

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Section
from triderm_dist.report.sections.calibration import calibration
from triderm_dist.report.sections.cohort import cohort
from triderm_dist.report.sections.confusion import confusion
from triderm_dist.report.sections.diagnoses import diagnoses
from triderm_dist.report.sections.ensemble import ensemble
from triderm_dist.report.sections.hardest import hardest
from triderm_dist.report.sections.head import head
from triderm_dist.report.sections.label_errors import label_errors
from triderm_dist.report.sections.learning_curve import learning_curve
from triderm_dist.report.sections.malignancy import malignancy
from triderm_dist.report.sections.manuscript import manuscript
from triderm_dist.report.sections.method import method
from triderm_dist.report.sections.metrics import metrics
from triderm_dist.report.sections.missing_inputs import missing_inputs
from triderm_dist.report.sections.net_benefit import net_benefit
from triderm_dist.report.sections.operating_points import operating_points
from triderm_dist.report.sections.prevalence import prevalence
from triderm_dist.report.sections.published import published
from triderm_dist.report.sections.run import run
from triderm_dist.report.sections.scores import scores
from triderm_dist.report.sections.settings import settings
from triderm_dist.report.sections.slices import slices
from triderm_dist.report.sections.training_curves import training_curves
from triderm_dist.report.sections.typical import typical

SECTIONS: list[Callable[[Content], Section | None]] = [
    head,
    run,
    cohort,
    scores,
    metrics,
    published,
    diagnoses,
    confusion,
    malignancy,
    operating_points,
    prevalence,
    net_benefit,
    calibration,
    slices,
    missing_inputs,
    label_errors,
    hardest,
    typical,
    ensemble,
    training_curves,
    learning_curve,
    method,
    manuscript,
    settings,
]
"""Plugins may insert more."""
