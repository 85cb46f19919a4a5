"""Photos of the best and of the median lesion of each diagnosis."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Section
from triderm_dist.report.gallery import gallery_of
from triderm_dist.report.sections.label_errors import doubtful_lesions


def typical(content: Content) -> Section | None:
    """Return the lesions with their photos; None where the page shows no photos."""
    gallery = gallery_of(content, content.lesion_lists.typical)
    if not gallery.lesions:
        return None
    caption = "Best and median lesion of each diagnosis"
    table = doubtful_lesions("typical", caption, content.lesion_lists.typical, len(content.networks), "most probable")
    return Section("Typical lesions", "typical.html", tables=[table], values={"gallery": gallery})
