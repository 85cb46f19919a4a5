"""Write a self-contained page from sections, and beside it every figure as SVG and PNG and every table as CSV."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from triderm_dist.files import NEW_FILE, atomic_path, write_text
from triderm_dist.report.elements import Figure, Section, Table, interval_text, part_text, shown
from triderm_dist.report.style import STYLE, THEMED, register_colors
from triderm_dist.schema import ConfigError

TEMPLATES = Path(__file__).parent / "templates"
CONTENTS = "contents.csv"
"""Lists the files of figures and tables with their captions."""
LARGEST_SVG = 150_000
"""Bytes of an SVG that is embedded in the page, whose colors follow its theme; of larger figures, the page holds the
PNG if that is smaller.
"""


@dataclass(frozen=True)
class Picture:
    """A drawn figure: `view_box` and `svg`, the content of an SVG element, or else `png`, a data URI.

    width: in inches.
    """

    name: str
    alt: str
    caption: str
    width: float
    view_box: str = ""
    svg: str = ""
    png: str = ""


def write_page(page: Path, files: Path, title: str, sections: Sequence[Section], mode: int = NEW_FILE) -> Path:
    """Write the page, atomically, and its figures and tables into the folder `files`; return the path of the page.

    title: of the browser's window.  mode: of the files, see `files.py`. The same sections give the same bytes. Figures
    and tables of an earlier page that this one does not have are removed.
    """
    tables = [table for section in sections for table in section.tables]
    figures = [figure for section in sections for figure in section.figures]
    names = [*(table.name for table in tables), *(figure.name for figure in figures)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            f"two tables or figures of the report have the same name, {twice!r}; change that of the plugin"
        )
    files.mkdir(parents=True, exist_ok=True)
    pictures = _draw(figures, files, mode)
    for table in tables:
        write_text(files / f"{table.name}.csv", table.csv(), mode)
    _write_contents(files, tables, figures, mode)
    text = _environment().get_template("page.html").render(title=title, sections=_rendered(sections, pictures))
    write_text(page, text, mode)
    return page


def _rendered(sections: Sequence[Section], pictures: dict[str, Picture]) -> list[dict[str, str]]:
    environment, result = _environment(), []
    for section in sections:
        template = (
            environment.from_string(section.template.read_text(encoding="utf-8"))
            if isinstance(section.template, Path)
            else environment.get_template(section.template)
        )
        tables = {table.name: table for table in section.tables}
        figures = {figure.name: pictures[figure.name] for figure in section.figures}
        html = template.render(section=section, tables=tables, figures=figures, values=section.values, **section.values)
        result.append({"title": section.title, "id": _slug(section.title), "html": html})
    return result


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "shown": shown, "part_text": part_text, "interval_text": interval_text,
        "kind": lambda value: type(value).__name__,
    }  # fmt: skip
    return environment


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _draw(figures: Sequence[Figure], folder: Path, mode: int) -> dict[str, Picture]:
    """Draw every figure into FOLDER/NAME.svg and FOLDER/NAME.png."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    pictures = {}
    register_colors()
    with matplotlib.rc_context(STYLE):
        for figure in figures:
            canvas = Canvas(figsize=figure.size, layout="constrained")
            figure.draw(canvas)
            canvas.draw_without_rendering()
            canvas.set_layout_engine("none")  # laid out already: not once more for each file
            box = canvas.get_tightbbox().padded(matplotlib.rcParams["savefig.pad_inches"])
            paths = {kind: folder / f"{figure.name}.{kind}" for kind in ("svg", "png")}
            for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
                with atomic_path(paths[kind], mode) as temporary:
                    canvas.savefig(temporary, format=kind, metadata=metadata, bbox_inches=box)
            pictures[figure.name] = _picture(figure, paths["svg"], paths["png"])
    return pictures


def _picture(figure: Figure, svg: Path, png: Path) -> Picture:
    picture = Picture(figure.name, figure.alt, figure.caption, figure.size[0])
    data = base64.b64encode(png.read_bytes()).decode()
    if svg.stat().st_size <= max(LARGEST_SVG, len(data)):
        text = svg.read_text(encoding="utf-8")
        box = re.search(r'viewBox="([^"]+)"', text)
        return replace(picture, view_box=box.group(1) if box else "", svg=themed(text, figure.name))
    return replace(picture, png=f"data:image/png;base64,{data}")


def themed(svg: str, name: str) -> str:
    """Return what an SVG file's `<svg>` element holds, for a page that has several.

    Ids get the figure's name as a prefix, colors of `style.THEMED` become CSS variables, the background is left out.
    """
    inner = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.S)
    inner = re.sub(r'<g id="patch_1">.*?</g>', "", inner, count=1, flags=re.S)
    inner = re.sub(r'\bid="', f'id="{name}-', inner)
    inner = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{name}-", inner)
    for color, variable in THEMED.items():
        inner = inner.replace(f": {color}", f": var(--{variable})")
    return re.sub(r"\n\s*", "\n", inner)


def _write_contents(folder: Path, tables: Sequence[Table], figures: Sequence[Figure], mode: int) -> None:
    """Write `CONTENTS`, and remove the files that an earlier one lists and this one does not."""
    listed = {f"{table.name}.csv": table.caption for table in tables}
    for figure in figures:
        listed |= {f"{figure.name}.{kind}": figure.caption for kind in ("svg", "png")}
    path = folder / CONTENTS
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row.get("file") and row["file"] not in listed and Path(row["file"]).name == row["file"]:
                    (folder / row["file"]).unlink(missing_ok=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("file", "caption"), *sorted(listed.items())])
    write_text(path, text.getvalue(), mode)
