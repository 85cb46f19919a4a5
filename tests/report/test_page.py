"""The page in a browser: widths, print, dark mode, keyboard, accessibility, and its text against its tables."""

from pathlib import Path
from typing import Any, cast

import pytest

from tests.browser import DESKTOP, PHONE, TABLET, opened, printed_problems, problems, violations
from triderm_dist.report import page
from triderm_dist.report.content import Content
from triderm_dist.report.elements import Section
from triderm_dist.schema import ConfigError


@pytest.mark.parametrize("width", [PHONE, TABLET, DESKTOP])
def test_page_fits_and_its_text_agrees_with_its_tables(browser: Any, run: Path, width: int) -> None:
    assert problems(browser, run / "report.html", width) == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_violates_no_rule_of_accessibility(browser: Any, run: Path, scheme: str) -> None:
    assert violations(browser, run / "report.html", scheme) == []


def test_printed_page_is_whole_and_light(browser: Any, run: Path) -> None:
    assert printed_problems(browser, run / "report.html") == []


def test_keyboard_reaches_the_content(browser: Any, run: Path) -> None:
    with opened(browser, run / "report.html", DESKTOP) as (tab, _):
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        tab.keyboard.press("Enter")
        assert tab.evaluate("location.hash") == "#content"


def test_page_of_any_task(browser: Any, clinic: Path) -> None:
    assert problems(browser, clinic / "report.html", PHONE) == []
    assert violations(browser, clinic / "report.html", "dark") == []


def test_page_is_small(run: Path) -> None:
    assert (run / "report.html").stat().st_size < 5e6


@pytest.mark.parametrize(
    ("entry", "message"),
    [(lambda content: "text", "<lambda> of SECTIONS returned a str"), (Section("One"), "SECTIONS holds a Section")],
)
def test_entry_that_builds_no_section_is_refused(entry: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SECTIONS", [entry])
    with pytest.raises(ConfigError, match=message):
        page.sections_of(cast(Content, None))
