"""Lines and tables that fit 80 columns."""

import pytest

from triderm_dist.runtime.terminal import clock, counted, table, wrapped


def test_text_is_wrapped_at_words_and_paths_stay_whole():
    path = "/a/very-long/" + "folder-of-a-run/" * 6
    lines = wrapped(f"note: the predictions of all lesions, of every fold of all models, are in {path}").splitlines()
    assert lines == ["note: the predictions of all lesions, of every fold of all models, are in", f"  {path}"]
    assert wrapped("a b", first="- ") == "- a b"


def test_table_aligns_names_left_and_numbers_right():
    text = table(("model", "fold"), [("tri", "0"), ("dual_cnn", "12")])
    assert text == "model     fold\ntri          0\ndual_cnn    12"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (360_000, "100:00:00")])
def test_seconds_are_formatted_as_hours_minutes_seconds(seconds, text):
    assert clock(seconds) == text


def test_counts_have_plural_and_thousands_separator():
    assert [counted(number, "rank") for number in (1, 2, 1000)] == ["1 rank", "2 ranks", "1,000 ranks"]
