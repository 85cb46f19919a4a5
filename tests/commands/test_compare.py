"""`triderm compare`."""

import re
import sys

import pytest

from tests.report.test_comparison import runs  # noqa: F401
from triderm_dist import __main__
from triderm_dist.report.comparison import Comparison


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


def test_output_writes_a_page_that_is_not_that_of_a_run(runs, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["triderm", "compare", *map(str, runs), f"output={tmp_path}"])
    __main__.main()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    (pair,) = Comparison(runs).pairs
    assert f"one minus both differs beyond the noise: {marked(pair.macro_f1.value)} macro F1" in without_tags(page)
    assert "ensemble.members" in page and "[dual_cnn]" in page
    mcnemar = (tmp_path / "report" / "mcnemar.csv").read_text().splitlines()[1].split(",")
    assert mcnemar[:2] == ["one and both", str(pair.mcnemar.first)]
    monkeypatch.setattr(sys, "argv", ["triderm", "compare", *map(str, runs), f"output={runs[0]}"])
    with pytest.raises(SystemExit):
        __main__.main()
    assert "is the folder of a run, whose report would be replaced" in capsys.readouterr().err
    assert not (runs[0] / "report.html").exists()


def marked(value: float) -> str:
    return f"{value:+.3f}"


def without_tags(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", "", page).split())
