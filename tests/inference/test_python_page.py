"""The code of docs/python.md runs as it is printed."""

import re
import shutil
import textwrap
import warnings

import pytest
from PIL import Image

import triderm_dist
from tests.processes import ROOT

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)


@pytest.fixture
def folder(trained_run, tmp_path, monkeypatch):
    """The working directory that the page assumes."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(trained_run.folder, tmp_path / "runs" / "demo")
    (tmp_path / "photos").mkdir()
    names = ["a.jpg", "b.jpg", "photos/c.jpg", "photos/d.jpg"]
    for row, name in enumerate(names):
        shutil.copy(trained_run.test.photo(row), tmp_path / name)
    (tmp_path / "lesions.csv").write_text("lesion_id,clinical,dermoscopic,age\nx,c.jpg,d.jpg,50\ny,c.jpg,,\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_page_runs_as_printed(folder, capsys):
    assert len(BLOCKS) == 7 and len([line for line in BLOCKS[0].splitlines() if line]) <= 10
    names: dict[str, object] = {}
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        for number, block in enumerate(BLOCKS):
            exec(compile(textwrap.dedent(block), f"docs/python.md, block {number + 1}", "exec"), names)
    assert any("1 of 2 lesions with one photo" in str(note.message) for note in notes)
    lines = (folder / "predictions.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["lesion_id", "x", "y"]
    exported = triderm_dist.load("demo.zip", device="cpu").predict("a.jpg", "b.jpg").probabilities
    assert exported == triderm_dist.load("runs/demo", device="cpu").predict("a.jpg", "b.jpg").probabilities
    assert Image.open(folder / "tri.png").size[0] > 100
    said = capsys.readouterr().out
    assert "warning: missing: skin tone\nwarning: missing: 14 of 14 concept scores\n" in said
    # The comments of the page show what is printed.
    for comment in re.findall(r"print\(.*\)  # (.*)", PAGE):
        assert comment in said
