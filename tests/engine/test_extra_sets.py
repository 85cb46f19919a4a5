"""Lesions of extra sets join the training of a fold, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.processes import ROOT
from tests.union_sets import MAIN, MAP, OTHER, main_set, other_set, pack_set
from triderm_dist.config import Experiment, load
from triderm_dist.data.plan import EpochPlan, Samples, Sampling
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.engine import crossval, fold
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.epochs import Epochs, TrainingData
from triderm_dist.engine.extra_sets import open_extra_sets
from triderm_dist.engine.fold import assigned_folds, is_fold_finished, result_hash, resume_hash
from triderm_dist.engine.trainer import Trainer
from triderm_dist.files import file_sha256
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.predictions import read_predictions
from triderm_dist.schema import ConfigError, DataError, InputError
from triderm_dist.tasks import load_task, milk10k_task


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[ShardIndex, ShardIndex]:
    folder = tmp_path_factory.mktemp("sets")
    return main_set(folder / "main"), other_set(folder / "other")


def experiment(output: Path, *extra: dict, frozen: bool = False, words: tuple[str, ...] = ()) -> Experiment:
    tower = f"{{source: 'timm:test_vit', pretrained: false, image_size: 32, frozen: {str(frozen).lower()}}}"
    settings = [
        f"output={output}",
        "data.folds=3",
        f"models.tri={{width: 16, heads: 2, tower: {tower}}}",
        "train={epochs: 1, global_batch: 8, micro_batch: 4, log_every: 1, trackers: []}",
        *([f"data.extra={json.dumps(extra)}"] if extra else []),
        *words,
    ]
    return load(Experiment, None, settings)


def entry(index: ShardIndex, **changes: object) -> dict:
    return {"shards": str(index.folder), "map": MAP, "weight": 0.5, **changes}


@pytest.fixture
def data(monkeypatch) -> list[TrainingData]:
    """The data of every training that begins."""
    seen: list[TrainingData] = []

    class Recording(Trainer):
        def __init__(self, **options) -> None:
            seen.append(options["data"])
            super().__init__(**options)

    monkeypatch.setattr(crossval, "Trainer", Recording)
    return seen


@pytest.mark.parametrize("frozen", [False, True])
def test_extra_lesions_are_trained_on_and_never_predicted(sets, tmp_path, data, capsys, frozen):
    main, other = sets
    run = experiment(tmp_path / "run", entry(other), frozen=frozen)
    run_folds(run, main, ["tri"], [1])
    held_out = np.flatnonzero(assigned_folds(main, run.data) == 1)
    (training,) = data
    assert training.validation_rows.tolist() == held_out.tolist()
    assert training.loaders.index is main
    names = training.training.index.inputs(training.train_rows).lesion_ids
    assert sum(name.startswith("other/") for name in names) == 12  # 4 scars and 2 without a label are left out
    assert sorted(name for name in names if "/" not in name) == sorted(
        np.delete(main.lesion_ids[np.arange(len(main))], held_out)
    )
    fold = run.fold_folder("tri", 1)
    for name in ("predictions", "without_clinical", "without_dermoscopic"):
        assert sorted(read_predictions(fold / f"{name}.parquet").lesion_ids) == sorted(main.lesion_ids[held_out])
    steps = [line["step"] for line in read_metrics(fold / "metrics.jsonl") if line["kind"] == "train"]
    assert len(steps) == -(-_drawn(training) // 8)
    about = {"task": "other", "fingerprint": other.fingerprint, "lesions": 12, "weight": 0.5}
    assert json.loads((fold / "fold.json").read_text())["extra"] == [about]
    output = " ".join(capsys.readouterr().out.split())
    assert "lesions 28 to train (12 of extra sets), 8 to validate" in output
    assert "data.extra.0: 12 lesions of other join the training with weight 0.5 as MEL 8, NV 4; 4 lab" in output
    assert is_fold_finished(run, main, "tri", 1)


def _drawn(training: TrainingData) -> int:
    """Lesions of an epoch: each one max(1, sqrt(0.1 / share)) times; here no diagnosis is so rare."""
    labels = training.training.index.labels[training.train_rows]
    assert (np.bincount(labels) / len(labels)).min() > 0.1
    return len(labels)


def test_training_without_extra_sets_is_unchanged_bit_for_bit(sets, tmp_path, data):
    main, other = sets
    runs = [experiment(tmp_path / "without"), experiment(tmp_path / "zero", entry(other, weight=0))]
    for run in runs:
        run_folds(run, main, ["tri"], [0])
    weights = [file_sha256(run.fold_folder("tri", 0) / "weights.safetensors") for run in runs]
    assert weights[0] == weights[1]
    assert result_hash(runs[0], main, "tri", 0) == result_hash(runs[1], main, "tri", 0)
    assert all(each.training is each.loaders for each in data)


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0])
def test_prior_of_logit_adjustment_is_that_of_the_lesions_as_drawn(sets, tmp_path, data, power):
    main, other = sets
    larger = other_set(tmp_path / "larger", lesions=19)
    third = other_set(tmp_path / "third", lesions=9)
    extra = entry(other), entry(larger, weight=0.2), entry(third, map={**MAP, "scar": "WART"})
    words = (f"train.sampling={{kind: balanced, threshold: 0.5, power: {power}}}", "train.loss={logit_adjustment: 1}")
    run = experiment(tmp_path / "run", *extra, words=words)
    run_folds(run, main, ["tri"], [1])
    (training,) = data
    config = run.models["tri"].train
    union, sampling = training.training.index, Sampling(**config.sampling.model_dump())
    samples, totals = Samples.of(union, training.train_rows), {}
    for epoch in range(200):
        drawn = union.inputs(EpochPlan(samples, sampling, 0, epoch).order)
        for mask, label, weight in zip(drawn.class_mask.tolist(), drawn.labels, drawn.weights, strict=True):
            totals.setdefault(tuple(mask), np.zeros(4))[label] += weight
    assert len(totals) == 3
    got = Epochs(config, training, 0).drawn_lesions()
    for mask, expected in totals.items():
        (own,) = got.totals[(got.masks == mask).all(1)]
        np.testing.assert_allclose(own / own.sum(), expected / expected.sum(), atol=2e-3)


def test_hash_names_the_prior_only_where_it_changed(sets, tmp_path, monkeypatch):
    main, other = sets
    full = dict(zip(other.diagnoses, main.diagnoses, strict=True))
    cases = {
        "shuffle": ((), "kind: shuffle"),
        "power 0": ((), "kind: balanced, power: 0"),
        "full map": ((entry(other, map=full, weight=1),), "kind: shuffle"),
        "balanced": ((), "kind: balanced"),
        "weight": ((entry(other, map=full),), "kind: shuffle"),
        "mask": ((entry(other, weight=1),), "kind: shuffle"),
    }

    def hashes(tau: float) -> dict[str, str]:
        words = f"train.loss={{logit_adjustment: {tau}}}"
        runs = {
            name: experiment(tmp_path, *extra, words=(words, f"train.sampling={{{sampling}}}"))
            for name, (extra, sampling) in cases.items()
        }
        return {name: result_hash(run, main, "tri", 0) for name, run in runs.items()}

    now = [hashes(tau) for tau in (0.0, 1.0)]
    monkeypatch.setattr(fold, "_has_prior_as_drawn", lambda *_: False)
    before = [hashes(tau) for tau in (0.0, 1.0)]
    assert now[0] == before[0]
    assert [name for name in cases if now[1][name] != before[1][name]] == ["balanced", "weight", "mask"]


def test_hashes_hold_the_content_of_extra_sets(sets, tmp_path):
    main, other = sets
    moved = other_set(tmp_path / "moved")
    assert moved.fingerprint == other.fingerprint
    larger = other_set(tmp_path / "larger", lesions=19)
    cases = {
        "none": experiment(tmp_path),
        "set": experiment(tmp_path, entry(other)),
        "weight": experiment(tmp_path, entry(other, weight=0.25)),
        "map": experiment(tmp_path, entry(other, map={**MAP, "scar": "WART"})),
        "overlap": experiment(tmp_path, entry(other, overlap="drop")),
        "content": experiment(tmp_path, entry(larger)),
        "two": experiment(tmp_path, entry(other), entry(larger)),
    }
    for formula in (result_hash, resume_hash):
        hashes = {name: formula(each, main, "tri", 0) for name, each in cases.items()}
        assert len(set(hashes.values())) == len(cases)
        assert formula(experiment(tmp_path, entry(moved)), main, "tri", 0) == hashes["set"]


def test_set_that_is_missing_or_mapped_wrongly_is_refused_before_anything_is_written(sets, tmp_path):
    main, other = sets
    for wrong, error, message in (
        (entry(other, map={"naevus": "NV"}), ConfigError, r"data\.extra\.0\.map: lacks"),
        (entry(other, shards=str(tmp_path / "absent")), DataError, "absent: no such folder; create it by triderm pack"),
        (entry(main, map={name: name for name in main.diagnoses}), ConfigError, "is the training set itself"),
    ):
        with pytest.raises(error, match=message):
            run_folds(experiment(tmp_path / "run", wrong), main, ["tri"], [0])
    assert not (tmp_path / "run").exists()


def test_lesions_that_two_entries_name_are_refused(sets, tmp_path):
    main, other = sets
    apart, alone = ({**dict.fromkeys(MAP), **own} for own in (
        {"in_situ": "MEL", "scar": "WART"}, {"naevus": "NV", "melanoma": "MEL"}
    ))  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"data\.extra\.1: is the same set as data\.extra\.0, so its lesions would join twice"
    ):
        open_extra_sets(experiment(tmp_path, entry(other), entry(other, map=alone)), main)
    open_extra_sets(experiment(tmp_path, entry(other, map=apart), entry(other, map=alone)), main)


@pytest.fixture
def copies(tmp_path) -> ShardIndex:
    """A set with photos of the training set among its own."""
    return pack_set(tmp_path / "copies", OTHER, 8, 39)  # its lesion 0 has the dermoscopic photo of lesion 19


def test_lesions_with_a_photo_of_the_training_set_are_refused_by_name(sets, copies, tmp_path):
    main, _ = sets
    with pytest.raises(DataError) as refusal:
        run_folds(experiment(tmp_path / "run", entry(copies)), main, ["tri"], [0])
    assert str(refusal.value).startswith(
        "data.extra.0: 4 of 6 lesions of other share a photo with the training set: L000 and L019 (same file), L001 an"
    )
    assert "\n" not in str(refusal.value) and "set its overlap to drop" in str(refusal.value)
    assert not (tmp_path / "run" / "tri").exists()


def test_lesions_with_a_photo_of_the_training_set_are_dropped(sets, copies, tmp_path, data, capsys):
    main, other = sets
    run = experiment(tmp_path / "run", entry(other), entry(copies, overlap="drop"))
    run_folds(run, main, ["tri"], [0])
    assert "note: data.extra.1: left out, 4 of 6 lesions of other share a photo with " in " ".join(
        capsys.readouterr().out.split()
    )
    union = data[0].training.index
    kept = [each.rows.tolist() for each in union.extra]
    assert kept[0] == open_extra_sets(run, main)[0].rows.tolist()
    names = copies.lesion_ids[np.array(kept[1])].tolist()
    assert sorted(names) == ["L005", "L007"]  # L006 is a scar


def test_lesions_with_a_photo_of_the_test_set_are_left_out_too(sets, tmp_path, data):
    main, other = sets
    test = pack_set(tmp_path / "test", MAIN, 4, 10_000 - 1)  # its lesion i has the photo of the other set's lesion i
    word = f"data.test_shards={test.folder}"
    with pytest.raises(DataError, match="3 of 12 lesions of other share a photo with the test set: L000 and L000 "):
        run_folds(experiment(tmp_path / "run", entry(other), words=(word,)), main, ["tri"], [0])
    dropping = [experiment(tmp_path / "run", entry(other, overlap="drop"), words=words) for words in ((word,), ())]
    run_folds(dropping[0], main, ["tri"], [0])
    (extra,) = data[0].training.index.extra
    assert sorted(other.lesion_ids[extra.rows])[:2] == ["L004", "L005"]
    # What is left out depends on the test set, so the result does too.
    assert is_fold_finished(dropping[0], main, "tri", 0) and not is_fold_finished(dropping[1], main, "tri", 0)
    refusing = [experiment(tmp_path, entry(other), words=words) for words in ((word,), ())]
    assert len({result_hash(each, main, "tri", 0) for each in refusing}) == 1


def test_set_of_copies_only_is_refused(sets, tmp_path):
    main, _ = sets
    copies = pack_set(tmp_path / "copies", OTHER, 5, 39)
    with pytest.raises(DataError, match="every lesion of it shares a photo with the training set; remove the set"):
        run_folds(experiment(tmp_path / "run", entry(copies, overlap="drop")), main, ["tri"], [0])


def test_interrupted_training_resumes_bit_for_bit(sets, tmp_path):
    main, other = sets
    words = ("train.epochs=2",)
    runs = [experiment(tmp_path / name, entry(other), words=words) for name in ("interrupted", "uninterrupted")]

    def interrupt(epoch: int, scores: dict[str, float]) -> None:
        raise InputError("interrupted")

    with pytest.raises(InputError, match="interrupted"):
        run_folds(runs[0], main, ["tri"], [2], on_validation=interrupt)
    for run in runs:
        run_folds(run, main, ["tri"], [2])
    weights = [file_sha256(run.fold_folder("tri", 2) / "weights.safetensors") for run in runs]
    assert weights[0] == weights[1]


def test_documented_and_shipped_examples_map_ham10000_to_milk10k():
    page = (ROOT / "docs" / "several-sets.md").read_text(encoding="utf-8")
    documented = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.S)[1])
    shipped = load(Experiment, "milk10k_cpu_ham10000").data.extra
    assert load(Experiment, None, [f"data.extra={json.dumps(documented['data']['extra'])}"]).data.extra == shipped
    known, own = milk10k_task().diagnosis_names, load_task("ham10000").diagnosis_names
    assert tuple(shipped[0].map) == own and set(shipped[0].map.values()) <= set(known)
