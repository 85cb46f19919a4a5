"""Training of networks whose task lacks a view, concepts or fields: what is written, computed and said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.small_tasks import TASKS
from triderm_dist.config import Experiment, load
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.data.token_cache import HEADER
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.embed import embeddings
from triderm_dist.engine.explain import attention_maps
from triderm_dist.engine.fold import trained_fold
from triderm_dist.predictions import read_predictions
from triderm_dist.schema import VIEWS, DataError, Diagnosis, Task

MODELS = """
models.trained={width: 16, heads: 2, tower: {source: 'timm:test_vit', pretrained: false, image_size: 32}}
models.frozen={kind: dual_cnn, width: 16, tower: {source: 'timm:test_efficientnet', pretrained: false,
 image_size: 32, frozen: true}}
"""
LEFT_OUT = {
    "dermoscopic only": "tower, tokens and auxiliary head of the clinical view; view alignment",
    "clinical only": "tower, tokens and auxiliary head of the dermoscopic view; view alignment",
    "no concepts": "input of concepts",
    "no fields": "input of metadata",
    "photos only": "input of concepts; input of metadata; semantic gating",
}


@pytest.fixture(scope="module", params=LEFT_OUT)
def trained(request, tmp_path_factory) -> tuple[str, Experiment, ShardIndex]:
    """The name of a task, and one fold of both models trained and predicted on 24 synthetic lesions of it."""
    folder = tmp_path_factory.mktemp("run")
    index = synthetic_shards(folder / "shards", 24, 40, TASKS[request.param])
    trained, frozen = MODELS.strip().replace(",\n", ",").splitlines()
    shared = ["data.folds=2", "train={epochs: 1, global_batch: 8, micro_batch: 4, trackers: [], precision: fp32}"]
    experiment = load(
        Experiment, None, [trained, frozen, *shared, f"output={folder / 'run'}", f"data.shards={index.folder}"]
    )
    run_folds(experiment, index, ["trained", "frozen"], [0])
    return request.param, experiment, index


def test_predictions_have_no_auxiliary_logits_of_an_absent_view(trained):
    _, experiment, index = trained
    for name in ("trained", "frozen"):
        folder = experiment.fold_folder(name, 0)
        predictions = read_predictions(folder / "predictions.parquet")
        assert predictions.task == index.task
        assert np.isfinite(predictions.logits).all() and len(predictions) == 12
        for view in VIEWS:
            auxiliary = getattr(predictions, f"aux_{view}")
            expected = view in index.signature.views
            assert auxiliary.shape == (12, 3) and np.isfinite(auxiliary).all() == expected
            assert np.isnan(auxiliary).all() != expected
        # What a view is worth is a question where there are other inputs, as in each of these tasks.
        hidden = [view for view in VIEWS if (folder / f"without_{view}.parquet").exists()]
        assert hidden == list(index.signature.views)


def test_frozen_tower_encodes_the_views_of_the_task_only(trained):
    _, experiment, index = trained
    (plain,) = Path(experiment.token_folder).glob("*/plain/000000.tokens")
    header = json.loads(plain.read_bytes()[:HEADER])
    assert (header["lesions"], header["views"]) == (24, len(index.signature.views))
    assert embeddings(experiment, index, "frozen")[0].shape == (24, len(index.signature.views) * 256)


def test_attention_is_that_of_the_views_and_tokens_of_the_task(trained):
    _, experiment, index = trained
    lesion = str(read_predictions(experiment.fold_folder("trained", 0) / "predictions.parquet").lesion_ids[0])
    ((name, task, maps),) = attention_maps(experiment, [lesion])
    assert (name, task, maps.diagnoses) == ("trained", index.task, index.diagnoses)
    assert list(maps.photos) == list(maps.attention) == list(index.signature.views)
    inputs = (*index.concepts, *index.task.field_names)
    assert list(maps.semantic) == ([*inputs, "null"] if inputs else []) and set(maps.values) == set(inputs)
    assert all(weights.sum() == pytest.approx(1, abs=1e-4) for weights in maps.attention.values())


def test_fold_records_its_task_and_refuses_sets_of_another(trained):
    _, experiment, index = trained
    folder = experiment.fold_folder("trained", 0)
    assert Task.from_mapping(trained_fold(folder, index)[0].info["task"], "fold.json") == index.task
    trained_fold(folder, replace(index, task=replace(index.task, title="A title", decision="argmax")))
    turned = replace(index, concepts=index.concepts[::-1], stored_concepts=index.concepts[::-1])
    matched = trained_fold(folder, turned)[1]
    assert matched.concepts == index.concepts
    assert np.array_equal(matched.concept_scores, index.concept_scores[:, ::-1], equal_nan=True)
    diagnoses = (*index.task.diagnoses[:2], Diagnosis("scar"))
    others = {
        "another description of it": replace(index.task, diagnoses=diagnoses),
        "task 'other'": replace(index.task, name="other"),
    }
    for other, task in others.items():
        message = f"{folder}: trained for task 'small', and SHARDS is packed for {other}; "
        shards = SimpleNamespace(task=task, folder="SHARDS", concepts=index.concepts)
        with pytest.raises(DataError, match=re.escape(message + "pack both sets with the same task.yaml")):
            trained_fold(folder, shards)
        with pytest.raises(DataError, match=re.escape(message + "set another output")):
            run_folds(experiment, shards, ["frozen"], [1])
        with pytest.raises(DataError, match=re.escape(message + "set another output")):
            embeddings(experiment, shards, "frozen")
    for concepts in ((*index.concepts, "hair"), ("hair",)):
        without = f"without {', '.join(index.concepts)}; " if concepts == ("hair",) and index.concepts else ""
        message = f"SHARDS: its concepts are not those of the training set ({without}also hair); pack the test set"
        with pytest.raises(DataError, match=re.escape(message)):
            trained_fold(folder, SimpleNamespace(task=index.task, folder="SHARDS", concepts=concepts))


def test_start_up_report_names_what_was_left_out(trained, capsys):
    task, experiment, index = trained
    run_folds(experiment, index, ["trained"], [1])
    said = " ".join(capsys.readouterr().out.split())
    assert f" left out {LEFT_OUT[task]} (the task has no such data)" in said
