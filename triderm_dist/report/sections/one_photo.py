"""What a lesion with one photo loses."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Row, Section, Table


def one_photo(content: Content) -> Section | None:
    """Return the scores of each network with one photo hidden; None where no fold was predicted so."""
    if not content.missing_views:
        return None
    rows = [
        Row(f"{part.model} without the {part.view} photo", (part.difference, part.macro_f1))
        for part in content.missing_views
    ]
    columns = [Column("difference", "minus with both photos", "+.3f"), Column("macro_f1", "macro F1")]
    note = (
        "Argmax, out of fold: every lesion predicted again by the same networks with one photo and its concept scores "
        "hidden. A network replaces the missing photo by learned tokens."
    )
    table = Table("one_photo", "Macro F1 with one photo hidden, with 95% intervals", columns, rows, "network")
    return Section("Lesions with one photo", tables=[table], values={"note": note})
