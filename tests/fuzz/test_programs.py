"""Real programs on damaged files: exit status 0 or 2, and one line that says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.conftest import write_challenge
from tests.fuzz.checks import fuzz
from tests.fuzz.mutations import edited_bytes, edited_csv, edited_fields, edited_json, without_checksum
from tests.fuzz.test_settings import edited_yaml
from tests.fuzz.test_shards import FORMATS, TASK, joined, members, packed  # noqa: F401 - a fixture
from tests.fuzz.test_tables import rows_of
from tests.processes import launch
from triderm_dist.config import Experiment, as_yaml, load
from triderm_dist.files import write_json

pytestmark = pytest.mark.slow
CASES = 4


def check_program(*words: str) -> int:
    """Run a program and return its exit status."""
    done = launch("triderm_dist", *words, check=False)
    assert done.returncode in (0, 2), done.stderr[-3000:]
    assert "Traceback" not in done.stderr + done.stdout, done.stderr[-3000:]
    if done.returncode:
        *_, last = done.stderr.splitlines()
        assert last.startswith("error: "), done.stderr[-3000:]
    return done.returncode


@pytest.mark.parametrize("name", ["table", "photo"])
def test_pack_refuses_or_reads_damaged_tables_and_photos(tmp_path: Path, name: str) -> None:
    challenge = write_challenge(tmp_path / "challenge", lesions=6, size=(24, 18))
    path = challenge.truth_path if name == "table" else challenge.photo(3)
    data = path.read_bytes()
    damaged = edited_csv(rows_of(data)) if name == "table" else st.one_of(edited_bytes(data), edited_fields(data))

    def check(content: bytes) -> int:
        path.write_bytes(content)
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        return check_program("pack", f"source={challenge.folder}", f"output={tmp_path / 'set'}", "workers=1")

    assert check(data) == 0
    fuzz(check, damaged, CASES)


def test_index_refuses_or_reads_damaged_tars(tmp_path: Path) -> None:
    write_json(tmp_path / "task.json", TASK.to_mapping())  # JSON is YAML
    task = (tmp_path / "task.json").rename(tmp_path / "task.yaml")
    folder, data = tmp_path / "tars", joined(members(FORMATS["gnu"], in_json=True))
    folder.mkdir()

    def check(content: bytes) -> int:
        (folder / "a.tar").write_bytes(content)
        return check_program("index", f"folder={folder}", f"task={task}", "invalid=drop", "workers=1")

    assert check(data) == 0
    fuzz(check, st.one_of(edited_bytes(data), edited_fields(data)), CASES)


def test_verify_refuses_or_reads_a_damaged_index(packed: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = shutil.copytree(packed, tmp_path / "set")
    tree = json.loads((folder / "index.json").read_bytes())

    def check(content: bytes) -> int:
        (folder / "index.json").write_bytes(content)
        return check_program("verify", f"folder={folder}", "folds=2", "workers=1")

    assert check((packed / "index.json").read_bytes()) == 0
    fuzz(check, st.one_of(edited_json(tree), edited_json(without_checksum(tree))), CASES)


def test_train_refuses_or_reads_damaged_settings(tmp_path: Path) -> None:
    path, text = tmp_path / "experiment.yaml", as_yaml(load(Experiment, "rtx4090"))

    def check(content: bytes) -> int:
        path.write_bytes(content)
        return check_program("train", "--config", str(path), "model=trimodal", "fold=0", "--print-config")

    assert check(text.encode()) == 0
    fuzz(check, edited_yaml(text), CASES)
