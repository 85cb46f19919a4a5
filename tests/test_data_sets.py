"""Every command of the pages in docs/data-sets runs as printed, on a synthetic set in the place of the photos.

A file `cpu` in the working folder stands for the experiment of that name, with networks that train in seconds.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.processes import ROOT, launch
from triderm_dist.data.synthetic import write_synthetic
from triderm_dist.predictions import read_oof
from triderm_dist.tasks import load_task

PAGES = ROOT / "docs" / "data-sets"
SETS = {"ham10000": "HAM10000", "derm7pt": "Derm7pt", "pad_ufes_20": "PAD-UFES-20"}
"""The folder that the page of each task names."""
TINY = """\
data: {folds: 2, short_side: null}
train: {epochs: 1, global_batch: 32, micro_batch: 32, trackers: []}
models:
  trimodal:
    width: 16
    heads: 2
    tower: {source: "timm:test_vit", pretrained: false, image_size: 32, frozen: true, shared: true}
stack: {max_rounds: 5}
ensemble: {bootstrap: 20, rounds: 3}
predict: {transforms: 1}
"""


def commands(page: Path) -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^    triderm (.+)$", page.read_text("utf-8"), re.MULTILINE)]


def test_every_page_is_tested() -> None:
    assert sorted(SETS) == sorted(page.stem for page in PAGES.glob("*.md"))


@pytest.mark.parametrize("name", SETS)
def test_commands_run_as_printed(name: str, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "set", load_task(name), 100, 50, seed=0)
    (tmp_path / "set" / "train").rename(tmp_path / SETS[name])
    (tmp_path / "set" / "test").rename(tmp_path / "NEW")
    (tmp_path / "cpu").write_text(TINY)
    printed = commands(PAGES / f"{name}.md")
    assert {words[0] for words in printed} >= {"task", "pipeline", "synthetic"}
    for program, *arguments in printed:
        done = launch(f"triderm_dist.commands.{program}", *arguments, folder=tmp_path)
        assert "Traceback" not in done.stderr, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    table, task = read_oof(run / "oof.parquet"), load_task(name)
    assert sorted(table.diagnoses) == sorted(task.diagnosis_names)
    assert len(table) >= 100
    report = (run / "report.html").read_text(encoding="utf-8")
    assert all(f">{each}<" in report for each in task.diagnosis_names)
