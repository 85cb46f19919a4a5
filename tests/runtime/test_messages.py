"""Messages of one line."""

from triderm_dist.runtime.messages import one_line


def test_one_line_collapses_whitespace_and_shortens():
    error = ValueError("first\n  second\tthird")
    assert one_line(error) == "first second third"
    assert one_line(error, with_type=True) == "ValueError: first second third"
    assert one_line(error, 14) == "first seco ..." and len(one_line(error, 14)) == 14
    assert one_line("\x1b[1;31mred\x1b[0m \x07 \ud800 \u202e Läsion") == "red \\x07 \\ud800 \\u202e Läsion"
    assert one_line(TimeoutError()) == one_line(TimeoutError(), with_type=True) == "TimeoutError"
