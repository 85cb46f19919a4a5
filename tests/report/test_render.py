"""Pages from sections: files, escaping, equal bytes, and figures that follow the colors of the page."""

import csv
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triderm_dist.report.elements import Column, Figure, Row, Section, Table
from triderm_dist.report.render import write_page
from triderm_dist.report.style import BLUE, INK, PLOTS_IN_ROW, STYLE, WIDE, panel_title, panels
from triderm_dist.schema import ConfigError


def draw(figure: Any) -> None:
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=BLUE)
    axes.set_title("$a$ & <b>")


FIGURE = Figure("line", draw, 'A "line" <rising>', "A line & no more", (3, 2))
TABLE = Table("t", "T <1>", [Column("x", "x & y")], [Row("<a>", (0.5,), note="&", lead=True)])
SECTION = Section("One & <two>", tables=[TABLE], figures=[FIGURE], values={"text": "<i>text</i>"})


@pytest.mark.parametrize("letters", [3, 17, 22, 60])
def test_titles_of_small_plots_do_not_overlap(letters: int) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    with matplotlib.rc_context(STYLE):
        drawing = Drawing((WIDE, 2.4), layout="constrained")
        grid = panels(drawing, PLOTS_IN_ROW)
        for axes in grid:
            panel_title(axes, ("KERATOSE_" * 7)[:letters], "0.045")
        FigureCanvasAgg(drawing).draw()
        titles = [axes._left_title.get_window_extent() for axes in grid]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(titles))
    assert titles[-1].x1 <= drawing.bbox.x1 + 1


def test_page_and_files(tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", tmp_path / "report", "<title>", [SECTION])
    html = page.read_text(encoding="utf-8")
    for text in (
        "One &amp; &lt;two&gt;",
        "&lt;i&gt;text",
        "T &lt;1&gt;",
        "x &amp; y",
        "&lt;a&gt;",
        "A line &amp; no more",
    ):
        assert text in html, text
    assert "<i>text" not in html and 'id="one-two"' in html and 'aria-label="A &#34;line&#34; &lt;rising&gt;"' in html
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"t.csv", "line.svg", "line.png", "contents.csv"}
    with (tmp_path / "report" / "contents.csv").open(encoding="utf-8") as file:
        assert {row["file"]: row["caption"] for row in csv.DictReader(file)} == {
            "line.png": "A line & no more", "line.svg": "A line & no more", "t.csv": "T <1>",
        }  # fmt: skip
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    write_page(tmp_path / "page.html", tmp_path / "report", "<title>", [SECTION])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_colors_of_a_figure_are_variables_of_the_page_only(tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html", tmp_path, "t", [SECTION])
    figure = re.search(r"<figure.*?</figure>", page.read_text(encoding="utf-8"), flags=re.S)
    assert figure and "var(--blue)" in figure[0] and "var(--ink)" in figure[0]
    assert BLUE not in figure[0] and INK not in figure[0]
    assert BLUE in (tmp_path / "line.svg").read_text() and "var(" not in (tmp_path / "line.svg").read_text()
    ids, used = re.findall(r' id="([^"]+)"', figure[0]), re.findall(r'(?:href="#|url\(#)([^")]+)', figure[0])
    assert all(each.startswith(("line-", "figure-line")) for each in ids) and set(used) <= set(ids) and used


@pytest.mark.parametrize("rasterized", [False, True])
def test_large_figures_are_embedded_as_png_if_that_is_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rasterized: bool
) -> None:
    def draw(figure: Any) -> None:
        x, y = np.random.default_rng(0).random((2, 4000))
        figure.subplots().scatter(x, y, c=y, s=5, rasterized=rasterized)

    monkeypatch.setattr("triderm_dist.report.render.LARGEST_SVG", 10)
    section = Section("Dots", figures=[Figure("dots", draw, 'A "cloud" <of dots>', "Dots", (5, 3))])
    html = write_page(tmp_path / "page.html", tmp_path, "t", [section]).read_text(encoding="utf-8")
    assert ('<img src="data:image/png;base64,' in html) == ("<svg" not in html) == (not rasterized)
    assert "A &#34;cloud&#34; &lt;of dots&gt;" in html


def test_files_of_an_earlier_page_are_removed_and_others_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("x")
    write_page(tmp_path / "page.html", tmp_path, "t", [SECTION])
    write_page(tmp_path / "page.html", tmp_path, "t", [Section("Two", values={"text": "nothing"})])
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "contents.csv", "mine.csv"}


def test_equal_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the same name"):
        write_page(tmp_path / "page.html", tmp_path, "t", [SECTION, SECTION])


def test_template_of_a_plugin(tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text('{% import "macros.html" as ui %}<p>{{ ui.quote(tables.t, "<a>", "x") }}</p>')
    section = Section("Mine", template=tmp_path / "mine.html", tables=[TABLE])
    html = write_page(tmp_path / "page.html", tmp_path, "t", [section]).read_text(encoding="utf-8")
    assert '<span data-cell="t||&lt;a&gt;|x|">0.500</span>' in html
