"""How the figures were obtained, and their limits."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Section, plural
from triderm_dist.report.extra_sets import extra_sets


def method(content: Content) -> Section:
    """Return the notes on intervals, stacking and test-time transforms."""
    held_out, tested = content.transforms
    values = {
        "resamples": content.resamples,
        "tested": f"{tested} test-time {plural('transform', tested)}",
        "held_out": held_out,
        "extra_sets": extra_sets(content.folder, content.networks),
    }
    return Section("Method and limits", "method.html", values=values)
