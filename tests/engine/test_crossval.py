"""Retry of a fold after an out-of-memory error; out-of-fold predictions averaged over transforms."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch

from triderm_dist.config import Experiment, load
from triderm_dist.distributed.parallel import start_training
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.fold import is_fold_finished
from triderm_dist.engine.model_inputs import open_inputs
from triderm_dist.engine.model_tower import training_tower
from triderm_dist.engine.predict_test import predict_test
from triderm_dist.models.network import Network
from triderm_dist.monitoring.metrics_log import read_metrics
from triderm_dist.predictions import read_predictions


def test_memory_of_a_failed_attempt_is_freed_before_the_next(tmp_path):
    index = synthetic_shards(tmp_path / "shards", 24, 40)
    tower = "{source: 'timm:test_efficientnet', pretrained: false, image_size: 32, frozen: true}"
    words = [
        f"output={tmp_path / 'run'}",
        f"models.cnn={{kind: dual_cnn, width: 16, tower: {tower}}}",
        "data.folds=2",
        "train={epochs: 1, global_batch: 8, micro_batch: 8, precision: fp32, trackers: []}",
    ]
    networks: list[weakref.ref] = []

    def out_of_memory(module: torch.nn.Module, inputs: tuple) -> None:
        if not isinstance(module, Network) or not module.training:
            return
        if not networks or networks[-1]() is not module:
            assert all(network() is None for network in networks)
            networks.append(weakref.ref(module))
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError(f"no memory for {len(inputs[0])} lesions")

    gc.disable()  # the run must free memory without automatic collection
    hook = torch.nn.modules.module.register_module_forward_pre_hook(out_of_memory)
    try:
        run_folds(load(Experiment, None, words), index, ["cnn"], [0])
    finally:
        hook.remove()
        gc.enable()
    assert len(networks) == 3  # for micro-batches of 8, 4 and 2
    fold = tmp_path / "run" / "cnn" / "fold-0"
    assert json.loads((fold / "micro_batch.json").read_text())["micro_batch"] == 2
    assert (fold / "predictions.parquet").exists()


def test_validation_of_some_epochs_changes_no_weights(tmp_path):
    index = synthetic_shards(tmp_path / "shards", 24, 40)
    tower = "{source: 'timm:test_efficientnet', pretrained: false, image_size: 32, frozen: true}"

    def train(every: int) -> tuple[list[float], bytes]:
        words = [
            f"output={tmp_path / f'run-{every}'}", f"tokens={tmp_path / 'tokens'}", "data.folds=2",
            f"models.cnn={{kind: dual_cnn, width: 16, tower: {tower}}}",
            "train={epochs: 3, global_batch: 8, micro_batch: 8, precision: fp32, trackers: []}",
            f"train.validate_every={every}",
        ]  # fmt: skip
        validated: list[float] = []
        experiment = load(Experiment, None, words)
        run_folds(experiment, index, ["cnn"], [0], lambda epoch, scores: validated.append(epoch))
        fold = experiment.fold_folder("cnn", 0)
        epochs = [line["epoch"] for line in read_metrics(fold / "metrics.jsonl") if line["kind"] == "validation"]
        assert epochs == validated
        assert json.loads((fold / "weights.json").read_text())["validation_macro_f1"] >= 0
        return validated, (fold / "weights.safetensors").read_bytes()

    every_epoch, some = train(1), train(2)
    assert (every_epoch[0], some[0]) == ([1, 2, 3], [2, 3]) and every_epoch[1] == some[1]


@pytest.mark.parametrize("frozen", [True, False])
def test_out_of_fold_predictions_over_more_transforms_need_no_training(tmp_path, frozen, capsys):
    index = synthetic_shards(tmp_path / "shards", 24, 40)
    tower = f"{{source: 'timm:test_efficientnet', pretrained: false, image_size: 32, frozen: {str(frozen).lower()}}}"
    words = [
        f"output={tmp_path / 'run'}",
        f"models.cnn={{kind: dual_cnn, width: 16, tower: {tower}}}",
        "data.folds=2",
        "train={epochs: 1, global_batch: 8, micro_batch: 8, trackers: [], augment: {token_variants: 1}}",
    ]
    one, eight = (load(Experiment, None, [*words, f"oof.tta={transforms}"]) for transforms in (1, 8))
    fold = tmp_path / "run" / "cnn" / "fold-0"
    files = ("predictions.parquet", "without_clinical.parquet")
    run_folds(one, index, ["cnn"], [0, 1])
    assert is_fold_finished(one, index, "cnn", 0) and not is_fold_finished(eight, index, "cnn", 0)
    trained = (fold / "weights.safetensors").stat().st_mtime_ns
    plain = [read_predictions(fold / name).logits for name in files]
    earlier = (fold / files[0]).read_bytes()

    run_folds(eight, index, ["cnn"], [0])
    assert is_fold_finished(eight, index, "cnn", 0) and not is_fold_finished(one, index, "cnn", 0)
    replaced = (fold / files[0]).read_bytes()
    (fold / files[0]).write_bytes(earlier)  # as if killed before this file, the last, was replaced
    assert not is_fold_finished(eight, index, "cnn", 0) and not is_fold_finished(one, index, "cnn", 0)
    (fold / files[0]).write_bytes(replaced)
    assert "cnn fold 0: 12 held-out lesions predicted again, mean of 8 transforms" in capsys.readouterr().out
    assert (fold / "weights.safetensors").stat().st_mtime_ns == trained
    averaged = [read_predictions(fold / name) for name in files]
    assert min(np.abs(after.logits - before).max() for after, before in zip(averaged, plain, strict=True)) > 1e-4
    predict_test(one, index, ["cnn"])  # all lesions, averaged over 8 transforms
    test = read_predictions(fold / "test.parquet")
    row_of = {lesion: row for row, lesion in enumerate(test.lesion_ids)}
    rows = [row_of[lesion] for lesion in averaged[0].lesion_ids]
    np.testing.assert_allclose(averaged[0].logits, test.logits[rows], atol=1e-5)


@pytest.mark.parametrize("other", [False, True])
def test_means_are_of_whole_tokens_where_another_model_reads_those(tmp_path, other):
    index = synthetic_shards(tmp_path / "shards", 8, 40)
    tower = "tower: {source: 'timm:test_efficientnet', pretrained: false, image_size: 32, frozen: true}"
    words = [f"output={tmp_path / 'run'}", f"models.a={{kind: dual_cnn, width: 16, {tower}}}"]
    if other:
        words.append(f"models.b={{kind: trimodal, width: 16, heads: 2, {tower}}}")
    experiment = load(Experiment, None, words)
    model = experiment.models["a"]
    open_inputs(experiment, model, index, start_training(model.train), training_tower(experiment, model, index))
    folders = {path.name.rpartition("-")[2] == "mean" for path in experiment.token_folder.iterdir()}
    assert folders == ({True, False} if other else {True})
