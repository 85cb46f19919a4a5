"""Training on a union of sets gives the same losses and weights on 1 and 2 ranks, with any micro-batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.processes import launch
from tests.union_sets import MAP, main_set, other_set
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.predictions import read_predictions

CASES = {"one rank": (1, 8), "accumulation": (1, 2), "two ranks": (2, 4), "two ranks, accumulation": (2, 1)}
"""Ranks and micro-batch. 16 lesions of the training set and 12 of the other one, some of them twice, in batches of 8:
the last one is padded.
"""


@pytest.fixture(scope="module")
def folds(tmp_path_factory) -> dict[str, Path]:
    """The folder of fold 1 of each case."""
    folder = tmp_path_factory.mktemp("extra")
    main, other = main_set(folder / "main"), other_set(folder / "other")
    entry = {"shards": str(other.folder), "map": MAP, "weight": 0.5}
    tower = "{source: 'timm:test_vit', pretrained: false, image_size: 32, freeze_clinical: 1, freeze_dermoscopic: 0}"
    words = [
        f"data.shards={main.folder}",
        f"data.extra={json.dumps([entry])}",
        "data.folds=3",
        f"models.tri={{width: 16, heads: 2, dropout: 0, tower: {tower}}}",
        "train={epochs: 1, global_batch: 8, log_every: 1, trackers: [], optim: {lr: 1e-3}}",
        "train.sampling.threshold=0.4",
        "fold=1",
    ]
    for name, (ranks, micro_batch) in CASES.items():
        launch("launch.train", *words, f"output={folder / name}", f"train.micro_batch={micro_batch}", ranks=ranks)
    return {name: folder / name / "tri" / "fold-1" for name in CASES}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.parametrize("case", list(CASES)[1:])
def test_losses_and_weights_are_independent_of_the_split(folds, case):
    expected = losses(folds["one rank"])
    assert len(expected) > 3
    assert losses(folds[case]) == pytest.approx(expected, rel=1e-4)
    weights, own = (load_file(folds[name] / "weights.safetensors") for name in ("one rank", case))
    for name, tensor in weights.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


def test_only_lesions_of_the_training_set_are_predicted(folds):
    for folder in folds.values():
        names = read_predictions(folder / "predictions.parquet").lesion_ids
        assert len(names) == 8 and not np.char.count(names.astype(str), "/").any()
