"""A task that is written as YAML alone goes from photos to report, and no word of MILK10k is in any file of its run."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.processes import launch
from tests.test_data_sets import TINY
from triderm_dist.data.synthetic import truth_file, write_synthetic
from triderm_dist.tasks import load_task

TASK = """\
name: ponds
title: Ponds
diagnoses:
  - {name: clear, title: clear water, malignant: false, words: [no algae]}
  - {name: green, title: green water, malignant: true}
  - {name: brown, title: brown water, words: [mud, peat]}
views:
  - {name: clinical, title: from the bank, words: [bank]}
  - {name: dermoscopic, title: from above, words: [drone]}
concepts: {names: [lilies, ducks], words: {few: 0, many: 1}}
fields:
  - {name: depth, column: DEPTH, kind: number, low: 0, high: 30, unit: m}
  - {name: bottom, column: BOTTOM, kind: category, categories: [rock, sand, clay], synonyms: {stone: rock}}
columns: {lesion_id: pond, image: picture, view: from, diagnosis: water, group: park}
decision: fitted
"""
TEXT = {".json", ".yaml", ".csv", ".html", ".txt", ".log", ".md", ".jsonl"}
MILK10K = load_task("milk10k")
NAMES = re.compile(rf"\b({'|'.join(MILK10K.diagnosis_names)})\b")
WORDS = [
    *("monet", "milk10k", "milk-10k", "leaderboard", "isic", "skin_tone", "skin tone", "image_type"),
    *(each.column for each in MILK10K.fields if "_" in each.column),
    *(word for each in MILK10K.fields for word in each.categories if "_" in word),
    *(each.title.lower() for each in MILK10K.diagnoses),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the task and a set for it; return the folder of its run, with what the programs printed in printed.txt."""
    folder = tmp_path_factory.mktemp("ponds")
    (folder / "task.yaml").write_text(TASK)
    (folder / "tiny.yaml").write_text(TINY)
    task = load_task(folder / "task.yaml")
    write_synthetic(folder / "set", task, 100, 50, seed=0)
    settings = ["data.source=set/train", "data.test=set/test", f"data.test_truth={truth_file(Path('set'), task)}"]
    pipeline = ["--config", "tiny.yaml", "output=run", "data.task=task.yaml", *settings]
    done = launch("triderm_dist.commands.pipeline", *pipeline, folder=folder)
    (folder / "run" / "printed.txt").write_text(done.stdout + done.stderr)
    return folder / "run"


def test_a_task_by_yaml_alone_goes_from_photos_to_report(run: Path) -> None:
    files = {path.name for path in run.iterdir()}
    assert {"oof.parquet", "ensemble.json", "probabilities.csv", "decisions.csv", "report.html"} <= files
    assert "submission.csv" not in files
    header = (run / "probabilities.csv").read_text().splitlines()[0].split(",")
    assert header[1:] == ["clear", "green", "brown"]
    assert "held-out macro F1" in (run / "printed.txt").read_text()
    report = (run / "report.html").read_text()
    for word in ("Ponds", "clear water", "depth", "bottom", "rock", "sand"):
        assert word in report, word


def test_no_word_of_milk10k_is_in_any_file_of_the_run(run: Path) -> None:
    paths = [path for path in run.rglob("*") if path.is_file()]
    assert len(paths) > 15
    for path in paths:
        text = text_of(path)
        # Shorter words occur in compressed bytes by chance.
        words = WORDS if path.suffix in {*TEXT, ".parquet"} else [word for word in WORDS if len(word) > 6]
        found = [word for word in words if word in text.lower()]
        found += NAMES.findall(text) if path.suffix in {*TEXT, ".parquet"} else []
        assert not found, f"{path.relative_to(run)}: {found}"


def text_of(path: Path) -> str:
    """Return a file's text: of a table its header, columns and text cells, of other binary files their bytes."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        head = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"ARROW:schema"}
        cells = [column.unique().to_pylist() for column in table.columns if pa.types.is_string(column.type)]
        return f"{head} {table.schema.names} {cells}"
    if path.suffix in TEXT:
        return re.sub(r"base64,[\w+/=]+", "", path.read_text(encoding="utf-8"))
    return path.read_bytes().decode("latin-1")
