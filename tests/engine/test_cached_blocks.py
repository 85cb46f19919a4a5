"""Training on what frozen blocks return, read from the cache: the numbers of training on photos, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.union_sets import MAIN, MAP, OTHER, pack_set
from triderm_dist.config import Experiment, ModelConfig, load
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.shards.index import ShardIndex
from triderm_dist.distributed import parallel
from triderm_dist.doctor.disk import estimate_disk
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.evaluate import evaluate
from triderm_dist.engine.fold import is_fold_finished, new_network
from triderm_dist.engine.model_inputs import ModelInputs, open_inputs
from triderm_dist.engine.model_tower import recorded_tower, training_tower
from triderm_dist.engine.network_files import load_weights, read_weights
from triderm_dist.engine.refit import refit
from triderm_dist.engine.trained_network import TrainedNetwork
from triderm_dist.models.network import Network
from triderm_dist.predictions import read_predictions
from triderm_dist.schema import ConfigError

LESIONS = 20
HALF = 2**-10
"""Relative rounding of float16."""
TOWERS = {
    "shared": "shared: true, freeze_clinical: 3, freeze_dermoscopic: 2",
    "by view": "freeze_clinical: 3, freeze_dermoscopic: 2",
    "class token": "freeze_clinical: 3, freeze_dermoscopic: 2, source: 'timm:test_vit'",
}


def settings(index: ShardIndex, output: Path, tower: str, *words: str) -> Experiment:
    tower = f"pretrained: false, image_size: 32, cache_frozen_blocks: true, {tower}"
    tower += "" if "source" in tower else ", source: 'timm:test_efficientnet'"
    return load(Experiment, None, [
        f"data.shards={index.folder}", f"output={output}", f"tokens={output.parent / 'cache'}", "data.folds=2",
        f"models.net={{kind: dual_cnn, width: 16, tower: {{{tower}}}}}",
        "train={epochs: 1, global_batch: 8, micro_batch: 8, trackers: [], precision: fp32}",
        "train.augment.token_variants=1", *words,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return pack_set(tmp_path_factory.mktemp("sets") / "main", MAIN, LESIONS, 0)


def opened(experiment: Experiment, index: ShardIndex, **tower: object) -> tuple[ModelInputs, Network]:
    model = experiment.models["net"]
    changed: ModelConfig = model.model_copy(update={"tower": model.tower.model_copy(update=tower)})
    accelerator = parallel.start_inference("fp32")
    tower = training_tower(experiment, changed, index)
    data = open_inputs(experiment, changed, index, accelerator, tower, transforms=2)
    torch.manual_seed(3)
    return data, new_network(changed, data)


def step(network: Network, loaders: LoaderFactory, transform: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the logits of a training step on all lesions without augmentation, and the gradients."""
    (batch,) = loaders.sequential(np.arange(LESIONS), LESIONS, torch.device("cpu"))
    each = loaders.source.transformed(batch.micro_batches[0], batch.rows, transform)
    logits = network.train()(each.clinical, each.dermoscopic, each.view_present, each.concepts, each.metadata).heads
    torch.stack([one.square().mean() for one in logits]).sum().backward()
    return [one.detach() for one in logits], {
        name: each.grad for name, each in network.named_parameters() if each.grad is not None
    }


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)
def test_a_step_has_the_numbers_of_one_on_photos_but_for_rounding(tmp_path, index, tower):
    experiment = settings(index, tmp_path / "run", tower, "models.net.dropout=0")
    plain, on_photos = opened(experiment, index, cache_frozen_blocks=False)
    cached, on_cache = opened(experiment, index)
    on_photos.load_state_dict(on_cache.state_dict())
    assert not plain.frozen_blocks and cached.frozen_blocks
    for transform in (0, 1):
        on_photos.zero_grad(), on_cache.zero_grad()
        expected, gradients = step(on_photos, plain.loaders, transform)
        logits, found = step(on_cache, cached.loaders, transform)
        for one, other in zip(logits, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=20 * HALF, atol=20 * HALF * float(other.abs().max()))
        assert found.keys() == gradients.keys() and any(name.startswith("towers.") for name in found)
        for name, gradient in gradients.items():
            difference = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
            assert difference < 0.05, (name, difference)


def assert_predicts_the_same_from_photos(experiment: Experiment, index: ShardIndex, folds: Iterable[int]) -> None:
    """Compare the predictions of held-out lesions with those of the whole tower, with the weights in the files."""
    accelerator = parallel.start_inference("fp32")
    for fold in folds:
        folder, model = experiment.fold_folder("net", fold), experiment.models["net"]
        held_out = read_predictions(folder / "predictions.parquet")
        tower = recorded_tower(experiment, model, TrainedNetwork.read(folder).tower)
        data = open_inputs(experiment, model, index, accelerator, tower)
        network = new_network(model, data, pretrained=False)
        load_weights(folder / "weights", network)
        rows = np.array([list(index.lesion_ids).index(each) for each in held_out.lesion_ids])
        again = evaluate(network, data.loaders, rows, accelerator, micro_batch=8).logits
        assert not data.frozen_blocks and len(rows) == LESIONS // 2
        np.testing.assert_allclose(held_out.logits, again, atol=20 * HALF * float(np.abs(again).max()))


