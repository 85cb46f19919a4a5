"""The estimated disk space of a run, compared with what a small one takes."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from triderm_dist.config import Experiment, load
from triderm_dist.doctor import disk
from triderm_dist.doctor.disk import disk_finding, estimate_disk
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.crossval import run_folds
from triderm_dist.schema import Signature

NO_TEST = "no test set"
SETTINGS = [
    "data.folds=2",
    "train={epochs: 1, global_batch: 32, micro_batch: 32, trackers: [], augment: {token_variants: 1}}",
    "models.cnn={kind: dual_cnn, width: 128, tower: {source: 'timm:test_efficientnet', pretrained: false, "
    "image_size: 32, frozen: true}}",
    "models.tri={width: 128, heads: 2, tower: {source: 'timm:test_vit', pretrained: false, image_size: 32}}",
]


def size_of(folder: Path, *patterns: str) -> int:
    return sum(path.stat().st_size for pattern in patterns for path in folder.glob(pattern) if path.is_file())


@pytest.mark.parametrize("keep", [False, True])
def test_estimate_is_near_what_a_small_run_leaves(tmp_path, keep):
    index = synthetic_shards(tmp_path / "shards", 64, 40)
    words = [*SETTINGS, f"output={tmp_path / 'run'}", f"data.shards={tmp_path / 'shards'}"]
    experiment = load(Experiment, None, [*words, f"train.keep_checkpoints={str(keep).lower()}"])
    peaks: list[int] = []
    run = tmp_path / "run"
    run_folds(
        experiment, index, ["cnn", "tri"], [0, 1],
        on_validation=lambda epoch, scores: peaks.append(size_of(run, "*/fold-*/checkpoints/*/*")),
    )  # fmt: skip
    need = estimate_disk(experiment, index.signature, index, NO_TEST)
    assert need.folds == pytest.approx(size_of(run, "*/fold-*/**/*"), rel=0.1)
    assert need.tokens == pytest.approx(size_of(run, "tokens/**/*.tokens"), rel=0.02)
    assert need.towers == pytest.approx(size_of(run, "towers/*"), rel=0.05)
    assert need.shards == 0 and need.finished < need.peak and (keep or need.checkpoints > max(peaks))
    assert bool(list(run.glob("*/fold-*/checkpoints"))) == keep


@pytest.mark.parametrize(("use", "tables"), [("[clinical]", 1), ("[clinical, dermoscopic, concepts, metadata]", 5)])
def test_each_input_that_is_hidden_adds_a_table(tmp_path, use, tables):
    words = [*SETTINGS, f"output={tmp_path / 'run'}", f"models.cnn.use={use}", f"models.tri.use={use}"]
    experiment = load(Experiment, None, words)
    small, large = (synthetic_shards(tmp_path / str(lesions), lesions, 40) for lesions in (32, 64))
    few, many = (estimate_disk(experiment, index.signature, index, NO_TEST) for index in (small, large))
    assert many.folds - few.folds == tables * (many.tables - few.tables) > 0  # the weights are the same


def test_sets_that_are_not_packed_are_estimated_by_their_photos(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.JPG").write_bytes(bytes(400_000))
    task = Signature(("a", "b"), ("clinical", "dermoscopic"), (), ())
    words = [*SETTINGS, f"data.source={tmp_path}", f"output={tmp_path / 'run'}"]
    reduced, full = (
        estimate_disk(load(Experiment, None, [*words, f"data.short_side={side}"]), task, "not packed", NO_TEST)
        for side in ("200", "null")
    )
    assert full.shards == 2_400_000 and 0 < reduced.shards < 200_000
    assert full.tables == reduced.tables > 0


def test_set_without_a_source_is_not_looked_for_in_the_current_folder(tmp_path, monkeypatch):
    walked = []
    monkeypatch.setattr(disk.os, "walk", lambda folder: walked.append(folder) or [])
    task = Signature(("a", "b"), ("clinical", "dermoscopic"), (), ())
    assert estimate_disk(load(Experiment, None, SETTINGS), task, NO_TEST, NO_TEST).shards == 0
    assert walked == []


def test_too_little_space_is_a_warning(tmp_path, monkeypatch):
    index = synthetic_shards(tmp_path / "shards", 64, 40)
    experiment = load(Experiment, None, [*SETTINGS, f"output={tmp_path / 'run'}", f"data.shards={tmp_path}/shards"])
    about = experiment, index.signature, index, NO_TEST
    found = disk_finding(*about)
    assert found.state == "ok" and "when finished (folds " in found.text and "are there" not in found.text
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: usage(estimate_disk(*about).peak - 1))
    found = disk_finding(*about)
    assert found.state == "warning" and found.text.endswith("are free") and "set another output" in found.advice
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "shards" / "index.json", tmp_path / "run")  # what is there needs no more space
    assert disk_finding(*about).state == "ok"
