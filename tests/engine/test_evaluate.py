"""Evaluation of a network with inputs treated as missing."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from triderm_dist.config import Experiment, load
from triderm_dist.data.loader import LoaderFactory
from triderm_dist.data.photo_source import PhotoSource
from triderm_dist.engine.bench import synthetic_shards
from triderm_dist.engine.crossval import run_folds
from triderm_dist.engine.evaluate import INPUTS, Evaluation, evaluate, evaluate_parts
from triderm_dist.models import build_network, build_towers
from triderm_dist.predictions import read_predictions

TOWER = "{source: 'timm:test_efficientnet', pretrained: false, image_size: 32, shared: true}"


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A network that takes pixels, its loaders, and the index of its lesions."""
    index = synthetic_shards(tmp_path_factory.mktemp("data") / "shards", 20, 40)
    model = load(Experiment, None, [f"models.tri={{kind: trimodal, width: 16, heads: 2, tower: {TOWER}}}"]).models[
        "tri"
    ]
    torch.manual_seed(0)
    towers = build_towers(model.tower)
    network = build_network(model, index.signature, towers)
    source = PhotoSource(index, towers[0].image_size, towers[0].mean, towers[0].std)
    return network, LoaderFactory(index, source), index


def test_each_hidden_input_is_as_if_the_lesions_lacked_it(setup, monkeypatch):
    network, loaders, index = setup
    rows, accelerator = np.arange(7), Accelerator(cpu=True)
    passes: list[int] = []
    network.towers["shared"].register_forward_hook(lambda *_: passes.append(1))
    plain = evaluate(network, loaders, rows, accelerator, micro_batch=4, transforms=2)
    assert len(passes) == 4
    parts: dict[str | None, list[Evaluation]] = {name: [] for name in (None, *INPUTS)}
    for name, part in evaluate_parts(
        network, loaders, rows, accelerator, micro_batch=4, hidden=tuple(parts), transforms=2
    ):
        parts[name].append(part)
    assert [part.rows.tolist() for part in parts["metadata"]] == [[0, 1, 2, 3], [4, 5, 6]]
    found = {
        name: Evaluation(*map(np.concatenate, zip(*map(astuple, each), strict=True))) for name, each in parts.items()
    }
    assert len(passes) == 8  # one pass through the tower for all
    np.testing.assert_array_equal(found[None].logits, plain.logits)
    for name, column in (("concepts", "concept_scores"), ("metadata", "metadata")):
        with monkeypatch.context() as patch:
            patch.setitem(vars(index), column, np.full_like(getattr(index, column), np.nan))
            expected = evaluate(network, loaders, rows, accelerator, micro_batch=4, transforms=2)
        np.testing.assert_array_equal(found[name].logits, expected.logits)
        assert np.abs(found[name].logits - plain.logits).max() > 1e-5
    with monkeypatch.context() as patch:
        sizes, scores = index.sizes.copy(), index.concept_scores.copy()
        sizes[:, 1] = 0
        scores[:, [name.startswith("dermoscopic/") for name in index.concepts]] = np.nan
        patch.setitem(vars(index), "sizes", sizes)
        patch.setitem(vars(index), "concept_scores", scores)
        expected = evaluate(network, loaders, rows, accelerator, micro_batch=4, transforms=2)
    np.testing.assert_allclose(found["dermoscopic"].logits, expected.logits, atol=1e-5)


def test_rows_in_any_order_and_some_of_the_outputs(setup):
    network, loaders, _ = setup
    rows, accelerator = np.array([5, 0, 9, 3, 11]), Accelerator(cpu=True)
    whole = evaluate(network, loaders, np.arange(12), accelerator, micro_batch=3)
    found = evaluate(network, loaders, rows, accelerator, micro_batch=3)
    np.testing.assert_array_equal(found.rows, rows)
    for name in ("logits", "aux_clinical", "aux_dermoscopic", "features"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name)[rows], atol=1e-5)
    some = evaluate(network, loaders, rows, accelerator, micro_batch=3, names=("logits",))
    np.testing.assert_array_equal(some.logits, found.logits)
    assert some.features.shape == (5, 0)


def test_a_fold_is_predicted_without_each_input_that_it_uses(tmp_path):
    index = synthetic_shards(tmp_path / "shards", 24, 40)
    words = [
        f"output={tmp_path / 'run'}",
        f"models.cnn={{kind: dual_cnn, width: 16, use: [dermoscopic, metadata], tower: {TOWER}}}",
        "data.folds=2",
        "train={epochs: 1, global_batch: 8, micro_batch: 8, precision: fp32, trackers: []}",
    ]
    run_folds(load(Experiment, None, words), index, ["cnn"], [0])
    files = sorted((tmp_path / "run" / "cnn" / "fold-0").glob("without_*.parquet"))
    assert [path.stem.removeprefix("without_") for path in files] == ["dermoscopic", "metadata"]
    assert [read_predictions(path).extra["hidden"] for path in files] == ["dermoscopic", "metadata"]
