"""Lesions whose label is probably wrong."""

from __future__ import annotations

from collections.abc import Sequence

from triderm_dist.ensemble.score_table import FINAL_MODEL
from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Row, Section, Share, Table
from triderm_dist.report.gallery import gallery_of
from triderm_dist.report.lesion_lists import PICTURED_LESIONS, DoubtfulLesion

SUSPECTS, AGREED, ESTIMATED = f"found by the {FINAL_MODEL}", "and by every network", "estimated by the joint"


def label_errors(content: Content) -> Section:
    """Return the lesions that confident learning and all networks find mislabeled."""
    found, agreed, lesions = content.lesion_lists.label_errors, content.lesion_lists.agreed_errors, len(content.labels)
    counts = [
        Row(SUSPECTS, (Share(len(found.suspects), lesions),)),
        Row(AGREED, (Share(int(agreed.sum()), lesions),)),
        Row(ESTIMATED, (Share(round(found.share * lesions), lesions),)),
    ]
    shown = content.lesion_lists.mislabeled
    return Section(
        "Probable label errors",
        "label_errors.html",
        tables=[
            Table("label_error_counts", "Labels that are probably wrong", [Column("lesions", "lesions")], counts),
            doubtful_lesions("label_errors", "Probable label errors", shown, len(content.networks), "alternative"),
        ],
        values={
            "gallery": gallery_of(content, shown[:PICTURED_LESIONS]),
            "listed": len(shown),
            "suspects": SUSPECTS,
            "agreed": AGREED,
            "estimated": ESTIMATED,
        },
    )


def doubtful_lesions(
    name: str, caption: str, lesions: Sequence[DoubtfulLesion], networks: int, alternative: str
) -> Table:
    """Return a table of lesions.  alternative: the title of the other diagnosis."""
    columns = [
        Column("label", "label"),
        Column("label_probability", "its probability", ".2%"),
        Column("alternative", alternative),
        Column("alternative_probability", "its probability", ".0%"),
        Column("agree", f"networks that agree, of {networks}"),
        Column("predicted", "predicted"),
    ]
    rows = [
        Row(
            lesion.lesion_id,
            (
                lesion.label,
                lesion.label_probability,
                lesion.alternative,
                lesion.alternative_probability,
                lesion.agree,
                lesion.predicted,
            ),
        )
        for lesion in lesions
    ]
    return Table(name, caption, columns, rows, head="lesion")
