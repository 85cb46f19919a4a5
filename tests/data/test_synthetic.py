"""Synthetic demo data: layout, notice, class balance, missing values, separate ground truth, reproducibility."""

from __future__ import annotations

import csv
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.processes import launch, written_meanwhile
from triderm_dist.data.readers.lesions_csv import read_lesions
from triderm_dist.data.readers.milk10k import CONCEPTS, MONET_COLUMNS, read_challenge
from triderm_dist.data.readers.table import read_table
from triderm_dist.data.synthetic import truth_file
from triderm_dist.data.synthetic import write_synthetic as write_set
from triderm_dist.data.synthetic.table import levels_of, modalities
from triderm_dist.schema import DIAGNOSES, UNLABELED, ConfigError, DataError, Task
from triderm_dist.tasks import load_task, task_names


def write_synthetic(output: Path, **settings: int) -> subprocess.CompletedProcess[str]:
    arguments = [f"{key}={value}" for key, value in settings.items()]
    return launch("shards.demo", f"output={output}", *arguments, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("data") / "demo"
    result = write_synthetic(output, lesions=130, test_lesions=60)
    assert result.returncode == 0 and result.stderr == "" and "SYNTHETIC" in result.stdout
    return output


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_synthetic_set_has_the_official_layout(demo: Path) -> None:
    assert {path.name for path in (demo / "train").iterdir()} == {
        "MILK10k_Training_Input",
        "MILK10k_Training_Metadata.csv",
        "MILK10k_Training_GroundTruth.csv",
        "MILK10k_Training_Supplement.csv",
        "attribution.txt",
    }
    assert {path.name for path in (demo / "test").iterdir()} == {
        "MILK10k_Test_Input",
        "MILK10k_Test_Metadata.csv",
        "attribution.txt",
    }
    assert [path.name for path in (demo / "truth").iterdir()] == ["MILK10k_Test_GroundTruth.csv"]
    rows = read_rows(demo / "train" / "MILK10k_Training_Metadata.csv")
    first = ["lesion_id", "image_type", "isic_id", "attribution", "copyright_license", "image_manipulation"]
    assert list(rows[0]) == [*first, "age_approx", "sex", "skin_tone_class", "site", *MONET_COLUMNS]
    assert len(rows) == 260
    truth = read_rows(demo / "truth" / "MILK10k_Test_GroundTruth.csv")
    assert list(truth[0]) == ["lesion_id", *DIAGNOSES]


def test_every_file_is_marked_as_synthetic(demo: Path) -> None:
    for file in ("README.txt", "train/attribution.txt", "test/attribution.txt"):
        assert "SYNTHETIC" in (demo / file).read_text()
    assert {row["attribution"] for row in read_rows(demo / "test" / "MILK10k_Test_Metadata.csv")} == {
        "SYNTHETIC, drawn by triderm-dist"
    }


def test_class_balance_missing_values_and_separate_truth(demo: Path) -> None:
    train, test = read_challenge(demo / "train"), read_challenge(demo / "test")
    assert train.labeled and not test.labeled and train.concepts == test.concepts == CONCEPTS
    counts = np.bincount([lesion.label for lesion in train.lesions], minlength=11)
    assert counts.sum() == 130 and counts.min() >= 6 and counts.max() > 3 * counts.min()
    truth = read_rows(demo / "truth" / "MILK10k_Test_GroundTruth.csv")
    assert sorted(row["lesion_id"] for row in truth) == sorted(lesion.lesion_id for lesion in test.lesions)
    assert min(sum(float(row[name]) for row in truth) for name in DIAGNOSES) >= 3
    assert not {lesion.lesion_id for lesion in train.lesions} & {lesion.lesion_id for lesion in test.lesions}
    metadata = np.array([lesion.metadata for lesion in train.lesions])
    assert np.isnan(metadata[:, 0]).any() and np.isnan(metadata[:, 3]).any()
    assert len(np.unique(metadata[:, 2])) >= 5
    photo = np.asarray(Image.open(str(train.lesions[0].images["dermoscopic"])))
    assert photo.shape == (84, 112, 3) and photo.std() > 10


def test_every_modality_separates_its_diagnoses(demo: Path) -> None:
    """A simple statistic of each modality separates diagnoses that differ in no other modality, but not perfectly."""
    lesions = read_challenge(demo / "train").lesions

    def center(view: str, lesion: object) -> np.ndarray:
        image = Image.open(str(lesion.images[view]))  # type: ignore[attr-defined]
        return np.asarray(image, float)[30:54, 42:70].mean(axis=(0, 1))

    red = np.array([center("clinical", lesion)[0] - center("clinical", lesion)[1] for lesion in lesions])
    ulcerated = np.array([lesion.concepts[0] + lesion.concepts[7] for lesion in lesions])
    age = np.array([lesion.metadata[0] for lesion in lesions])
    labels = np.array([DIAGNOSES[lesion.label] for lesion in lesions])

    def separation(value: np.ndarray, high: list[str], low: list[str]) -> float:
        """Return the share of pairs in the right order (AUC)."""
        above, below = value[np.isin(labels, high)], value[np.isin(labels, low)]
        return float(np.nanmean(np.where(np.isnan(above[:, None] - below), np.nan, above[:, None] > below)))

    assert separation(red, ["AKIEC", "DF", "BCC"], ["BKL", "NV", "MAL_OTH"]) > 0.9
    assert separation(ulcerated, ["BCC", "SCCKA"], ["BEN_OTH", "AKIEC"]) > 0.85
    assert separation(age, ["BKL"], ["NV"]) > 0.85


def test_synthetic_data_is_reproducible(demo: Path, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    write_synthetic(tmp_path / "again", lesions=130, test_lesions=60)
    assert content(tmp_path / "again") == content(demo)


def test_existing_data_is_never_overwritten(demo: Path, tmp_path: Path) -> None:
    before = (demo / "README.txt").stat().st_mtime_ns
    again = write_synthetic(demo, lesions=130, test_lesions=60)
    assert again.returncode == 0 and "already" in again.stdout
    assert (demo / "README.txt").stat().st_mtime_ns == before
    other = write_synthetic(demo, lesions=130, test_lesions=60, seed=1)
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "is not this synthetic data" in other.stderr


@pytest.mark.parametrize("seed", [0, 1])
def test_data_that_another_process_has_written_meanwhile_are_kept(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    output = tmp_path / "out"
    refused = pytest.raises(DataError, match="out: exists and is not this synthetic data") if seed else nullcontext()
    with written_meanwhile(output, lambda: shutil.copytree(demo, output), capsys), refused:
        assert not write_set(output, load_task("milk10k"), 130, 60, seed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_data_are_written_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "demo")
    assert write_set(tmp_path / "link", Task.from_mapping(PER_PHOTO, "test"), 20, 10, 0)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "demo" / "README.txt").is_file()


# --- any task --------------------------------------------------------------------------------------------------------

PER_PHOTO: dict[str, Any] = {
    "name": "per_photo",
    "diagnoses": [{"name": name} for name in ("ONE", "TWO", "THREE")],
    "views": [{"name": "clinical", "words": ["overview"]}, {"name": "dermoscopic", "words": ["close"]}],
    "concepts": {"prefix": "score_"},
    "columns": {"lesion_id": "lesion", "image": "photo", "view": "kind", "group": "person"},
}
PER_LESION = {**PER_PHOTO, "name": "per_lesion", "columns": {"lesion_id": "lesion"}}
"""The photos are in the columns `clinical` and `dermoscopic`, as no other are named."""
TASKS = [load_task(name) for name in task_names() if name != "milk10k"]
TASKS += [Task.from_mapping(raw, "test") for raw in (PER_PHOTO, PER_LESION)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_set_of_any_task_is_read_without_a_problem(task: Task, tmp_path: Path) -> None:
    """Photos of each view, every field, concept and group are read from the task's own columns; no column is left."""
    assert write_set(tmp_path / "set", task, 100, 50, seed=0)
    train, test = (read_lesions(tmp_path / "set" / part, task) for part in ("train", "test"))
    assert train.labeled and not test.labeled and not train.problems
    assert not [note for note in train.notes if "not used" in note or "no row" in note]
    for data, minimum in ((train, 100), (test, 50)):
        assert len(data.lesions) >= minimum and len({lesion.group for lesion in data.lesions}) == minimum
        views = {view for lesion in data.lesions for view, path in lesion.images.items() if path}
        assert views == set(task.view_names)
    assert min(np.bincount([lesion.label for lesion in train.lesions])) >= 6
    assert bool(train.concepts) == (task.concepts.prefix is not None or bool(task.concepts.names))
    metadata = np.array([lesion.metadata for lesion in train.lesions])
    assert np.isnan(metadata).any() == bool(task.fields)
    truth = read_table(truth_file(tmp_path / "set", task))
    id_column = task.columns.lesion_id or str(task.columns.image)
    assert [cell.removesuffix(".jpg") for cell in truth.cells[id_column].to_pylist()] == [
        lesion.lesion_id for lesion in test.lesions
    ]
    assert all(lesion.label == UNLABELED for lesion in test.lesions)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_diagnoses_differ_in_their_levels_and_every_modality_says_something(task: Task) -> None:
    levels = levels_of(task)
    assert levels.shape == (len(task.diagnoses), len(modalities(task)))
    assert len(np.unique(levels, axis=0)) == len(levels)
    assert (levels.min(0) == 0).all() and (levels.max(0) == 1).all()


def test_looks_and_fields_follow_the_levels(tmp_path: Path) -> None:
    """On the smartphone set, redness of the photo and the first field rise with the level of the diagnosis."""
    task = load_task("pad_ufes_20")
    write_set(tmp_path / "set", task, 150, 50, seed=0)
    lesions = read_lesions(tmp_path / "set" / "train", task).lesions
    levels = levels_of(task)[[lesion.label for lesion in lesions]]
    red = [np.asarray(Image.open(str(each.images["clinical"])), float)[36:48, 50:62].mean((0, 1)) for each in lesions]
    redness = np.array([color[0] - color[1] for color in red])
    age = np.array([lesion.metadata[0] for lesion in lesions])
    assert redness[levels[:, 0] == 1].mean() > redness[levels[:, 0] == 0].mean() + 40
    assert np.nanmean(age[levels[:, 1] == 1]) > np.nanmean(age[levels[:, 1] == 0.5]) + 10
    assert np.nanmean(age[levels[:, 1] == 0.5]) > np.nanmean(age[levels[:, 1] == 0]) + 10


def test_too_few_lesions_for_the_diagnoses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="20 lesions are too few: 6 for each of 7 diagnoses"):
        write_set(tmp_path / "set", load_task("ham10000"), 20, 50, seed=0)
    assert not any(tmp_path.iterdir())


def test_next_command_is_quoted_for_a_shell_and_a_file_is_no_folder(tmp_path: Path) -> None:
    done = launch("triderm_dist.commands.synthetic", "output=a b", "lesions=100", "test_lesions=50", folder=tmp_path)
    assert "data.source=a b/train'" in done.stdout
    (tmp_path / "file").write_text("")
    done = launch("triderm_dist.commands.demo", "output=file", folder=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: output: file: is a file; name a folder\n"


def test_synthetic_numbers_are_within_their_range(tmp_path: Path) -> None:
    raw = load_task("ham10000").to_mapping()
    ranges = {"wide": (0.3, 50), "narrow": (0.001, 0.004)}
    raw["fields"] = [
        {"name": name, "column": name, "kind": "number", "low": low, "high": high}
        for name, (low, high) in ranges.items()
    ]
    task = Task.from_mapping(raw, "task.yaml")
    write_set(tmp_path / "set", task, 50, 30, 0)
    assert len(read_lesions(tmp_path / "set" / "train", task).lesions) >= 50
