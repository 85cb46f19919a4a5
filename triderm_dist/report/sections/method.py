"""How the figures were obtained, and their limits."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Section
from triderm_dist.report.extra_sets import extra_sets
from triderm_dist.runtime.terminal import counted


def method(content: Content) -> Section:
    """Return the notes on intervals, stacking and test-time transforms."""
    held_out, tested = content.transforms
    values = {
        "resamples": content.resamples,
        "tested": counted(tested, "test-time transform"),
        "held_out": held_out,
        "extra_sets": extra_sets(content.folder, content.networks),
    }
    return Section("Method and limits", "method.html", values=values)
