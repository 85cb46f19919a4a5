"""Lesions whose label has the smallest probability."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Section
from triderm_dist.report.gallery import gallery_of
from triderm_dist.report.lesion_lists import PICTURED_LESIONS
from triderm_dist.report.sections.label_errors import doubtful_lesions


def hardest(content: Content) -> Section:
    """Return the hardest lesions."""
    lesions = content.lesion_lists.hardest
    table = doubtful_lesions("hardest", "Hardest lesions", lesions, len(content.networks), "most probable")
    gallery = gallery_of(content, lesions[:PICTURED_LESIONS])
    return Section("Hardest lesions", "hardest.html", tables=[table], values={"gallery": gallery})
