"""Finer labels than the diagnoses: read, packed, learned by an auxiliary head, and not part of a finished network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import triderm_dist
from tests.inference.small_run import train
from tests.inference.small_tower import SMALL_TOWER
from tests.small_tasks import FINE, TASKS
from triderm_dist.config import ModelConfig
from triderm_dist.data.problems import InvalidLesions
from triderm_dist.data.readers.lesions_csv import read_lesions
from triderm_dist.data.shards.index import read_index
from triderm_dist.data.shards.pack import pack_shards
from triderm_dist.data.shards.verify import verify
from triderm_dist.data.synthetic import write_synthetic
from triderm_dist.engine.network_files import read_weights
from triderm_dist.models.dual_cnn import DualCnn
from triderm_dist.models.towers import TOWER_SOURCES, TokenShape
from triderm_dist.schema import UNLABELED, ConfigError, FineLabels, InputError, Outputs, Task

CNN = "models.cnn={kind: dual_cnn, width: 16, tower: {source: 'small:', pretrained: false, frozen: true}}"


class Aged(NamedTuple):
    """The outputs of a network that predicts the age too."""

    logits: torch.Tensor
    aux_clinical: torch.Tensor | None
    aux_dermoscopic: torch.Tensor | None
    features: torch.Tensor
    age: torch.Tensor
    heads = Outputs.heads


@pytest.fixture
def small_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOWER_SOURCES, "small", SMALL_TOWER)


def test_synthetic_set_is_read_and_packed_with_finer_labels(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "demo", FINE, 40, 20, 0)
    dataset = read_lesions(tmp_path / "demo" / "train", FINE)
    assert FINE.fine is not None
    for lesion in dataset.lesions:
        own = FINE.fine.labels.get(FINE.diagnosis_names[lesion.label], ())
        assert FINE.fine.names[lesion.fine] in own if own else lesion.fine == UNLABELED
    packed = pack_shards(dataset, tmp_path / "packed", short_side=None)
    fine_of = {lesion.lesion_id: lesion.fine for lesion in dataset.lesions}
    assert packed.fine.tolist() == [fine_of[lesion] for lesion in packed.lesion_ids]
    rows = packed.inputs(np.arange(len(packed))).fine
    assert rows is not None and (rows.sum(1) == (packed.fine != UNLABELED)).all()
    read = read_index(tmp_path / "packed")
    assert not verify(read, folds=2, fold_seed=0)
    assert read.task == FINE and read.fingerprint == packed.fingerprint


def test_finer_label_of_another_diagnosis_is_refused(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "demo", FINE, 40, 20, 0)
    table = tmp_path / "demo" / "train" / "lesions.csv"
    table.write_text(table.read_text().replace("nodular", "blue"))
    with pytest.raises(InvalidLesions, match="subtype 'blue' is a label of mole, and the diagnosis is melanoma"):
        read_lesions(tmp_path / "demo" / "train", FINE)


@pytest.mark.parametrize(
    ("fine", "message"),
    [
        ({"column": "a", "labels": {"mole": ["x"], "scar": ["y"]}}, "fine.labels: 'scar' is not a diagnosis"),
        ({"column": "a", "labels": {"mole": ["x", "X"]}}, "fine.labels: 'x' is written twice"),
        ({"column": "a", "labels": {"mole": ["x"]}}, "fine.labels: at least 2 finer labels are needed, got 1"),
        ({"column": "a", "labels": {"mole": ["x", "unknown"]}}, "fine.labels: 'unknown' is a missing word"),
        ({"column": "a"}, "fine.labels: is missing"),
    ],
)
def test_task_with_finer_labels_that_contradict_it_is_refused(fine: dict, message: str) -> None:
    assert Task.from_mapping(FINE.to_mapping(), "task") == FINE
    with pytest.raises(ConfigError, match=message):
        Task.from_mapping({**TASKS["everything"].to_mapping(), "fine": fine}, "task")
    assert replace(TASKS["everything"], fine=FineLabels("a", {"mole": ("x", "y")})).matches(TASKS["everything"])


def test_head_of_finer_labels_is_trained_and_not_kept(tmp_path: Path, small_tower: None) -> None:
    words = ("train.loss.fine_weight=0.5", "train.log_every=1", "stack.enabled=false")
    folder = train(tmp_path, [CNN, *words], FINE)
    records = [json.loads(line) for line in (folder / "cnn" / "fold-0" / "metrics.jsonl").read_text().splitlines()]
    assert any(key.endswith("fine") and value > 0 for record in records for key, value in record.items())
    assert not [name for name in read_weights(folder / "cnn" / "fold-0" / "weights") if "fine" in name]
    assert len(triderm_dist.load(folder, device="cpu").predict(age=50).probabilities) == 3


def test_finer_labels_that_the_task_lacks_are_refused(tmp_path: Path, small_tower: None) -> None:
    with pytest.raises(InputError, match=r"train\.loss\.fine_weight: task 'small' has no finer labels; set it to 0"):
        train(tmp_path, [CNN, "train.loss.fine_weight=0.5", "stack.enabled=false"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: Aged(*found, found.features[:, 0]), "returned age besides Outputs, which excludes finer labels"),
        (lambda found: found._replace(features=found.features[:, 1:]), "returned features of width 15, and finer"),
    ],
)
def test_network_whose_outputs_have_no_place_for_finer_labels_is_refused(change: Any, message: str) -> None:
    class Changed(DualCnn):
        def fuse(self, *inputs: Any) -> Any:
            return change(super().fuse(*inputs))

    signature = FINE.signature(())
    network = Changed(ModelConfig(kind="dual_cnn", width=16), signature, TokenShape(4, 8)).train()
    network.add_fine_head(3)
    tokens = torch.rand(2, 2, 4, 8)
    inputs = torch.rand(2, 0), torch.rand(2, len(signature.fields))
    with pytest.raises(ConfigError, match=message):
        network(*tokens, torch.ones(2, 2, dtype=torch.bool), *inputs)
