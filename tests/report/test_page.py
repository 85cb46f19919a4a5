"""The page in a browser: widths, print, dark mode, keyboard, accessibility, and its text against its tables."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.browser import DESKTOP, PHONE, TABLET, opened, printed_problems, problems, violations
from triderm_dist.report import write_report


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with a scored test set."""
    folder = tmp_path_factory.mktemp("scored")
    for path in ("ensemble.json", "ensemble_oof.parquet", "oof.parquet", "stack.json", "stack.ubj", "config.yaml"):
        shutil.copy(run / path, folder / path)
    shutil.copytree(run / "trimodal", folder / "trimodal")
    shutil.copytree(run / "dual_cnn", folder / "dual_cnn")
    held_out = {"macro_f1": 0.4321, "interval": [0.4, 0.47], "argmax": 0.43, "n": 150, "absent": ["INF"]}
    (folder / "heldout.json").write_text(json.dumps(held_out))
    return write_report(folder)


@pytest.mark.parametrize("width", [PHONE, TABLET, DESKTOP])
def test_page_fits_and_its_text_agrees_with_its_tables(browser: Any, page: Path, width: int) -> None:
    assert problems(browser, page, width) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_violates_no_rule_of_accessibility(browser: Any, page: Path, scheme: str) -> None:
    assert violations(browser, page, scheme) == []


def test_printed_page_is_whole_and_light(browser: Any, page: Path) -> None:
    assert printed_problems(browser, page) == []


def test_keyboard_reaches_the_content(browser: Any, page: Path) -> None:
    with opened(browser, page, DESKTOP) as (tab, _):
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        tab.keyboard.press("Enter")
        assert tab.evaluate("location.hash") == "#content"


def test_page_of_any_task(browser: Any, clinic: Path) -> None:
    assert problems(browser, clinic / "report.html", PHONE) == []
