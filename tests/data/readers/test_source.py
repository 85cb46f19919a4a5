"""A folder is read by the task that a setting, its task.yaml or its layout names, with the reader of that task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.conftest import Challenge
from tests.data.readers.test_lesions_csv import PER_PHOTO, rows_of_photos, task_of, write
from tests.data.readers.test_milk10k import Make
from triderm_dist.data.readers.source import find_task, read_source, reader_of, task_setting
from triderm_dist.schema import ConfigError, DataError
from triderm_dist.tasks import load_task, milk10k_task


def test_task_of_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "clinic", rows_of_photos())
    with pytest.raises(DataError, match=r"clinic: no task.yaml says .*; triderm task init \S+clinic writes one"):
        find_task(folder)
    assert find_task(folder, "ham10000") == load_task("ham10000")
    (folder / "task.yaml").write_text(yaml.safe_dump(PER_PHOTO))
    assert find_task(folder) == find_task(folder / "table.csv") == task_of()
    assert find_task(folder, "ham10000") == load_task("ham10000")
    with pytest.raises(DataError, match="no such folder"):
        find_task(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"unknown task 'ham1000'; did you mean 'ham10000'\?"):
        find_task(folder, "ham1000")


def test_layout_of_milk10k_is_recognized(make_challenge: Make, tmp_path: Path) -> None:
    challenge = make_challenge(lesions=2)
    assert task_setting(challenge.folder) == task_setting(challenge.metadata_path) == "milk10k"
    assert find_task(challenge.folder) == milk10k_task()
    challenge.metadata_path.rename(challenge.folder / "metadata.csv")
    assert task_setting(challenge.folder) == "milk10k"
    (challenge.folder / "metadata.csv").write_text("img_id,diagnostic,age\nPAT_1.png,NEV,3\n")
    with pytest.raises(DataError, match="triderm task init"):
        task_setting(challenge.folder)
    (challenge.folder / "run.py").touch()
    with pytest.raises(DataError, match=r"run\.py: not a table \(\.csv, .*\); give one, or the folder"):
        task_setting(challenge.folder / "run.py")


def test_reader_is_that_of_the_task(make_challenge: Challenge, tmp_path: Path) -> None:
    folder = write(tmp_path / "clinic", rows_of_photos())
    dataset = read_source(folder, task_of())
    assert dataset.task == task_of() and len(dataset.lesions) == 4
    assert reader_of(task_of()).inputs(folder, task_of()) == [folder / "table.csv", folder]
    with pytest.raises(ConfigError, match=r"reader 'lesion_csv' is unknown; did you mean 'lesions_csv'\?"):
        reader_of(replace(task_of(), reader="lesion_csv"))
