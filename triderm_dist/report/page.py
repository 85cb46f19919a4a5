"""Write the report of a run: its sections, one after the other."""

from __future__ import annotations

from pathlib import Path

from triderm_dist.files import PATIENT_DATA
from triderm_dist.report.content import Attend, Content
from triderm_dist.report.elements import Section
from triderm_dist.report.render import write_page
from triderm_dist.report.sections import SECTIONS
from triderm_dist.schema import ConfigError


def write_report(
    run_folder: Path, output: Path | None = None, photos: bool = True, attend: Attend | None = None
) -> Path:
    """Write report.html, and its figures and tables into report/, from the files that triderm stack wrote.

    output: folder for them; None writes into the run.  photos: whether the page shows photos of lesions.  attend:
    returns attention maps to be shown beside them. Returns the path of the page. Raises DataError where ensemble.json,
    ensemble_oof.parquet or oof.parquet is missing.
    """
    folder = Path(output or run_folder)
    content = Content(run_folder, photos, attend)
    return write_page(folder / "report.html", folder / "report", content.name, sections_of(content), PATIENT_DATA)


def sections_of(content: Content) -> list[Section]:
    """Return the sections that have something to show. Raises ConfigError for an entry of a plugin that builds none."""
    sections = []
    for build in SECTIONS:
        if not callable(build):
            raise ConfigError(f"SECTIONS holds a {type(build).__name__}, not a function that returns a Section")
        if (section := build(content)) is None:
            continue
        if not isinstance(section, Section):
            name = getattr(build, "__name__", type(build).__name__)
            raise ConfigError(f"{name} of SECTIONS returned a {type(section).__name__}, not a Section or None")
        sections.append(section)
    return sections
