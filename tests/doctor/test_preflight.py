"""What would stop a later stage of a run is refused before the first one."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Challenge, write_challenge
from tests.doctor.conftest import SMALL
from triderm_dist.config import Experiment, load
from triderm_dist.data.readers.milk10k import read_challenge
from triderm_dist.data.shards.open import open_index
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.doctor.preflight import check_disk, check_pipeline
from triderm_dist.ensemble.nested_stack import check_stackable
from triderm_dist.schema import DataError, InputError

TRUTH, METADATA = "truth.csv", "test/MILK10k_Test_Metadata.csv"


@pytest.fixture(scope="module")
def challenges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("challenges")
    write_challenge(folder / "train", 44, size=(24, 18))
    write_challenge(folder / "test", 3, "MILK10k_Test", size=(24, 18)).truth_path.rename(folder / TRUTH)
    return folder


@pytest.fixture
def folder(challenges: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(challenges, tmp_path / "sets"))


def train(folder: Path) -> Challenge:
    return write_challenge(folder / "train", 44, size=(24, 18))


def one_diagnosis(folder: Path) -> None:
    challenge = train(folder)
    for row in challenge.truth:
        row.update({name: float(name == "NV") for name in row if name != "lesion_id"})
    challenge.write()


def rare_second_diagnosis(folder: Path) -> None:
    challenge = train(folder)
    for number, row in enumerate(challenge.truth):
        row.update({name: float(name == ("MEL" if number == 0 else "NV")) for name in row if name != "lesion_id"})
    challenge.write()


def edit(path: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_text(change((folder / path).read_text()))


PROBLEMS: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "one diagnosis": (one_diagnosis, [], "train: has lesions of NV only; a training needs at least two diagnoses"),
    "no label": (
        edit("train/MILK10k_Training_GroundTruth.csv", lambda text: text.split("\n")[0] + "\n"),
        [],
        "train: has no labels; a training needs at least two diagnoses",
    ),
    "more folds than lesions": (lambda folder: None, ["data.folds=45"], "train: 45 folds need at least 45 groups"),
    "one lesion of the second diagnosis": (rare_second_diagnosis, [], "train: the stacker needs two diagnoses outside"),
    "unknown member that predicts": (
        lambda folder: None,
        ["ensemble.use=b"],
        "ensemble.use=b: no such member; known are auto, ensemble, a, stack",
    ),
    "unknown member": (lambda folder: None, ["ensemble.members=[b]"], "ensemble.members: no model is named 'b'"),
    "no truth file": (lambda folder: None, ["data.test_truth=none.csv"], "data.test_truth: none.csv: no such file"),
    "truth without a test set": (
        lambda folder: None,
        ["data.test=null", "data.test_truth=DIR/truth.csv"],
        "data.test_truth: has no effect without a test set",
    ),
    "truth of other lesions": (
        edit(TRUTH, lambda text: text.replace("IL_1007", "IL_01007")),
        ["data.test_truth=DIR/truth.csv"],
        "has no label of 1 of 3 test lesions, the first is IL_1007; is 'IL_01007' meant",
    ),
    "truth that is no table": (
        edit(TRUTH, lambda text: "<html>"),
        ["data.test_truth=DIR/truth.csv"],
        "is a web page",
    ),
    "test without a concept": (
        edit(METADATA, lambda text: text.replace("MONET_hair", "other")),
        [],
        "concepts are not those of the training set (only the training set has clinical/hair)",
    ),
    "test with an invalid row": (
        edit(METADATA, lambda text: text.replace(",male,", ",mal,")),
        [],
        "unknown sex 'mal'",
    ),
}


def settings(folder: Path, *words: str) -> Experiment:
    own = [f"data.source={folder}/train", f"data.test={folder}/test", f"output={folder}/run", "data.folds=2", *SMALL]
    return load(Experiment, None, [*own, *(word.replace("DIR", str(folder)) for word in words)])


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_would_stop_a_later_stage_is_refused(folder: Path, name: str) -> None:
    change, words, message = PROBLEMS[name]
    change(folder)
    with pytest.raises(InputError) as error:
        check_pipeline(settings(folder, *words))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert (folder / "run/shards/test.problems.csv").exists() == (name == "test with an invalid row")


def test_complete_inputs_pass_with_notes(folder: Path) -> None:
    assert check_pipeline(settings(folder)) == []
    truth = folder / "more.csv"
    truth.write_text((folder / TRUTH).read_text() + (folder / TRUTH).read_text().split("\n")[1].replace("IL_", "IX_"))
    notes = check_pipeline(settings(folder, f"data.test_truth={truth}"))
    assert notes == [f"{truth}: 1 lesions are not in the test set"]


def test_mean_of_the_seeds_of_a_model_may_predict(folder: Path) -> None:
    assert check_pipeline(settings(folder, "models.a.seeds=2", "ensemble.use=a-seeds")) == []
    with pytest.raises(InputError, match=r"ensemble\.use=a-seeds: no such member"):
        check_pipeline(settings(folder, "models.a.seeds=2", "ensemble.members=[a-s1]", "ensemble.use=a-seeds"))


def test_folder_that_was_corrected_since_it_was_packed_passes(folder: Path) -> None:
    one_diagnosis(folder)
    packed = folder / "run" / "shards" / "train"
    pack_shards(read_challenge(folder / "train"), packed, short_side=None)
    with pytest.raises(DataError, match="has lesions of NV only"):
        check_pipeline(settings(folder))
    train(folder)
    assert check_pipeline(settings(folder)) == []
    with pytest.raises(DataError, match="has lesions of NV only"):
        check_pipeline(settings(folder, f"data.shards={packed}"))


def test_disk_that_is_certainly_too_small_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = folder / "run" / "shards" / "train"
    pack_shards(read_challenge(folder / "train"), packed, short_side=None)
    experiment = settings(folder)
    index = open_index(str(packed), experiment.data.remote)
    assert check_disk(experiment, index) == []
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1))
    with pytest.raises(InputError, match=r"run: disk needed: about .* are free; free some or set another output"):
        check_disk(experiment, index)


def test_stack_is_feasible_where_every_fit_has_two_diagnoses() -> None:
    groups = np.arange(6)
    check_stackable(np.array([0, 1, 0, 1, 0, 1]), groups, np.array([0, 0, 1, 1, 2, 2]), 0)
    with pytest.raises(DataError, match="two diagnoses outside of fold 0"):
        check_stackable(np.array([1, 1, 0, 0, 0, 1]), groups, np.array([0, 0, 1, 1, 2, 2]), 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models.a.tower={source: 'timm:vit_bas', pretrained: false}"], r"models.a.tower.source: .*did you mean"),
        (["models.a.tower={source: 'local-dir:DIR/none', pretrained: true}"], r"models.a.tower.source: \S+none"),
        (
            ["models.a.tower={source: 'timm:test_vit@DIR/none.pth', pretrained: true}"],
            r"models.a.tower.source: .*none.pth",
        ),
        (["tokens=DIR/train/MILK10k_Training_Metadata.csv"], "tokens: .*: is a file; name a folder"),
        (["data.extra=[{shards: DIR/none, map: {NV: NV}}]"], "none"),
    ],
)
def test_files_that_training_needs_are_looked_for(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_pipeline(settings(folder, *words))
