"""A folder is read by the task that a setting, its task.yaml or its layout names, with the reader of that task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.conftest import Challenge
from tests.data.readers.test_lesions_csv import PER_PHOTO, rows_of_photos, task_of, write
from tests.data.readers.test_milk10k import Make
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.source import READERS, Reader, find_task, read_source, reader_of, task_setting
from triderm_dist.schema import ConfigError, DataError, Lesion, MetadataField, View
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


def lesion(**changes: object) -> Lesion:
    photo: dict[str, str | None] = {"clinical": None, "dermoscopic": "photo.jpg"}
    return replace(Lesion("one", photo, concepts=(0.5,), metadata=(50.0,), label=0, group="one"), **changes)


@pytest.mark.parametrize(
    ("lesions", "message"),
    [
        ([lesion(), lesion()], "lesion 'one': another lesion has this id"),
        ([lesion(lesion_id="one.jpg")], "lesion 'one.jpg': its id holds a dot, a slash or an unusual space"),
        ([lesion(group=5)], "lesion 'one': its id and its group must be texts"),
        ([lesion(images={"clinical": "a.jpg"})], "has a photo of another view than dermoscopic"),
        ([lesion(images={"dermoscopic": None})], "has no photo"),
        ([lesion(label=11)], "its label 11 is neither -1 nor the index of a diagnosis"),
        ([lesion(label="NV")], "its label 'NV' is neither -1 nor the index of a diagnosis"),
        ([lesion(concepts=())], r"its concepts must hold a number for each concept of the Dataset \(1\)"),
        (
            [lesion(metadata=(None,))],
            r"its metadata must hold a number for each field of the task \(1\), NaN where mis",
        ),
        ([lesion(metadata=(500.0,))], "its age 500 is not from 0 to 120"),
        (iter([lesion()]), "must return a Dataset with a list of lesions"),
    ],
)
def test_lesions_of_a_plugin_that_do_not_fit_the_task_are_refused(
    lesions: list[Lesion], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids that occur twice, values out of range and photos of another view would be packed."""
    age = MetadataField("age", "age", "number", high=120)
    task = replace(milk10k_task(), reader="plugin", views=(View("dermoscopic"),), fields=(age,))

    def read(source: Path, task: object, missing_view: str, invalid: str) -> Dataset:
        return Dataset(milk10k_task(), lesions, concepts=("hair",), labeled=True, notes=[])

    monkeypatch.setitem(READERS, "plugin", Reader(read, inputs=lambda source, task: []))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"reader 'plugin': {message}" if "must return" in message else message):
        read_source("folder", task)
    lesions = [lesion(), lesion(lesion_id="two", metadata=(float("nan"),), label=-1)]
    assert len(read_source("folder", task).lesions) == 2
