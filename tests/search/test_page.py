"""The page of a search in a browser."""

import random
from typing import Any

import pytest

from tests.browser import DESKTOP, PHONE, printed_problems, problems, violations
from triderm_dist.intervals import Interval
from triderm_dist.search.page import write_search_page
from triderm_dist.search.results import Repeats, Summary
from triderm_dist.search.settings import SearchRun
from triderm_dist.search.space import Domain
from triderm_dist.search.trial import Trial

SPACE = {
    "train.optim.lr": Domain("loguniform", (1e-4, 1e-2)),
    "train.epochs": Domain("randint", (5, 20)),
    "train.optim.weight_decay": Domain("uniform", (0.0, 1.0)),
    "tower.image_size": Domain("choice", (128, 256, 512)),
}


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """A search of 24 trials with a gain, repeats and importance, whose folder's name needs escaping."""
    folder = tmp_path_factory.mktemp("search") / "a & <b>"
    (folder / "search").mkdir(parents=True)
    run = SearchRun(output=str(folder), models={"small": {}})
    generator, trials = random.Random(0), []
    for number in range(1, 25):
        settings = {key: domain.sample(generator) for key, domain in SPACE.items()}
        stopped = number % 4 == 0
        curve = [
            0.3 + 0.1 * settings["train.optim.weight_decay"] * epoch / 10 for epoch in range(1, 4 if stopped else 11)
        ]
        state = "stopped" if stopped else "complete"
        trials.append(Trial(number, settings, 0, state, len(curve), curve[-1], 0.3, 12.5, curve=curve))
    trials[5] = Trial(6, trials[5].settings, state="failed", error="out of memory: <cuda>")
    ordered = sorted(trials, key=lambda trial: -(trial.macro_f1 or 0.0))
    repeats = Repeats([1, 2, 3], [0.35, 0.36, 0.35], [0.38, 0.39, 0.37], Interval(0.027, 0.01, 0.044))
    importance = {key: Interval(0.4 - at / 10, 0.3 - at / 10, 0.6 - at / 10) for at, key in enumerate(SPACE)}
    return Summary(run, SPACE, ordered, trials[0], ordered[0], Interval(0.031, 0.004, 0.058), 479, repeats, importance)


def test_page_of_a_search(summary: Summary, browser: Any) -> None:
    page = write_search_page(summary)
    assert problems(browser, page, PHONE) == []
    text = page.read_text(encoding="utf-8")
    assert "a &amp; &lt;b&gt;" in text and "&lt;cuda&gt;" in text and "<b>" not in text
    assert text.count("<figure ") == 4 and "+0.027" in text


@pytest.mark.slow
def test_page_of_a_search_on_a_desktop_in_print_and_to_a_screen_reader(summary: Summary, browser: Any) -> None:
    page = write_search_page(summary)
    before = page.read_bytes()
    assert problems(browser, page, DESKTOP) == printed_problems(browser, page) == []
    assert violations(browser, page, "light") == violations(browser, page, "dark") == []
    assert write_search_page(summary).read_bytes() == before


def test_page_without_a_complete_trial(summary: Summary) -> None:
    running = [Trial(1, summary.trials[0].settings, state="running")]
    page = write_search_page(Summary(summary.run, SPACE, running, None, None, None, 0, None, {}))
    text = page.read_text(encoding="utf-8")
    assert "<figure " not in text and "1 running" in text
    assert not list((page.parent / "report").glob("*.png"))  # those of the page before are removed
