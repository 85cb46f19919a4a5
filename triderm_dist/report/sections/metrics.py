"""Every metric of the final model, and how far macro F1 differs between test sets and folds."""

from __future__ import annotations

import numpy as np

from triderm_dist.ensemble.score_table import FINAL_MODEL
from triderm_dist.metrics import METRICS
from triderm_dist.report.content import MIN_COMMON_LESIONS, Content
from triderm_dist.report.elements import Column, Row, Section, Table
from triderm_dist.report.wording import scored_decision


def metrics(content: Content) -> Section:
    """Return the table of metrics and that of the spread."""
    rows = [Row(f"Macro F1, {scored_decision(content)}", (content.score,), lead=True)]
    if content.common_score:
        rows.append(Row(f"Macro F1, diagnoses with at least {MIN_COMMON_LESIONS} lesions", (content.common_score,)))
    # The recall of decisions by argmax is the balanced accuracy.
    left_out = {"mean_recall"} if content.task.decision == "argmax" else set()
    rows += [
        Row(METRICS[name].title, (value,)) for name, value in content.metric_values.items() if name not in left_out
    ]
    lesions, spread = content.test_set
    folds = content.fold_scores
    deviation = float(np.std(folds, ddof=1))
    spreads = [
        Row("test sets of this size", (spread.low, spread.high, lesions, None)),
        Row("folds of this run", (min(folds), max(folds), len(content.labels) // len(folds), deviation)),
    ]
    columns = [Column("low", "from"), Column("high", "to"), Column("lesions", "lesions in each")]
    columns.append(Column("deviation", "standard deviation"))
    caption = f"Metrics of the {FINAL_MODEL}, with 95% intervals"
    return Section(
        "Metrics",
        "metrics.html",
        tables=[
            Table("metrics", caption, [Column("nested", "nested")], rows, "metric"),
            Table("spread", "Macro F1 of smaller sets of such lesions", columns, spreads, "sets"),
            _folds(content),
        ],
    )


def _folds(content: Content) -> Table:
    """Return the macro F1 of each fold."""
    numbers, lesions = np.unique(content.rows.folds, return_counts=True)
    networks = content.fold_scores_of_networks
    columns = [Column("ensemble", f"{FINAL_MODEL}, nested"), Column("lesions", "lesions")]
    columns += [Column(name, f"{name}, argmax") for name in networks]
    rows = [
        Row(
            f"fold {number}", (content.fold_scores[at], int(lesions[at]), *(scores[at] for scores in networks.values()))
        )
        for at, number in enumerate(numbers)
    ]
    return Table("folds", "Macro F1 of the lesions of each fold", columns, rows, "fold", emphasis=True)
