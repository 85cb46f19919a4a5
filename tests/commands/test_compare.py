"""`triderm compare`."""

import sys

import pytest

from tests.report.test_comparison import runs  # noqa: F401
from triderm_dist import __main__


def test_words_name_the_runs(runs, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["triderm", "compare", *map(str, runs)])
    __main__.main()
    out = capsys.readouterr().out
    assert "one minus both" in out and "yes" in out
    monkeypatch.setattr(sys, "argv", ["triderm", "compare", str(runs[0])])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: compare: name two or more runs, as in triderm compare RUN RUN\n"
