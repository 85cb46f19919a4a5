"""Notebooks in examples/ are valid, hold no output, and run."""

import json
import re
import shutil

import pytest

from tests.processes import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_notebook_is_of_nbformat_4_5_and_holds_no_output():
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)
    for cell in notebook["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert all(line.endswith("\n") for line in cell["source"][:-1]) and not cell["source"][-1].endswith("\n")
        if cell["cell_type"] == "code":
            assert set(cell) == {"cell_type", "execution_count", "id", "metadata", "outputs", "source"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert set(cell) == {"cell_type", "id", "metadata", "source"} and cell["cell_type"] == "markdown"
    for path in re.findall(r"`(docs/[^`]+)`", "".join(cells("markdown"))):
        assert (ROOT / path).is_file(), path


def test_notebook_runs(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    shutil.copytree(trained_run.folder, "runs/demo")
    shutil.copytree(trained_run.test.folder, "runs/demo/data/test")
    names: dict = {}
    for cell in cells("code"):
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    printed = capsys.readouterr().out
    assert sum(names["prediction"].probabilities.values()) == pytest.approx(1)
    assert names["less"].warnings and "no clinical photo" in printed
    assert names["axes"][2].get_title() == "probability" and (tmp_path / "runs" / "attention.png").exists()
    assert re.search(r"tri fold 0 logits \(1, 11\) features \(1, \d+\)", printed)
