"""Trainings on parts of the lesions for the learning curve."""

import numpy as np
import pytest

from triderm_dist.config import Experiment, load
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.fold import assigned_folds
from triderm_dist.engine.learning_curve import models_of_learning_curve, part_of_lesions, train_learning_curve
from triderm_dist.engine.network_files import read_info
from triderm_dist.predictions import PARTS, DataSplit, gather, gather_part, part_folder
from triderm_dist.schema import ConfigError, DataError

LESIONS, FOLDS = 48, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Experiment, ShardIndex]:
    folder = tmp_path_factory.mktemp("curve")
    index = synthetic_shards(folder / "shards", LESIONS, 40)
    words = [
        f"output={folder / 'run'}",
        "models.frozen={kind: dual_cnn, width: 16, tower: {source: 'timm:test_efficientnet', pretrained: false, "
        "image_size: 32, frozen: true}}",
        f"data.folds={FOLDS}",
        "train={epochs: 1, global_batch: 8, micro_batch: 8, trackers: []}",
        "train.sampling.kind=shuffle",
    ]
    experiment = load(Experiment, None, words)
    with pytest.raises(DataError, match=r"fold-0: not trained .* run triderm crossval first"):
        train_learning_curve(experiment, index, ["frozen"])
    run_folds(experiment, index, ["frozen"], range(FOLDS))
    return experiment, index


def test_folds_are_trained_on_parts_and_predict_the_same_lesions(run) -> None:
    experiment, index = run
    assert models_of_learning_curve(experiment) == ["frozen"]
    train_learning_curve(experiment, index, ["frozen"])
    folds = assigned_folds(index, experiment.data)
    whole = gather(experiment.folder, ["frozen"], DataSplit(index.lesion_ids, index.labels, folds))
    for percent in PARTS:
        for fold in range(FOLDS):
            folder = part_folder(experiment.folder, "frozen", percent, fold)
            about = read_info(folder / "fold")
            assert about["percent"] == percent
            assert about["lesions"] == pytest.approx((folds != fold).sum() * percent / 100, abs=1)
            assert not list(folder.glob("*.safetensors")) and not list(folder.glob("without_*"))
        table = gather_part(experiment.folder, "frozen", percent, whole)
        assert table is not None and (table.lesion_ids == whole.lesion_ids).all()
        assert not np.array_equal(table.logits["frozen"], whole.logits["frozen"])


def test_finished_parts_are_skipped_and_missing_ones_trained_again(run, capsys) -> None:
    experiment, index = run
    train_learning_curve(experiment, index, ["frozen"])
    kept = part_folder(experiment.folder, "frozen", 25, 0) / "predictions.parquet"
    lost = part_folder(experiment.folder, "frozen", 50, 1)
    before, again = kept.stat().st_mtime_ns, (lost / "predictions.parquet").read_bytes()
    folds = assigned_folds(index, experiment.data)
    whole = gather(experiment.folder, ["frozen"], DataSplit(index.lesion_ids, index.labels, folds))
    for file in lost.glob("*.*"):
        if file.is_file():
            file.unlink()
    assert gather_part(experiment.folder, "frozen", 50, whole) is None
    capsys.readouterr()
    train_learning_curve(experiment, index, ["frozen"])
    assert kept.stat().st_mtime_ns == before
    assert (lost / "predictions.parquet").read_bytes() == again


def test_parts_are_nested_and_keep_groups_and_diagnoses_together(run) -> None:
    _, index = run
    rows = np.arange(5, LESIONS)
    quarter, half = (part_of_lesions(index, rows, percent, seed=1) for percent in (25, 50))
    assert set(quarter) < set(half) < set(rows)
    assert np.array_equal(part_of_lesions(index, rows, 100, seed=1), rows)
    groups = np.asarray(index.fold_groups)
    assert not set(groups[half]) & set(groups[np.setdiff1d(rows, half)])
    counts = np.bincount(index.labels[half], minlength=11) - np.bincount(index.labels[rows], minlength=11) / 2
    assert np.abs(counts).max() <= 1


def test_models_without_a_frozen_tower_are_refused() -> None:
    with pytest.raises(ConfigError, match="learning_curve: trains models with a frozen tower"):
        models_of_learning_curve(load(Experiment))
