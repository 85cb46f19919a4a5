"""Runs whose pretrained files are gone: predicting, explaining and embedding with the towers that the run keeps."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from triderm_dist.checksums import write_checked_json
from triderm_dist.config import Experiment, load
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.embed import embeddings
from triderm_dist.engine.explain import attention_maps
from triderm_dist.engine.predict_test import predict_test
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.predictions import read_predictions
from triderm_dist.schema import CheckpointError

NAMES = ("trained", "frozen")


def settings(run: Path, file: Path) -> Experiment:
    """The settings of a run in a folder next to its shards, with a pretrained file."""
    shared = f"width: 16, heads: 2, tower: {{source: 'timm:test_vit@{file}', image_size: 32"
    return load(
        Experiment,
        None,
        [
            f"output={run}",
            f"models.trained={{{shared}}}}}",
            f"models.frozen={{{shared}, frozen: true}}}}",
            f"data.shards={run.parent / 'shards'}",
            "data.folds=2",
            "predict.transforms=2",
            "train={epochs: 1, global_batch: 8, micro_batch: 8, trackers: [], precision: fp32}",
        ],
    )


def results(experiment: Experiment) -> list[np.ndarray]:
    """Predict, embed and explain, and return all numbers."""
    index = synthetic_shards(experiment.folder.parent / "shards", 24, 40)
    predict_test(experiment, index, NAMES)
    files = [experiment.fold_folder(name, fold) / "test.parquet" for name in NAMES for fold in range(2)]
    explained = [maps for _, _, maps in attention_maps(experiment, [str(index.lesion_ids[0])])]
    return [
        *(read_predictions(file).logits for file in files),
        *(array for maps in explained for array in (*maps.photos.values(), *maps.attention.values())),
        embeddings(experiment, index, "trained")[0],
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """The folder of a run, its shards and the pretrained file, which is moved to `moved.safetensors`; its results."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "w.safetensors")
    index = synthetic_shards(folder / "shards", 24, 40)
    experiment = settings(folder / "run", folder / "w.safetensors")
    run_folds(experiment, index, NAMES, range(2))
    numbers = results(experiment)
    (folder / "w.safetensors").rename(folder / "moved.safetensors")
    return folder, numbers


def copied(folder: Path, to: Path) -> Experiment:
    """Copy the run and its shards, without what was computed of them."""
    shutil.copytree(folder / "shards", to / "shards")
    shutil.copytree(folder / "run", to / "run", ignore=shutil.ignore_patterns("tokens", "test.*"))
    return settings(to / "run", folder / "w.safetensors")


def test_copied_run_needs_no_pretrained_file(trained: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    folder, expected = trained
    experiment = copied(folder, tmp_path)
    for one, other in zip(results(experiment), expected, strict=True):
        assert np.array_equal(one, other)
    # One record and one file of weights for both folds of the frozen model and for the embeddings.
    names = {TrainedNetwork.read(experiment.fold_folder(name, fold)).tower.name for name in NAMES for fold in range(2)}
    kept = sorted(path.name for path in (experiment.folder / "towers").iterdir())
    assert len(names) == 2 and {Path(name).stem for name in kept} == names and len(kept) == 3


def test_training_goes_without_the_file_of_a_frozen_tower(
    trained: tuple[Path, list[np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so do predictions over more transforms of finished folds; a tower that trains needs its file."""
    folder, _ = trained
    experiment = copied(folder, tmp_path)
    index = synthetic_shards(tmp_path / "shards", 24, 40)
    fold = experiment.fold_folder("frozen", 1)
    weights = (fold / "weights.safetensors").read_bytes()
    shutil.rmtree(fold)
    run_folds(experiment, index, ["frozen"], [1])
    assert (fold / "weights.safetensors").read_bytes() == weights
    note = (
        rf"note: .*w\.safetensors: no such weight file; .*; the encoder of {re.escape(str(experiment.folder))}/towers"
    )
    assert re.search(note, capsys.readouterr().out)
    again = experiment.model_copy(update={"oof": experiment.oof.model_copy(update={"tta": 2})})
    run_folds(again, index, ["trained"], range(2))
    assert capsys.readouterr().out.count("held-out lesions predicted again, mean of 2 transforms") == 2
    shutil.rmtree(experiment.fold_folder("trained", 0))
    with pytest.raises(CheckpointError, match=r"w\.safetensors: no such weight file"):
        run_folds(again, index, ["trained"], [0])


def test_fold_records_its_tower_and_the_photos_of_its_training(trained: tuple[Path, list[np.ndarray]]) -> None:
    experiment = settings(trained[0] / "run", trained[0] / "w.safetensors")
    for name in NAMES:
        tower = TrainedNetwork.read(experiment.fold_folder(name, 1)).tower
        assert (tower.image_size, tower.token_shape, tower.mean) == (32, (4, 64), (0.5, 0.5, 0.5))
        assert (tower.weights is not None) == (name == "frozen")
        info = json.loads((experiment.fold_folder(name, 1) / "fold.json").read_text())
        assert info["photos"] == {"canvas": [53, 40], "short_side": None}


def test_fold_from_before_towers_were_recorded(trained: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    """Only a frozen tower needs its file, and is refused in one line without it."""
    folder, expected = trained
    experiment = copied(folder, tmp_path)
    shutil.rmtree(experiment.folder / "towers")
    for name in NAMES:
        for fold in range(2):
            path = experiment.fold_folder(name, fold) / "fold.json"
            content = json.loads(path.read_text())
            for key in ("tower", "photos", "checksum"):
                del content[key]
            write_checked_json(path, content)
    index = synthetic_shards(tmp_path / "shards", 24, 40)
    predict_test(experiment, index, ["trained"])
    for fold in range(2):
        predictions = read_predictions(experiment.fold_folder("trained", fold) / "test.parquet")
        assert np.array_equal(predictions.logits, expected[fold])
    with pytest.raises(CheckpointError, match=r"w\.safetensors: no such weight file"):
        predict_test(experiment, index, ["frozen"])
    predict_test(settings(tmp_path / "run", folder / "moved.safetensors"), index, ["frozen"])
    predictions = read_predictions(experiment.fold_folder("frozen", 0) / "test.parquet")
    assert np.array_equal(predictions.logits, expected[2])