def test_training_reads_augmented_versions_and_prediction_the_whole_tower(tmp_path, index):
    experiment = settings(index, tmp_path / "run", TOWERS["by view"])
    run_folds(experiment, index, ["net"], range(2))
    versions = sorted(path.name[:9] for path in (tmp_path / "cache").glob("*/*"))
    assert versions == ["augmented"] * 2 + ["plain"] * 2  # of each view
    assert is_fold_finished(experiment, index, "net", 0)
    assert_predicts_the_same_from_photos(experiment, index, range(2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tokens")}
    refit(experiment, index, ["net"])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.tokens")}
    folders = [experiment.fold_folder("net", 0), experiment.fold_folder("net", 1), experiment.refit_folder("net")]
    stems = [read_weights(folder / "weights")["towers.clinical.stem.model.conv_stem.weight"] for folder in folders]
    assert all(torch.equal(each, stems[0]) for each in stems)


def test_held_out_lesions_are_predicted_from_the_output_of_vit_blocks(tmp_path, index):
    """Which has the shape of tokens but for the class token."""
    experiment = settings(index, tmp_path / "run", TOWERS["class token"])
    run_folds(experiment, index, ["net"], [0])
    assert_predicts_the_same_from_photos(experiment, index, [0])


def test_only_views_that_the_network_uses_are_cached(tmp_path, index):
    experiment = settings(index, tmp_path / "run", TOWERS["by view"], "models.net.use=[dermoscopic, metadata]")
    data, network = opened(experiment, index)
    assert list(data.frozen_blocks) == ["dermoscopic"] and len(list((tmp_path / "cache").iterdir())) == 1
    (batch,) = data.loaders.sequential(np.arange(4), 4, torch.device("cpu"))
    each = batch.micro_batches[0]
    assert each.clinical.numel() == 0 and each.dermoscopic.shape[1:] == network.towers["dermoscopic"].input_shape


def test_an_extra_set_without_a_view_is_cached_too(tmp_path, index):
    pack_set(tmp_path / "other", OTHER, 12, 10_000, (40, 40), prefix="O")
    extra = json.dumps([{"shards": str(tmp_path / "other"), "map": MAP}])
    experiment = settings(index, tmp_path / "run", TOWERS["by view"], f"data.extra={extra}")
    run_folds(experiment, index, ["net"], [0])
    assert len(list((tmp_path / "cache").glob("*/plain"))) == 4  # two views of two sets


def test_the_frozen_blocks_are_those_of_the_network_that_the_training_starts_from(tmp_path, index):
    other = pack_set(tmp_path / "other", OTHER, 12, 10_000, (40, 40), prefix="O")
    whole = "freeze_clinical: 0, freeze_dermoscopic: 0"
    first = settings(other, tmp_path / "first", whole, "models.net.tower.cache_frozen_blocks=false")
    run_folds(first, other, ["net"], [0])
    source = first.fold_folder("net", 0)
    experiment = settings(index, tmp_path / "run", TOWERS["by view"], f"models.net.init={source}")
    run_folds(experiment, index, ["net"], [0])
    weights, theirs = (read_weights(each.fold_folder("net", 0) / "weights") for each in (experiment, first))
    for name in ("stem.model.conv_stem.weight", "blocks.1.0.conv_exp.weight"):
        assert torch.equal(weights[f"towers.clinical.{name}"], theirs[f"towers.dermoscopic.{name}"]), name
    assert_predicts_the_same_from_photos(experiment, index, [0])


def test_the_disk_estimate_counts_the_cache(tmp_path, index):
    experiment = settings(index, tmp_path / "run", TOWERS["by view"], "tokens=null", "oof.tta=2")
    opened(experiment, index)
    need = estimate_disk(experiment, index.signature, index, "no test set")
    found = sum(path.stat().st_size for path in (tmp_path / "run" / "tokens").rglob("*.tokens"))
    assert need.tokens == pytest.approx(found, rel=0.02) and need.towers == 0


@pytest.mark.parametrize(
    ("tower", "words", "message"),
    [
        ("freeze_clinical: 0", (), "freeze_clinical and freeze_dermoscopic to at least 1"),
        ("freeze_clinical: 1", ("train.augment.cutmix=1",), "cutmix mixes pixels.*use mixup"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, index, tower, words, message):
    with pytest.raises(ConfigError, match=message):
        settings(index, tmp_path, tower, *words)
