"""Opens pages in headless Chromium and says what is wrong with them.

`problems` checks what every page of this package promises: it fits its width, loads nothing, breaks no rule of
accessibility (axe-core), and a number in its text is that of its tables.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PHONE, TABLET, DESKTOP = 390, 768, 1280
A4 = 688
"""Pixels between the margins of A4."""

MEASURE = """
() => {
  document.querySelectorAll('details').forEach(each => each.open = true);
  const found = [], width = document.documentElement.clientWidth;
  const overflow = document.documentElement.scrollWidth - innerWidth;
  if (overflow > 0) found.push(`the page is ${overflow} pixels too wide`);
  for (const each of document.images)
    if (!each.complete || !each.naturalWidth) found.push('an image is not shown');
  for (const each of document.querySelectorAll('figure svg'))
    if (each.getBoundingClientRect().height < 50) found.push('a figure is not shown');
  for (const table of document.querySelectorAll('table')) {
    const cells = [...table.querySelectorAll('tbody tr:not(.group)')].map(row => row.children);
    if (cells.length && cells[0][1].getBoundingClientRect().right > width)
      found.push(`${table.id}: the first column of values is off the screen`);
    const region = table.parentElement;
    region.scrollLeft = 10000;
    if (cells.length && cells[0][0].getBoundingClientRect().left < region.getBoundingClientRect().left - 1)
      found.push(`${table.id}: the names of the rows scroll away`);
    region.scrollLeft = 0;
  }
  return found;
}
"""
MEASURE_PRINT = """
width => [...document.querySelectorAll('main *')]
  .filter(each => each.getBoundingClientRect().width && each.getBoundingClientRect().right > width + 1)
  .map(each => `printed, ${each.tagName} ${each.closest('table')?.id ?? each.className} is cut at the right`)
"""
TABLES = """
() => Object.fromEntries([...document.querySelectorAll('table')].map(table => {
  let group = '';
  const columns = [...table.querySelectorAll('thead [data-column]')].map(each => each.dataset.column), cells = {};
  for (const row of table.tBodies[0].rows) {
    if (row.className === 'group') { group = row.innerText.trim(); continue; }
    const name = row.cells[0].firstChild.textContent.trim();
    columns.forEach((column, at) => cells[[group, name, column].join('|')] = row.cells[at + 1].textContent.trim());
  }
  return [table.dataset.name, cells];
}))
"""
QUOTES = "() => [...document.querySelectorAll('[data-cell]')].map(each => [each.dataset.cell, each.textContent])"
TEXT = """
() => [...document.querySelectorAll('main p, main li, main .card, main summary, main figcaption')]
  .map(each => each.textContent).join('\\n')
"""


@pytest.fixture(scope="module")  # closed after each module: its event loop would hinder other tests
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by Playwright; a test that uses it is skipped where there is none."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser: Any, page: Path, width: int, scheme: str = "light") -> Iterator[tuple[Any, list[str]]]:
    """Open a page; yield it and the list of what it logs and requests from elsewhere."""
    logged: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    tab.on("console", lambda message: logged.append(f"console: {message.text}"))
    tab.on("pageerror", lambda error: logged.append(f"error: {error}"))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or logged.append(request.url))
    tab.goto(page.as_uri())
    yield tab, logged
    context.close()


def problems(browser: Any, page: Path, width: int) -> list[str]:
    """Return what is wrong with a page on a screen of some width, and in its text."""
    with opened(browser, page, width) as (tab, logged):
        found = [f"{width} pixels: {each}" for each in tab.evaluate(MEASURE)]
        return [*found, *logged, *_wrong_quotes(tab), *_unknown_numbers(tab)]


def violations(browser: Any, page: Path, scheme: str, width: int = DESKTOP) -> list[str]:
    """Return the rules of axe-core that a page violates in a color scheme, with the first place of each."""
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, page, width, scheme) as (tab, _):
        tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        return [
            f"{scheme}: {each['id']} ({len(each['nodes'])}): {each['nodes'][0]['html'][:200]} "
            f"{each['nodes'][0]['failureSummary'][:300]}"
            for each in Axe().run(tab).response["violations"]
        ]


def printed_problems(browser: Any, page: Path) -> list[str]:
    """Return what is cut off where a page is printed on A4."""
    with opened(browser, page, A4, "dark") as (tab, _):
        tab.emulate_media(media="print")
        found = tab.evaluate(MEASURE_PRINT, A4)
        closed = tab.evaluate("document.querySelectorAll('details table').length")
        shown = tab.evaluate("[...document.querySelectorAll('details table')].filter(t => t.offsetHeight > 0).length")
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.pdf(path=page.with_suffix(".pdf"), format="A4")
        hidden = [f"printed, {closed - shown} tables in closed details are hidden"] * (shown < closed)
        return [*found[:5], *hidden, *(["printed in dark colors"] * (paper != "rgb(255, 255, 255)"))]


def _wrong_quotes(tab: Any) -> list[str]:
    tables, found = tab.evaluate(TABLES), []
    for key, text in tab.evaluate(QUOTES):
        table, group, row, column, part = key.split("|")
        cell = tables.get(table, {}).get(f"{group}|{row}|{column}")
        if cell is not None and text != _part(cell, part):
            found.append(f"the text has {text} where table {table}, row {row}, {column} has {cell}")
    return found


def _part(cell: str, part: str) -> str:
    match = re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", cell)
    return match.group(("value", "low", "high").index(part) + 1) if part and match else cell


def _unknown_numbers(tab: Any) -> list[str]:
    """Return the numbers with three decimals in sentences that no table has."""
    number = re.compile(r"(?<![\d.])\d?\d\.\d{3}(?!\d)")
    known = {
        each for cells in tab.evaluate(TABLES).values() for cell in cells.values() for each in number.findall(cell)
    }
    quoted = {each for _, text in tab.evaluate(QUOTES) for each in number.findall(text)}
    return [
        f"no table has the {each} of the text"
        for each in number.findall(tab.evaluate(TEXT))
        if each not in known | quoted
    ]
