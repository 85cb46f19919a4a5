"""Columns of the challenge's tables."""

from __future__ import annotations

from triderm_dist.schema import VIEWS

CONCEPT_PREFIX = "MONET_"
MONET_COLUMNS: tuple[str, ...] = (
    "MONET_ulceration_crust",
    "MONET_hair",
    "MONET_vasculature_vessels",
    "MONET_erythema",
    "MONET_pigmented",
    "MONET_gel_water_drop_fluid_dermoscopy_liquid",
    "MONET_skin_markings_pen_ink_purple_pen",
)
"""Concept scores that the challenge publishes for each photo, hence once per view of a lesion."""
CONCEPTS: tuple[str, ...] = tuple(
    f"{view}/{column.removeprefix(CONCEPT_PREFIX)}" for view in VIEWS for column in MONET_COLUMNS
)
"""Names of the challenge's concepts."""
GROUP_COLUMN = "patient_id"
UNUSED_COLUMNS = {"attribution", "copyright_license", "image_manipulation"}
"""Columns of the official metadata that are left out without a note."""
