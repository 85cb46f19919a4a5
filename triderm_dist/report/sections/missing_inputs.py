"""What each input is worth: the scores of the networks with one of them hidden."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Flag, Row, Section, Table

WORSE, NO_WORSE = "needed", "no difference beyond the noise"


def missing_inputs(content: Content) -> Section | None:
    """Return the scores of each network with one input hidden; None where no fold was predicted so."""
    if not content.missing_inputs:
        return None
    rows = [
        Row(
            f"without {input_title(content, part.name)}",
            (part.difference, _verdict(part.difference.low, part.difference.high), part.macro_f1),
            group=part.model,
        )
        for part in content.missing_inputs
    ]
    columns = [
        Column("difference", "minus with all inputs", "+.3f"),
        Column("verdict", "verdict"),
        Column("macro_f1", "macro F1"),
    ]
    table = Table("missing_inputs", "Macro F1 with one input hidden, with 95% intervals", columns, rows, "network")
    expected = {"concepts": bool(content.table.concept_names), "metadata": bool(content.task.fields)}
    tried = {part.name for part in content.missing_inputs}
    values = {"not_tried": [name for name, has in expected.items() if has and name not in tried]}
    return Section("What each input is worth", "missing_inputs.html", tables=[table], values=values)


def input_title(content: Content, name: str) -> str:
    """Return the words for a view, `concepts` or `metadata`."""
    if name in ("concepts", "metadata"):
        return {"concepts": "concept scores", "metadata": "metadata"}[name]
    return f"the {next(view.label for view in content.task.views if view.name == name)} photo"


def _verdict(low: float, high: float) -> Flag:
    if high < 0:
        return Flag(WORSE)
    return Flag("better without it") if low > 0 else Flag(NO_WORSE, strong=False)
