"""Malignant against benign lesions."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Row, Section, Share, Table
from triderm_dist.runtime.terminal import counted


def malignancy(content: Content) -> Section | None:
    """Return rates and counts of malignant against benign; None unless the labels hold both kinds."""
    found = content.discrimination
    target = found.malignancy
    if target is None:
        return None
    names = {
        kind: ", ".join(each.name for each in content.task.diagnoses if each.malignant is kind)
        for kind in (True, False)
    }
    lesions = {kind: int((target.positive == kind).sum()) for kind in (True, False)}
    called = {kind: int(target.decided[target.positive == kind].sum()) for kind in (True, False)}
    counts = [
        Row(f"{name} lesions", (Share(called[kind], lesions[kind]), Share(lesions[kind] - called[kind], lesions[kind])))
        for name, kind in (("malignant", True), ("benign", False))
    ]
    rates = target.rates
    rows = [
        Row("Sensitivity", (rates.sensitivity,), note="malignant lesions with a malignant decision"),
        Row("Specificity", (rates.specificity,), note="benign lesions without a malignant decision"),
        Row("PPV", (rates.positive_predictive_value,), note="lesions with a malignant decision that are malignant"),
        Row("NPV", (rates.negative_predictive_value,), note="lesions without a malignant decision that are benign"),
        Row("AUC", (target.area_under_roc,), note="area under the ROC curve of the malignant share of the probability"),
        Row("Average precision", (target.average_precision,), note="of that share"),
    ]
    unknown = found.unknown_kind
    left_out = f" {counted(unknown, 'lesion')} with another diagnosis left out." if unknown else ""
    note = (
        f"Out of fold, nested. Malignant: {names[True]}; benign: {names[False]}.{left_out} The decisions are those for "
        "macro F1; they weigh a missed malignant lesion no more than a false alarm."
    )
    columns = [Column("malignant", "malignant decision"), Column("not_malignant", "no malignant decision")]
    return Section(
        "Malignant against benign",
        tables=[
            Table("malignancy", "Malignant against benign, with 95% intervals", [Column("nested", "nested")], rows,
                  "metric"),
            Table("malignancy_counts", "Lesions by decision", columns, counts, "lesions"),
        ],
        values={"note": note},
    )  # fmt: skip
