"""The settings of the run."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Section


def settings(content: Content) -> Section | None:
    """Return config.yaml without secrets; None where there is none."""
    if not content.settings:
        return None
    return Section("Settings", "settings.html", values={"settings": content.settings})
