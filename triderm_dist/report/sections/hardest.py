"""Lesions whose label has the smallest probability."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Section
from triderm_dist.report.sections.label_errors import doubtful_lesions


def hardest(content: Content) -> Section:
    """Return the hardest lesions."""
    table = doubtful_lesions("hardest", "Hardest lesions", content.hardest, len(content.networks), "most probable")
    return Section("Hardest lesions", "hardest.html", tables=[table])
